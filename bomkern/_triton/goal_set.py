"""Ops, fakes and autograd of `goal_set` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._check import FLOATS, check_goals, check_groups, check_multipliers, check_params, check_temperature
from .._ops import record_size
from ..reference import NONE
from . import guard, load
from ._library import Grads, register

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _allocate(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None,
    save: bool,
) -> Outputs:
    """Fresh loss, bottleneck, record and weight, the last with no elements unless it is to be saved."""
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    new = params.new_empty
    return (
        new((batch,) if reduction == NONE else ()),
        new((batch,), dtype=torch.int64),
        new((record_size(groups[-1] + 1, count),)),
        new((count, batch) if save else (0,)),
    )


def _forward(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None,
    save: bool,
) -> Outputs:
    out = _allocate(goals, params, curves, groups, temperature, reduction, multipliers, save)
    kernels = load("goal_set", params.device.type)
    with guard(params):
        kernels.launch_forward(
            goals,
            params.contiguous(),
            curves,
            groups,
            temperature,
            reduction,
            None if multipliers is None else multipliers.contiguous(),
            kernels.Outputs(*out),
        )
    return out


def _new_grads(
    grad: Tensor, weight: Tensor, index: Sequence[int], dim: Sequence[int], dtype: Sequence[int]
) -> list[Tensor]:
    """For each gradient wanted: index of its goal, dim of that tensor (2: the [B, K] matrix), place of its dtype."""
    count, batch = weight.shape
    shapes: dict[int, tuple[int, ...]] = {0: (), 1: (batch,), 2: (batch, count)}
    return [weight.new_empty(shapes[d], dtype=FLOATS[t]) for d, t in zip(dim, dtype, strict=True)]


def _backward(
    grad: Tensor, weight: Tensor, index: Sequence[int], dim: Sequence[int], dtype: Sequence[int]
) -> list[Tensor]:
    made = _new_grads(grad, weight, index, dim, dtype)
    grads: list[Tensor | None] = [None] * weight.shape[0]
    for k, g in zip(index, made, strict=True):
        grads[k] = g
    kernels = load("goal_set", weight.device.type)
    with guard(weight):
        kernels.launch_backward(grads, grad, weight)
    return made


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    goals, *_, ctx.saved = inputs
    # Not weight: the gradient depends on the goals through it, and so a second backward is told that there is none.
    ctx.mark_non_differentiable(output[2])
    ctx.dim = [g.dim() for g in goals]
    ctx.dtype = [FLOATS.index(g.dtype) for g in goals]
    ctx.save_for_backward(output[3])


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    if not ctx.saved:
        raise RuntimeError("bomkern::goal_set_triton was called with save=False, so it has no gradient.")
    index = [k for k, wanted in enumerate(want) if wanted]
    dim, dtype = [ctx.dim[k] for k in index], [ctx.dtype[k] for k in index]
    made = iter(torch.ops.bomkern.goal_set_triton_backward(grads[0], *ctx.saved_tensors, index, dim, dtype))
    return [next(made) if wanted else None for wanted in want]


_library = register(
    "goal_set",
    (
        "(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, int reduction,"
        " Tensor? multipliers, bool save)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _allocate,
    ),
    (
        "(Tensor grad, Tensor weight, int[] index, int[] dim, int[] dtype) -> Tensor[]",
        _backward,
        _new_grads,
    ),
    _save,
    _pull,
)


def goal_set(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bomkern.reference.goal_set` by Triton kernels: same arguments, same results, no stack of the inputs."""
    save = torch.is_grad_enabled() and any(g.requires_grad for g in goals)
    loss, bottleneck, record, _ = torch.ops.bomkern.goal_set_triton(
        list(goals), params, list(curves), list(groups), temperature, reduction, multipliers, save
    )
    return loss, bottleneck, record
