"""Ops, fakes and autograd of `gaussian_kl` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from .. import fakes
from .launcher import guard, load
from .library import Grads, by_reference, register


def _forward(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    out = fakes.gaussian_kl(mu, logvar, block_size, rho)
    kernels = load("gaussian_kl", mu.device.type)
    with guard(mu):
        kernels.launch_forward(mu, logvar, block_size, rho, out)
    return out


def _backward(
    grad: Tensor, mu: Tensor, logvar: Tensor, block_size: int, rho: float, want: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    grads = fakes.gaussian_kl_backward(grad, mu, logvar, block_size, rho, want)
    kernels = load("gaussian_kl", mu.device.type)
    with guard(mu):
        kernels.launch_backward(grad, mu, logvar, block_size, rho, grads, want)
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mu, logvar, *ctx.settings = inputs
    ctx.save_for_backward(mu, logvar)


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    out: Grads = torch.ops.bomkern.gaussian_kl_triton_backward(grads[0], *ctx.saved_tensors, *ctx.settings, want)
    return out


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(mu: Tensor, logvar: Tensor) -> Any:
        return reference.gaussian_kl(mu, logvar, *ctx.settings)

    return by_reference(ctx.saved_tensors, results, grads, want)


_library = register(
    "gaussian_kl",
    ("(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor", _forward, fakes.gaussian_kl),
    (
        "(Tensor grad, Tensor mu, Tensor logvar, int block_size, float rho, bool[2] want) -> (Tensor, Tensor)",
        _backward,
        fakes.gaussian_kl_backward,
    ),
    _save,
    _pull,
    _double_backward,
)


def gaussian_kl(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    """Compute `bomkern.reference.gaussian_kl` by Triton kernels; same arguments and results, one launch each way."""
    out: Tensor = torch.ops.bomkern.gaussian_kl_triton(mu, logvar, block_size, rho)
    return out
