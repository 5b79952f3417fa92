"""Select the implementation that serves a call, or give the reason why one cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import reference
from ..common.decorators import constant
from ..common.torch_internals import under_transform
from . import double_backward as double_backward  # registers the references for second derivatives
from .extension import extension, missing
from .registry import Op
from .schemas import OPS
from .transforms import refuse_vmap_of_record, through

IMPLS = ("cpu", "cuda", "triton", "reference")  # best first


def _has_kernel(op: str, key: str) -> bool:
    try:
        for schema in OPS[op].schemas:
            torch.library.get_kernel(f"bomkern::{schema.name}", key)
    except RuntimeError:
        return False
    return True


def why_not(op: str, impl: str, device: str) -> str | None:
    """Return None if ``impl`` can serve ``op`` on this type of device, else the reason in one sentence."""
    if impl == "reference":
        return None
    if impl == "triton":
        from . import triton

        return triton.why_not(device) if op in triton.served else f"{op} has no Triton kernel"
    if device != impl:
        return f"the input is on {device}; move it to {impl}"
    if extension is None:
        return missing
    if not _has_kernel(op, impl.upper()):
        return extension.build()["no_cuda_because"] if impl == "cuda" else f"{op} has no {impl} kernel"
    return None


def compiled(op: Op) -> Callable[..., Any]:
    """Return a function that calls the compiled op, with the arguments and the results of the reference."""
    if op.compiled is not None:
        return op.compiled()
    call, results = getattr(torch.ops.bomkern, op.name).default, op.results

    def serve(*arguments: Any, **options: Any) -> Any:
        try:
            returned = call(*arguments, **options)
        except (RuntimeError, TypeError, ValueError):
            op.check(*arguments)  # says what to write instead
            raise
        return returned if results is None else returned[results]

    return serve


def server(op: Op, impl: str) -> Callable[..., Any]:
    """Return the function that serves the op by this implementation."""
    if impl not in ("reference", "triton"):
        return compiled(op)
    if impl == "triton":
        from . import triton

        serve = triton.served[op.name]
    else:
        serve = op.reference
    return op.routed(serve) if op.routed is not None else serve


_chosen: dict[tuple[str, str, str | None], str] = {}
_servers: dict[str, Callable[..., Any]] = {}


@constant
def choose(op: str, device: str, impl: str | None) -> str:
    """Return the key in `_servers` of the best implementation of ``op`` on this type of device, or of ``impl``.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: the implementation cannot serve here; the message says why.
    """
    key = _chosen.get((op, device, impl))
    if key is not None:
        return key
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, or None, got {impl!r}")
    if impl is None:
        best = next(name for name in IMPLS if why_not(op, name, device) is None)
    elif reason := why_not(op, impl, device):
        raise RuntimeError(f"impl={impl!r} cannot serve {op} here: {reason}")
    else:
        best = impl
    key = _chosen[op, device, impl] = f"{op} {best}"
    if key not in _servers:
        # All ops at once, because a graph that is being traced sees the table as it was at its first lookup.
        available = [(each, name) for each in OPS for name in IMPLS if why_not(each, name, device) is None]
        _servers.update({f"{each} {name}": server(OPS[each], name) for each, name in available})
    return key


_keeps: dict[tuple[str, str | None], bool] = {}


@constant
def _compiled_keeps(device: str, impl: str | None) -> bool:
    """Return whether the compiled op keeps the records of goal_set."""
    key = device, impl
    if key not in _keeps:
        compiled = device in ("cpu", "cuda") and impl in (None, device)
        _keeps[key] = compiled and why_not("goal_set", device, device) is None
    return _keeps[key]


def keeper(device: str, impl: str | None) -> Callable[..., None]:
    """Return the function that keeps the record of a step of goal_set, see `reference.goal_set_keep`."""
    if under_transform() and not torch.compiler.is_compiling():
        refuse_vmap_of_record()
        return torch.ops.bomkern.goal_set_keep.default  # it gets plain tensors
    return torch.ops.bomkern.goal_set_keep.default if _compiled_keeps(device, impl) else reference.goal_set_keep


def resolve(op: str, device: str, impl: str | None) -> Callable[..., Any]:
    """Return the function that serves a call of ``op``; see `choose`."""
    key = choose(op, device, impl)
    if under_transform() and not key.endswith("reference"):
        if not torch.compiler.is_compiling():
            return partial(through, OPS[op], _servers[key], server(OPS[op], "reference"))
        if key.endswith("triton"):
            raise RuntimeError(
                f"impl='triton' cannot serve {op} in a compiled torch.func transform: use impl='reference'"
            )
    return _servers[key]
