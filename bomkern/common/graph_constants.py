"""Small constant tables on a device, made once: neither a call nor a compiled graph copies them from the host."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from .decorators import constant
from .host_copy import capturing
from .torch_internals import inside_dispatch_mode, mark_static_address, outside_modes, traced_by_python

_captured: dict[int, Tensor] = {}  # tensors that a CUDA graph reads, by id: a graph keeps none of its inputs alive


class _Traced:
    """Hold the tables that compiled graphs read, as attributes, because Dynamo looks each one up alone."""


_traced = _Traced()


def on_device(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values``, numbers or tuples of them, as a tensor that all callers share and nobody may write into.

    A graph that torch.compile or torch.export traces reads that same tensor. A FakeTensorMode takes no tensor from
    outside, so a call inside one returns a new tensor, compiled or not; so does a call inside make_fx.

    Raises:
        RuntimeError: the values are not on the device yet, and a CUDA graph is being captured.
    """
    if torch.compiler.is_dynamo_compiling():
        if _inside_fake_mode():
            return torch.tensor(values, dtype=dtype, device=device)
        traced: Tensor = getattr(_traced, _name(values, dtype, device))
        return traced
    if not torch.compiler.is_exporting() and traced_by_python():
        return torch.tensor(values, dtype=dtype, device=device)
    table = _made(values, dtype, device)
    keep_for_graph(table)
    return table


@constant
def _inside_fake_mode() -> bool:
    """Return whether the compiled function was called inside a FakeTensorMode, which is off while it is traced."""
    return inside_dispatch_mode()


@constant
def _name(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Return the name of the attribute of `_traced` that holds the table, making it if needed.

    The attribute stays for good, because a compiled graph looks it up. Its name is a hash of its content, so that it
    means the same in another process.
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
            f"bomkern: constants that this call needs are not on {device} yet, and the CUDA graph being captured "
            "cannot copy them from the host: make the same call once before the capture"
        )
    # A plain tensor whatever modes the first caller is in, because all later callers share it.
    with torch.inference_mode(False), outside_modes():
        return torch.tensor(values, dtype=dtype, device=device)


def keep_for_graph(x: Tensor) -> None:
    """Keep x alive for good if a CUDA graph, which will read it, is being captured."""
    if capturing(x.device):
        _captured[id(x)] = x
