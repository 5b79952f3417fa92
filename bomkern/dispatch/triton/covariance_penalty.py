"""Ops, fakes and autograd of `covariance_penalty` by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import check_matrices
from .. import fakes
from .launcher import guard, load
from .library import Grads, by_reference, register

Three = tuple[Tensor, Tensor, Tensor]


def _allocate(z: Tensor, normalize: bool, per_sample: bool, save: bool) -> Three:
    """Allocate the outputs: the result, a matrix for backward with ``save``, and three numbers per column, [3, D]."""
    batch, dims, dtype = check_matrices(2, z=z)
    saved = (0,) if not save else (batch, batch) if dims > batch else (batch if per_sample else dims, dims)
    shapes: tuple[tuple[int, ...], ...] = ((batch,) if per_sample else (), saved, (3, dims))
    out, matrix, columns = (z.new_empty(shape, dtype=dtype) for shape in shapes)
    return out, matrix, columns


def _forward(z: Tensor, normalize: bool, per_sample: bool, save: bool) -> Three:
    out, empty, columns = _allocate(z, normalize, per_sample, False)  # the matrix comes from a product
    kernels = load("covariance_penalty", z.device.type)
    with guard(z):
        matrix = kernels.launch_forward(z, normalize, per_sample, save, out, columns)
    return out, empty if matrix is None else matrix, columns


def _new_grad(grad: Tensor, z: Tensor, matrix: Tensor, columns: Tensor, normalize: bool, per_sample: bool) -> Tensor:
    return fakes.gradient_of(z)


def _backward(grad: Tensor, z: Tensor, matrix: Tensor, columns: Tensor, normalize: bool, per_sample: bool) -> Tensor:
    grad_z = _new_grad(grad, z, matrix, columns, normalize, per_sample)
    kernels = load("covariance_penalty", z.device.type)
    with guard(z):
        kernels.launch_backward(grad, z, matrix, columns, normalize, per_sample, grad_z)
    return grad_z


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    z, *ctx.settings, ctx.saved = inputs
    _, matrix, columns = output
    ctx.mark_non_differentiable(matrix, columns)
    ctx.save_for_backward(z, matrix, columns)


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> list[Tensor]:
    if not ctx.saved:
        raise RuntimeError("bomkern::covariance_penalty_triton was called with save=False, so it has no gradient.")
    return [torch.ops.bomkern.covariance_penalty_triton_backward(grads[0], *ctx.saved_tensors, *ctx.settings)]


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(z: Tensor) -> Any:
        return reference.covariance_penalty(z, *ctx.settings)

    return by_reference(ctx.saved_tensors[:1], results, grads, want)


_library = register(
    "covariance_penalty",
    (
        "(Tensor z, bool normalize, bool per_sample, bool save) -> (Tensor, Tensor, Tensor)",
        _forward,
        _allocate,
    ),
    (
        "(Tensor grad, Tensor z, Tensor matrix, Tensor columns, bool normalize, bool per_sample) -> Tensor",
        _backward,
        _new_grad,
    ),
    _save,
    _pull,
    _double_backward,
)


def covariance_penalty(z: Tensor, normalize: bool, per_sample: bool) -> Tensor:
    """Compute `bomkern.reference.covariance_penalty` by Triton kernels around a library's matrix products."""
    save = torch.is_grad_enabled() and z.requires_grad
    out: Tensor = torch.ops.bomkern.covariance_penalty_triton(z, normalize, per_sample, save)[0]
    return out
