"""Ops, fakes and autograd of `latent_statistics` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import check_latents, check_units
from .. import fakes
from .launcher import guard, load
from .library import Grads, by_reference, register

Three = tuple[Tensor, Tensor, Tensor]
FIELDS = 9  # fields of `bomkern.LatentStatistics`


def _allocate(z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float) -> tuple[Tensor, ...]:
    """Allocate the outputs: the fields, then four numbers per column for backward, [4, D]."""
    batch, dims, dtype = check_latents(z, mu, logvar, least=2)
    check_units(threshold, temperature)
    shapes: tuple[tuple[int, ...], ...] = (*[(batch,)] * 3, *[(dims,)] * 4, (), (), (4, dims))
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


def _forward(z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float) -> tuple[Tensor, ...]:
    outputs = _allocate(z, mu, logvar, threshold, temperature)
    kernels = load("latent_statistics", z.device.type)
    with guard(z):
        kernels.launch_forward(z, mu, logvar, threshold, temperature, outputs)
    return outputs


def _new_grads(
    grads: Sequence[Tensor | None], z: Tensor, mu: Tensor, logvar: Tensor, columns: Tensor, want: Sequence[bool]
) -> Three:
    first, second, third = (fakes.gradient_of(x, wanted) for x, wanted in zip((z, mu, logvar), want, strict=True))
    return first, second, third


def _backward(
    grads: Sequence[Tensor | None], z: Tensor, mu: Tensor, logvar: Tensor, columns: Tensor, want: Sequence[bool]
) -> Three:
    out = _new_grads(grads, z, mu, logvar, columns, want)
    grads = [g if g is None else g.resolve_neg() for g in grads]  # the dispatcher does not do it in a list of optionals
    kernels = load("latent_statistics", z.device.type)
    with guard(z):
        kernels.launch_backward(grads, z, mu, logvar, columns, out, want)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *latents, ctx.threshold, ctx.temperature = inputs
    ctx.mark_non_differentiable(output[FIELDS])
    ctx.save_for_backward(*latents, output[FIELDS])


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Three:
    fields = list(grads[:FIELDS])
    out: Three = torch.ops.bomkern.latent_statistics_triton_backward(fields, *ctx.saved_tensors, want)
    return out


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    def results(z: Tensor, mu: Tensor, logvar: Tensor) -> Any:
        return reference.latent_statistics(z, mu, logvar, ctx.threshold, ctx.temperature)

    return by_reference(ctx.saved_tensors[:3], results, grads, want)


_library = register(
    "latent_statistics",
    (
        f"(Tensor z, Tensor mu, Tensor logvar, float threshold, float temperature) -> ({', '.join(['Tensor'] * 10)})",
        _forward,
        _allocate,
    ),
    (
        "(Tensor?[] grads, Tensor z, Tensor mu, Tensor logvar, Tensor columns, bool[3] want)"
        " -> (Tensor, Tensor, Tensor)",
        _backward,
        _new_grads,
    ),
    _save,
    _pull,
    _double_backward,
)


def latent_statistics(
    z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, ...]:
    """Compute `bomkern.reference.latent_statistics` by Triton kernels, with one read of each input."""
    out: tuple[Tensor, ...] = torch.ops.bomkern.latent_statistics_triton(z, mu, logvar, threshold, temperature)
    return out[:FIELDS]
