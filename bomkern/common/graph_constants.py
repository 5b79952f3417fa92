"""Small tables of numbers on a device, made once: no call copies them from the host, and no compiled graph either."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .decorators import constant
from .host_copy import capturing
from .torch_internals import inside_dispatch_mode, mark_static_address, outside_modes, traced_by_python

_captured: dict[int, Tensor] = {}  # what a CUDA graph reads, by id: a graph keeps nothing alive


class _Traced:
    """What compiled graphs read, as attributes, which Dynamo looks up one by one."""


_traced = _Traced()


def on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values``, numbers or tuples of them, as a tensor that all callers share and nobody may write into.

    Where torch.compile or torch.export traces the caller, the graph reads that same tensor. A FakeTensorMode takes no
    tensor from outside, so a call inside one gets a tensor of its own, compiled or not; so does make_fx.

    Raises:
        RuntimeError: the values are not there yet, and a CUDA graph is being captured.
    """
    if torch.compiler.is_dynamo_compiling():
        if _inside_fake_mode():
            return torch.tensor(values, dtype=dtype, device=device)
        traced: Tensor = getattr(_traced, _name(values, dtype, device))
        return traced
    if not torch.compiler.is_exporting() and traced_by_python():
        return torch.tensor(values, dtype=dtype, device=device)
    made = _made(values, dtype, device)
    keep_for_graph(made)
    return made


@constant
def _inside_fake_mode() -> bool:
    """Whether the compiled function was called inside a FakeTensorMode, which is off while it is traced."""
    return inside_dispatch_mode()


@constant
def _name(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str:
    """The attribute of `_traced` that holds them, for good: a graph that has been compiled looks it up.

    It is named by what it holds, should a graph ever be looked up in another process.
    """
    key = values, dtype, device
    name = f"table_{sha256(repr(key).encode()).hexdigest()[:16]}"
    if not hasattr(_traced, name):
        table = _made(*key)
        mark_static_address(table)
        setattr(_traced, name, table)
    return name


@lru_cache(maxsize=512)
def _made(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if capturing(device):
        raise RuntimeError(
            f"bomkern: numbers that this call needs are not on {device} yet, and the CUDA graph that is being captured "
            "cannot hold a copy from the host: make the same call once before the capture"
        )
    # A plain tensor, whatever its first caller is inside of: all later ones get the same.
    with torch.inference_mode(False), outside_modes():
        return torch.tensor(values, dtype=dtype, device=device)


def keep_for_graph(x: Tensor) -> None:
    """Keep x for good where a CUDA graph that will read it is being captured."""
    if capturing(x.device):
        _captured[id(x)] = x
