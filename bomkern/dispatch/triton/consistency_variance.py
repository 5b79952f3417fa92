"""Ops, fakes and autograd of `consistency_variance` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from .. import fakes
from .launcher import guard, load
from .library import Grads, by_reference, register


def _unbound(views: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the views as V tensors [B, D], also if they are one tensor [V, B, D]."""
    return views[0].unbind(0) if len(views) == 1 else views


def _forward(views: Sequence[Tensor], correction: float) -> Tensor:
    out = fakes.consistency_variance(views, correction)
    kernels = load("consistency_variance", out.device.type)
    with guard(out):
        kernels.launch_forward(_unbound(views), correction, out)
    return out


def _backward(grad: Tensor, views: Sequence[Tensor], correction: float, want: Sequence[bool]) -> list[Tensor]:
    out = fakes.consistency_variance_backward(grad, views, correction, want)
    grads = _unbound(out) if len(out) == 1 else [g if w else None for g, w in zip(out, want, strict=True)]
    kernels = load("consistency_variance", grad.device.type)
    with guard(grad):
        kernels.launch_backward(grad, _unbound(views), correction, grads)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    views, ctx.correction = inputs
    ctx.save_for_backward(*views)


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    views = list(ctx.saved_tensors)
    out: Grads = torch.ops.bomkern.consistency_variance_triton_backward(grads[0], views, ctx.correction, want)
    return out


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(*views: Tensor) -> Any:
        return reference.consistency_variance(views, ctx.correction)

    return by_reference(ctx.saved_tensors, results, grads, want)


_library = register(
    "consistency_variance",
    ("(Tensor[] views, float correction) -> Tensor", _forward, fakes.consistency_variance),
    (
        "(Tensor grad, Tensor[] views, float correction, bool[] want) -> Tensor[]",
        _backward,
        fakes.consistency_variance_backward,
    ),
    _save,
    _pull,
    _double_backward,
)


def consistency_variance(views: Sequence[Tensor], correction: float) -> Tensor:
    """Compute `bomkern.reference.consistency_variance` by Triton kernels; same arguments and results, no stack."""
    out: Tensor = torch.ops.bomkern.consistency_variance_triton(list(views), correction)
    return out
