"""Ops, fakes and autograd of `min_goal` by Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...common.checks import FLOATS, check_goals, check_params
from ...common.reductions import Reduction
from .launcher import guard, load
from .library import Aside, Grads, by_reference, register

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_SKIP = -1  # in `kinds`: the gradient is not wanted
_SCALAR = len(FLOATS)  # in `kinds`: added to the dtype's index of a 0-dim goal


def _allocate(
    goals: Sequence[Tensor], reduction: int, stats: bool, save: bool
) -> tuple[Outputs, int, int, torch.dtype]:
    """Allocate the outputs of `min_goal_triton`, empty if not requested; return them, B, K and the compute dtype."""
    batch, count, dtype = check_goals(goals)
    new = goals[0].new_empty
    saved = () if not save else (1,) if reduction == Reduction.MIN else (batch,)
    winner_dtype = torch.int64 if reduction == Reduction.MIN else torch.uint8
    outputs = (
        new((batch,) if reduction == Reduction.NONE else (), dtype=dtype),
        new(saved or (0,), dtype=winner_dtype),
        new(saved or (0,), dtype=dtype),
        new((batch if stats else 0,), dtype=torch.int64),
        new((count if stats else 0,), dtype=dtype),
        new((count if stats else 0,), dtype=dtype),
        new((), dtype=torch.bool),
    )
    return outputs, batch, count, dtype


def _forward(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, stats: bool, save: bool
) -> Outputs:
    outputs, batch, count, dtype = _allocate(goals, reduction, stats, save)
    check_params(params, curves, count, dtype, goals[0].device)
    kernels = load("min_goal", goals[0].device.type)
    with guard(goals[0]):
        kernels.launch_forward(
            goals,
            None if params is None else params.contiguous(),
            curves,
            reduction,
            stats,
            save,
            batch,
            count,
            dtype,
            outputs,
        )
    return outputs


def _forward_fake(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, stats: bool, save: bool
) -> Outputs:
    outputs, _, count, dtype = _allocate(goals, reduction, stats, save)
    check_params(params, curves, count, dtype, goals[0].device)
    return outputs


def _new_grads(slope: Tensor, kinds: Sequence[int], batch: int, columns: int) -> list[Tensor | None]:
    """Allocate a gradient per goal, None if not wanted. ``columns`` is 0 unless goals is one [B, K] tensor."""
    grads: list[Tensor | None] = []
    for kind in kinds:
        shape = () if kind >= _SCALAR else (batch, columns) if columns else (batch,)
        grads.append(None if kind == _SKIP else slope.new_empty(shape, dtype=FLOATS[kind % _SCALAR]))
    return grads


def _backward(
    grad: Tensor, winner: Tensor, slope: Tensor, kinds: Sequence[int], reduction: int, batch: int, columns: int
) -> list[Tensor]:
    grads = _new_grads(slope, kinds, batch, columns)
    kernels = load("min_goal", slope.device.type)
    with guard(slope):
        kernels.launch_backward(grads, grad, winner, slope, reduction, batch, columns or len(kinds))
    return [g for g in grads if g is not None]


def _backward_fake(
    grad: Tensor, winner: Tensor, slope: Tensor, kinds: Sequence[int], reduction: int, batch: int, columns: int
) -> list[Tensor]:
    return [g for g in _new_grads(slope, kinds, batch, columns) if g is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    goals, params, ctx.curves, ctx.reduction, _, ctx.saved = inputs
    _, winner, slope, _, share, level, _ = output
    ctx.mark_non_differentiable(slope, share, level)
    ctx.batch, ctx.count, _ = check_goals(goals)
    ctx.rows = len(goals) == 1 and goals[0].dim() == 2
    ctx.kinds = [FLOATS.index(g.dtype) + (_SCALAR if g.dim() == 0 else 0) for g in goals]
    ctx.save_for_backward(winner, slope)
    ctx.given = Aside.keep(*goals, params) if ctx.saved else None


def _saved(ctx: Any) -> tuple[Tensor, Tensor]:
    """Return winner and slope. Raises RuntimeError if they were not saved, or if a backward has freed them."""
    if not ctx.saved:
        raise RuntimeError("bomkern::min_goal_triton was called with save=False, so it has no gradient.")
    winner, slope = ctx.saved_tensors
    return winner, slope


def _pull(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    winner, slope = _saved(ctx)
    kinds = [kind if wanted else _SKIP for kind, wanted in zip(ctx.kinds, want, strict=True)]
    computed = iter(
        torch.ops.bomkern.min_goal_triton_backward(
            grads[0], winner, slope, kinds, ctx.reduction, ctx.batch, ctx.count if ctx.rows else 0
        )
    )
    return [next(computed) if wanted else None for wanted in want]


def _double_backward(ctx: Any, grads: Grads, want: list[bool]) -> Grads:
    _saved(ctx)
    *goals, params = Aside.kept(ctx.given)

    def results(*goals: Tensor) -> Any:
        return reference.min_goal(goals, params, ctx.curves, ctx.reduction, False)[0]

    return by_reference(goals, results, grads[:1], want)


_library = register(
    "min_goal",
    (
        "(Tensor[] goals, Tensor? params, int[] curves, int reduction, bool stats, bool save)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _forward_fake,
    ),
    (
        "(Tensor grad, Tensor winner, Tensor slope, int[] kinds, int reduction, SymInt batch, int columns) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    _save,
    _pull,
    _double_backward,
)


def min_goal(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, stats: bool
) -> tuple[Tensor, ...]:
    """Compute `bomkern.reference.min_goal` by Triton kernels; same arguments and results, no stack of the inputs."""
    save = torch.is_grad_enabled() and any(g.requires_grad for g in goals)
    loss, _, _, *rest = torch.ops.bomkern.min_goal_triton(list(goals), params, list(curves), reduction, stats, save)
    return (loss, *rest) if stats else (loss,)
