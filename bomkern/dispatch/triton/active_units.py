"""Ops, fakes and autograd of `active_units` by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import check_matrices, check_units
from .. import fakes
from .launcher import guard, load
from .library import Grads, by_reference, register

Three = tuple[Tensor, Tensor, Tensor]


def _allocate(mu: Tensor, threshold: float, temperature: float) -> Three:
    """Allocate the outputs: active, effective, and four numbers per column for backward, [4, D]."""
    _, dims, dtype = check_matrices(2, mu=mu)
    check_units(threshold, temperature)
    shapes: tuple[tuple[int, ...], ...] = ((), (), (4, dims))
    active, effective, columns = (mu.new_empty(shape, dtype=dtype) for shape in shapes)
    return active, effective, columns


def _forward(mu: Tensor, threshold: float, temperature: float) -> Three:
    outputs = _allocate(mu, threshold, temperature)
    kernels = load("active_units", mu.device.type)
    with guard(mu):
        kernels.launch_forward(mu, threshold, temperature, *outputs)
    return outputs


def _new_grad(grad_active: Tensor | None, grad_effective: Tensor | None, mu: Tensor, columns: Tensor) -> Tensor:
    return fakes.gradient_of(mu)


def _backward(grad_active: Tensor | None, grad_effective: Tensor | None, mu: Tensor, columns: Tensor) -> Tensor:
    grad_mu = _new_grad(grad_active, grad_effective, mu, columns)
    kernels = load("active_units", mu.device.type)
    with guard(mu):
        kernels.launch_backward(grad_active, grad_effective, mu, columns, grad_mu)
    return grad_mu


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    mu, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(mu, output[2])


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> list[Tensor]:
    return [torch.ops.bomkern.active_units_triton_backward(*grads[:2], *ctx.saved_tensors)]


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(mu: Tensor) -> Any:
        return reference.active_units(mu, *ctx.settings)

    return by_reference(ctx.saved_tensors[:1], results, grads, want)


_library = register(
    "active_units",
    ("(Tensor mu, float threshold, float temperature) -> (Tensor, Tensor, Tensor)", _forward, _allocate),
    ("(Tensor? grad_active, Tensor? grad_effective, Tensor mu, Tensor columns) -> Tensor", _backward, _new_grad),
    _save,
    _pull,
    _double_backward,
)


def active_units(mu: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute `bomkern.reference.active_units` by Triton kernels; same arguments and results, one read of mu."""
    active, effective, _ = torch.ops.bomkern.active_units_triton(mu, threshold, temperature)
    return active, effective
