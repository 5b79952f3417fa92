"""Every op's schema and fake kernel, on one page. csrc/NAME.cpp registers what runs.

A fake kernel gives shapes and dtypes without data, for torch.compile, torch.export and FakeTensorMode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import FLOATS, check_estimator, check_goals, check_latents, check_params

_library = torch.library.Library("bomkern", "DEF")

# reduction: 0 none, 1 mean, 2 sum, 3 min. winner, slope: what backward needs. curves: see constraints.py.
_library.define(
    "min_goal(Tensor[] goals, Tensor? params, int[] curves, int reduction) -> "
    "(Tensor loss, Tensor winner, Tensor slope)"
)
_library.define(
    "min_goal.stats(Tensor[] goals, Tensor? params, int[] curves, int reduction) -> "
    "(Tensor loss, Tensor winner, Tensor slope, Tensor bottleneck, Tensor share, Tensor level, Tensor finite)"
)
# For each gradient wanted: index of its goal, dim of that tensor (2: the [B, K] matrix), place of its dtype in FLOATS.
_library.define(
    "min_goal_backward(Tensor grad, Tensor winner, Tensor slope, SymInt batch, int goals, int[] index, int[] dim, "
    "int[] dtype, int reduction) -> Tensor[]"
)

# joint [B], marginal [D, B]: what backward needs, in an implementation's own units. dataset_size None: plain 1/B.
_library.define(
    "total_correlation(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified) -> "
    "(Tensor out, Tensor joint, Tensor marginal)"
)
# want: which of the gradients of z, mu and logvar to make; the others come back with no elements.
_library.define(
    "total_correlation_backward(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginal, "
    "int? dataset_size, bool stratified, bool[3] want) -> (Tensor, Tensor, Tensor)"
)

OPS = (
    *("min_goal", "min_goal.stats", "min_goal_backward"),
    *("total_correlation", "total_correlation_backward"),
)
MIN = 3


@torch.library.register_fake("bomkern::min_goal", lib=_library)
def _(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    like = goals[0]
    rows = 1 if reduction == MIN else batch
    loss = like.new_empty([batch] if reduction == 0 else [], dtype=dtype)
    winner = like.new_empty([rows], dtype=torch.int64 if reduction == MIN else torch.uint8)
    return loss, winner, like.new_empty([rows], dtype=dtype)


@torch.library.register_fake("bomkern::min_goal.stats", lib=_library)
def _(goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int) -> tuple[Tensor, ...]:
    first = torch.ops.bomkern.min_goal.default(goals, params, curves, reduction)
    batch, count, dtype = check_goals(goals)
    like = goals[0]
    bottleneck = like.new_empty([batch], dtype=torch.int64)
    share, level = like.new_empty([count], dtype=dtype), like.new_empty([count], dtype=dtype)
    return *first, bottleneck, share, level, like.new_empty([], dtype=torch.bool)


@torch.library.register_fake("bomkern::min_goal_backward", lib=_library)
def _(
    grad: Tensor,
    winner: Tensor,
    slope: Tensor,
    batch: int,
    goals: int,
    index: Sequence[int],
    dim: Sequence[int],
    dtype: Sequence[int],
    reduction: int,
) -> list[Tensor]:
    shapes: dict[int, list[int]] = {0: [], 1: [batch], 2: [batch, goals]}
    return [slope.new_empty(shapes[d], dtype=FLOATS[t]) for d, t in zip(dim, dtype, strict=True)]


@torch.library.register_fake("bomkern::total_correlation", lib=_library)
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dims, dtype = check_latents(z, mu, logvar)
    check_estimator(batch, dataset_size, stratified)
    return (
        z.new_empty([batch], dtype=dtype),
        z.new_empty([batch], dtype=dtype),
        z.new_empty([dims, batch], dtype=dtype),
    )


@torch.library.register_fake("bomkern::total_correlation_backward", lib=_library)
def _(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginal: Tensor,
    dataset_size: int | None,
    stratified: bool,
    want: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = (z, mu, logvar)
    return tuple(x.new_empty(x.shape if w else [0]) for x, w in zip(inputs, want, strict=True))
