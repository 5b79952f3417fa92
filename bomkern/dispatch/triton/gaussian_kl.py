"""Ops, fakes and autograd of `gaussian_kl` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import check_matrices, check_prior
from .launcher import guard, load
from .library import Grads, by_reference, register


def _allocate(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    batch, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    check_prior(dims, block_size, rho)
    return mu.new_empty((batch,), dtype=dtype)


def _forward(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    out = _allocate(mu, logvar, block_size, rho)
    kernels = load("gaussian_kl", mu.device.type)
    with guard(mu):
        kernels.launch_forward(mu, logvar, block_size, rho, out)
    return out


def _new_grads(
    grad: Tensor, mu: Tensor, logvar: Tensor, block_size: int, rho: float, want: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """A contiguous gradient of each, with no elements where not wanted."""
    return mu.new_empty(mu.shape if want[0] else (0,)), logvar.new_empty(logvar.shape if want[1] else (0,))


def _backward(
    grad: Tensor, mu: Tensor, logvar: Tensor, block_size: int, rho: float, want: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    grads = _new_grads(grad, mu, logvar, block_size, rho, want)
    kernels = load("gaussian_kl", mu.device.type)
    with guard(mu):
        kernels.launch_backward(grad, mu, logvar, block_size, rho, grads, want)
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mu, logvar, *ctx.settings = inputs
    ctx.save_for_backward(mu, logvar)


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    made: Grads = torch.ops.bomkern.gaussian_kl_triton_backward(grads[0], *ctx.saved_tensors, *ctx.settings, want)
    return made


def _again(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(mu: Tensor, logvar: Tensor) -> Any:
        return reference.gaussian_kl(mu, logvar, *ctx.settings)

    return by_reference(ctx.saved_tensors, results, grads, want)


_library = register(
    "gaussian_kl",
    ("(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor", _forward, _allocate),
    (
        "(Tensor grad, Tensor mu, Tensor logvar, int block_size, float rho, bool[2] want) -> (Tensor, Tensor)",
        _backward,
        _new_grads,
    ),
    _save,
    _pull,
    _again,
)


def gaussian_kl(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    """`bomkern.reference.gaussian_kl` by Triton kernels: same arguments, same results, one launch each way."""
    made: Tensor = torch.ops.bomkern.gaussian_kl_triton(mu, logvar, block_size, rho)
    return made
