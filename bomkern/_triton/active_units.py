"""Ops, fakes and autograd of `active_units` by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import check_matrices, check_units
from . import guard, load
from ._library import register

Three = tuple[Tensor, Tensor, Tensor]


def _allocate(mu: Tensor, threshold: float, temperature: float) -> Three:
    """Fresh outputs: active, effective, and what backward needs of each column, [4, D]."""
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
    return mu.new_empty(mu.shape)


def _backward(grad_active: Tensor | None, grad_effective: Tensor | None, mu: Tensor, columns: Tensor) -> Tensor:
    grad_mu = _new_grad(grad_active, grad_effective, mu, columns)
    kernels = load("active_units", mu.device.type)
    with guard(mu):
        kernels.launch_backward(grad_active, grad_effective, mu, columns, grad_mu)
    return grad_mu


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[2])


def _pull_back(ctx: Any, active: Tensor | None, effective: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if (active is None and effective is None) or not ctx.needs_input_grad[0]:
        return (None,) * 3
    return torch.ops.bomkern.active_units_triton_backward(active, effective, *ctx.saved_tensors), None, None


_library = register(
    "active_units",
    ("(Tensor mu, float threshold, float temperature) -> (Tensor, Tensor, Tensor)", _forward, _allocate),
    ("(Tensor? grad_active, Tensor? grad_effective, Tensor mu, Tensor columns) -> Tensor", _backward, _new_grad),
    _save,
    _pull_back,
)


def active_units(mu: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """`bomkern.reference.active_units` by Triton kernels: same arguments, same results, one read of mu."""
    active, effective, _ = torch.ops.bomkern.active_units_triton(mu, threshold, temperature)
    return active, effective
