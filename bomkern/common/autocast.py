"""Autocast: every op returns the same values inside and outside of it.

The compiled and the Triton ops register nothing at the Autocast keys, so that a call falls through. They take halves as
they are, convert them inside the kernel, and multiply matrices below the dispatcher or with autocast off. A function
written in PyTorch's own ops would multiply matrices of halves under autocast: `exactly` turns it off.
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
    """Run ``fn`` without autocast on the device of its first argument, a tensor or a sequence of tensors."""

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
    """Return the device type of the first argument, or None if it has none, which ``fn`` reports."""
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    return first.device.type if isinstance(first, Tensor) else None
