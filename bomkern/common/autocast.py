"""Under autocast every op gives what it gives outside.

The compiled ops and Triton's need nothing for that at the Autocast keys, where an op that is not registered falls
through: they take halves as they are, convert inside the kernel, and call the products they need below the dispatcher,
or with autocast off. What is written in PyTorch's own ops would have its matrix products made of halves: `exactly`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .decorators import constant

P = ParamSpec("P")
R = TypeVar("R")


def exactly(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn`` without autocast on the device of its first argument, a tensor or a sequence of them."""

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device(args[0])
        if device is None or not _has_autocast(device) or not torch.is_autocast_enabled(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return run


@constant  # torch 2.11 cannot trace it
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _device(first: Any) -> str | None:
    """None where it is nothing that has one, which ``fn`` will say."""
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return first.device.type if isinstance(first, Tensor) else None
