"""Ops, fakes and autograd of `total_correlation` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import check_estimator, check_rows
from .. import fakes
from .launcher import guard, load
from .library import Grads, register

Three = tuple[Tensor, Tensor, Tensor]


def _allocate(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, first: int | None = None
) -> Three:
    """Allocate the outputs: the result [R], and for backward the joint [2, R] and the marginals [2, D, R]."""
    batch, dims, dtype = check_rows(z, mu, logvar, first)
    check_estimator(batch, dataset_size, stratified)
    rows = z.shape[0]
    shapes: tuple[tuple[int, ...], ...] = ((rows,), (2, rows), (2, dims, rows))
    out, joint, marginal = (z.new_empty(shape, dtype=dtype) for shape in shapes)
    return out, joint, marginal


def _forward(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, first: int | None = None
) -> Three:
    outputs = _allocate(z, mu, logvar, dataset_size, stratified, first)
    kernels = load("total_correlation", z.device.type)
    with guard(z):
        kernels.launch_forward(z, mu, logvar, dataset_size, stratified, first or 0, *outputs)
    return outputs


def _backward(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginal: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None,
    want: Sequence[bool],
) -> Three:
    kernels = load("total_correlation", z.device.type)
    with guard(z):
        out = kernels.launch_backward(grad, z, mu, logvar, joint, marginal, dataset_size, stratified, first or 0, want)
    grad_z, grad_mu, grad_logvar = (
        x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(out, (z, mu, logvar), strict=True)
    )
    return grad_z, grad_mu, grad_logvar


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    z, mu, logvar, *ctx.settings = inputs
    _, joint, marginal = output
    ctx.mark_non_differentiable(joint, marginal)
    ctx.save_for_backward(z, mu, logvar, joint, marginal)


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Three:
    out: Three = torch.ops.bomkern.total_correlation_triton_backward(grads[0], *ctx.saved_tensors, *ctx.settings, want)
    return out


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    (grad, *_), (z, mu, logvar, *_) = grads, ctx.saved_tensors
    assert grad is not None  # it is the gradient of the only differentiable result
    return reference.total_correlation_gradients(grad, z, mu, logvar, *ctx.settings)


_library = register(
    "total_correlation",
    (
        "(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified, int? first=None)"
        " -> (Tensor, Tensor, Tensor)",
        _forward,
        _allocate,
    ),
    (
        "(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginal, int? dataset_size,"
        " bool stratified, int? first, bool[3] want) -> (Tensor, Tensor, Tensor)",
        _backward,
        fakes.total_correlation_backward,
    ),
    _save,
    _pull,
    _double_backward,
)


def total_correlation(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, first: int | None = None
) -> Tensor:
    """Compute `bomkern.reference.total_correlation` by Triton kernels; same arguments and results, memory O(B D)."""
    out: Tensor = torch.ops.bomkern.total_correlation_triton(z, mu, logvar, dataset_size, stratified, first)[0]
    return out
