"""Ops, fakes and autograd of `goal_set` by Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import FLOATS
from .. import fakes
from .launcher import guard, load
from .library import Aside, Grads, by_reference, register


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *before, present, counts, save = arguments
    made: Callable[..., tuple[Tensor, ...]] = fakes.goal_set
    return made(*before, save, present=present, counts=counts)


def _forward(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None,
    present: Tensor | None,
    counts: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    out = _fake(goals, params, curves, groups, temperature, reduction, multipliers, present, counts, save)
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
            None if present is None else present.contiguous(),
            None if counts is None else counts.contiguous(),
            kernels.Outputs(*out),
        )
    return out


def _backward(
    grad: Tensor, weight: Tensor, index: Sequence[int], dim: Sequence[int], dtype: Sequence[int]
) -> list[Tensor]:
    wanted = fakes.goal_set_backward(grad, weight, index, dim, dtype)
    grads: list[Tensor | None] = [None] * weight.shape[0]
    for k, g in zip(index, wanted, strict=True):
        grads[k] = g
    kernels = load("goal_set", weight.device.type)
    with guard(weight):
        kernels.launch_backward(grads, grad, weight)
    return wanted


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    goals, params, ctx.curves, ctx.groups, temperature, ctx.reduction, multipliers, present, counts, ctx.saved = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.dim = [g.dim() for g in goals]
    ctx.dtype = [FLOATS.index(g.dtype) for g in goals]
    ctx.save_for_backward(output[3])
    if ctx.saved:
        # Copies, because a GoalSet changes them in place after its forward, before a second derivative.
        settings = [params.reshape(-1), temperature.reshape(1)]
        settings += [x for x in (multipliers, counts) if x is not None]
        ctx.weighed = multipliers is not None
        ctx.given = Aside.keep(*goals, present, torch.cat(settings))


def _saved(ctx: Any) -> Tensor:
    """Return weight. Raises RuntimeError if it was not saved, or if a backward has freed it."""
    if not ctx.saved:
        raise RuntimeError("bomkern::goal_set_triton was called with save=False, so it has no gradient.")
    weight: Tensor = ctx.saved_tensors[0]
    return weight


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    weight = _saved(ctx)
    index = [k for k, wanted in enumerate(want) if wanted]
    dim, dtype = [ctx.dim[k] for k in index], [ctx.dtype[k] for k in index]
    computed = iter(torch.ops.bomkern.goal_set_triton_backward(grads[0], weight, index, dim, dtype))
    return [next(computed) if wanted else None for wanted in want]


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    _saved(ctx)
    *goals, present, settings = Aside.kept(ctx.given)
    columns = len(ctx.curves)
    weights = ctx.groups[-1] + 1 if ctx.weighed else 0
    sizes = [4 * columns, 1, weights]
    params, temperature, multipliers, counts = settings.split([*sizes, len(settings) - sum(sizes)])

    def results(*goals: Tensor) -> Any:
        rest = [multipliers if ctx.weighed else None, present, None if present is None else counts]
        before = [params.view(columns, 4), ctx.curves, ctx.groups, temperature[0], ctx.reduction]
        return reference.goal_set(goals, *before, *rest)[0]

    return by_reference(goals, results, grads[:1], want)


_library = register(
    "goal_set",
    (
        "(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, int reduction,"
        " Tensor? multipliers, Tensor? present, Tensor? counts, bool save)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _fake,
    ),
    (
        "(Tensor grad, Tensor weight, int[] index, int[] dim, int[] dtype) -> Tensor[]",
        _backward,
        fakes.goal_set_backward,
    ),
    _save,
    _pull,
    _double_backward,
)


def goal_set(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None = None,
    present: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `bomkern.reference.goal_set` by Triton kernels; same arguments and results, no stack of the inputs."""
    save = torch.is_grad_enabled() and any(g.requires_grad for g in goals)
    loss, bottleneck, record, _ = torch.ops.bomkern.goal_set_triton(
        list(goals), params, list(curves), list(groups), temperature, reduction, multipliers, present, counts, save
    )
    return loss, bottleneck, record
