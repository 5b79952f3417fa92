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
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _allocate(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    parts: bool = False,
) -> Four:
    """Allocate the result [R], log q [R], and for backward the joint [2, R] and the marginals [2, D, R].

    Without ``parts`` log q has no elements.
    """
    batch, dims, dtype = check_rows(z, mu, logvar, first)
    check_estimator(batch, dataset_size, stratified)
    rows = z.shape[0]
    shapes: tuple[tuple[int, ...], ...] = ((rows,), (2, rows), (2, dims, rows))
    out, joint, marginal = (z.new_empty(shape, dtype=dtype) for shape in shapes)
    log_q = z.new_empty((rows if parts else 0,), dtype=torch.float64)
    return out, log_q, joint, marginal


def _forward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    parts: bool = False,
) -> Four:
    out, log_q, joint, marginal = _allocate(z, mu, logvar, dataset_size, stratified, first, parts)
    kernels = load("total_correlation", z.device.type)
    with guard(z):
        kernels.launch_forward(
            z, mu, logvar, dataset_size, stratified, first or 0, out, log_q if parts else None, joint, marginal
        )
    return out, log_q, joint, marginal


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
    grad_log_q: Tensor | None = None,
) -> Three:
    kernels = load("total_correlation", z.device.type)
    with guard(z):
        out = kernels.launch_backward(
            grad, grad_log_q, z, mu, logvar, joint, marginal, dataset_size, stratified, first or 0, want
        )
    grad_z, grad_mu, grad_logvar = (
        x.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(out, (z, mu, logvar), strict=True)
    )
    return grad_z, grad_mu, grad_logvar


def _save(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    z, mu, logvar, *ctx.settings, parts = inputs
    _, log_q, joint, marginal = output
    ctx.mark_non_differentiable(joint, marginal, *([] if parts else [log_q]))
    ctx.save_for_backward(z, mu, logvar, joint, marginal)


def _gradients(grads: Grads, joint: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the result, zeros if it has none, and of log q."""
    grad, grad_log_q, *_ = grads
    return (joint.new_zeros(()).expand(joint.shape[1]) if grad is None else grad), grad_log_q


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Three:
    grad, grad_log_q = _gradients(grads, ctx.saved_tensors[3])
    out: Three = torch.ops.bomkern.total_correlation_triton_backward(
        grad, *ctx.saved_tensors, *ctx.settings, want, grad_log_q
    )
    return out


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    z, mu, logvar, joint, _ = ctx.saved_tensors
    grad, grad_log_q = _gradients(grads, joint)
    size, stratified, first = ctx.settings
    return reference.total_correlation_gradients(grad, z, mu, logvar, size, stratified, first, grad_log_q)


_library = register(
    "total_correlation",
    (
        "(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified, int? first=None, bool parts=False)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _allocate,
    ),
    (
        "(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginal, int? dataset_size,"
        " bool stratified, int? first, bool[3] want, Tensor? grad_log_q=None) -> (Tensor, Tensor, Tensor)",
        _backward,
        fakes.total_correlation_backward,
    ),
    _save,
    _pull,
    _double_backward,
)


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    *,
    parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `bomkern.reference.total_correlation` by Triton kernels; same arguments and results, memory O(B D)."""
    op = torch.ops.bomkern.total_correlation_triton
    out, log_q, *_ = op(z, mu, logvar, dataset_size, stratified, first, parts)
    return (out, log_q) if parts else out
