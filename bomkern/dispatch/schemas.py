"""Every op's schema and fake kernel, on one page. csrc/NAME.cpp registers what runs.

A fake kernel gives shapes and dtypes without data, for torch.compile, torch.export and FakeTensorMode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import (
    FLOATS,
    check_estimator,
    check_goals,
    check_groups,
    check_latents,
    check_matrices,
    check_multipliers,
    check_params,
    check_prior,
    check_rows,
    check_temperature,
    check_units,
    check_views,
)
from ..common.decorators import fake
from ..common.reductions import Reduction
from ..reference import RecordAt

_library = torch.library.Library("bomkern", "DEF")


# reduction: see common/reductions.py. winner, slope: what backward needs. curves: see constraints.py. route: bit k
# where the gradient of goal k may be undefined instead of zero, see dispatch/routing.py.
_library.define(
    "min_goal(Tensor[] goals, Tensor? params, int[] curves, int reduction, int route=0) -> "
    "(Tensor loss, Tensor winner, Tensor slope)"
)
_library.define(
    "min_goal.stats(Tensor[] goals, Tensor? params, int[] curves, int reduction, int route=0) -> "
    "(Tensor loss, Tensor winner, Tensor slope, Tensor bottleneck, Tensor share, Tensor level, Tensor finite)"
)
# For each gradient wanted: index of its goal, dim of that tensor (2: the [B, K] matrix), place of its dtype in FLOATS.
_library.define(
    "min_goal_backward(Tensor grad, Tensor winner, Tensor slope, SymInt batch, int goals, int[] index, int[] dim, "
    "int[] dtype, int reduction) -> Tensor[]"
)

# groups: the goal of each column, counting up. multipliers [G]: weights given, instead of a rule. record: see
# reference/record.py. weight [K, B]: d loss / d column, where save, else no elements.
_library.define(
    "goal_set(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, int reduction, "
    "Tensor? multipliers=None, bool save=False, int route=0) -> "
    "(Tensor loss, Tensor bottleneck, Tensor record, Tensor weight)"
)
# index, dim, dtype: as in min_goal_backward.
_library.define("goal_set_backward(Tensor grad, Tensor weight, int[] index, int[] dim, int[] dtype) -> Tensor[]")

# What a step leaves behind, in place, without a host sync: its record in row ``place % rows`` of the ring, one more in
# place [1] int64; with spill (average, multipliers, average_before, multipliers_before), [G] each, the moving average
# of the goals' deficits and their weights by rank, and what both were before.
_library.define(
    "goal_set_keep(Tensor record, Tensor(a!) ring, Tensor(b!) place, Tensor? deficit, Tensor? by_rank, float rate, "
    "Tensor(c!)[] spill) -> ()"
)

# A record is about to be put into the ring of the monitor with this handle: what its host does of it, see history.py.
# A CUDA graph cannot replay what a host does: Inductor calls an op with this tag between its graphs.
_library.define("goal_set_notice(Tensor(a!) place, int handle) -> ()", tags=(torch.Tag.cudagraph_unsafe,))

# joint [R], marginal [D, R]: what backward needs, in an implementation's own units. dataset_size None: plain 1/B.
# first: z holds R rows of the batch, from that one on; None: all of them, R = B.
_library.define(
    "total_correlation(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified, int? first=None) -> "
    "(Tensor out, Tensor joint, Tensor marginal)"
)
# want: which of the gradients of z, mu and logvar to make; the others come back with no elements.
_library.define(
    "total_correlation_backward(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginal, "
    "int? dataset_size, bool stratified, int? first, bool[3] want) -> (Tensor, Tensor, Tensor)"
)

# block_size 1: the standard normal prior. want, here and below: which gradients to make; the others have no elements.
_library.define("gaussian_kl(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor")
_library.define(
    "gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar, int block_size, float rho, bool[2] want) -> "
    "(Tensor, Tensor)"
)

# views: one [V, B, D] tensor, or V tensors [B, D]; as many gradients as tensors.
_library.define("consistency_variance(Tensor[] views, float correction) -> Tensor")
_library.define("consistency_variance_backward(Tensor grad, Tensor[] views, float correction, bool[] want) -> Tensor[]")

# offset [D]: a column's mean minus its first value, which keeps the digits of the mean where it is far from 0.
_library.define(
    "active_units(Tensor mu, float threshold, float temperature) -> "
    "(Tensor active, Tensor effective, Tensor offset, Tensor variance)"
)
_library.define(
    "active_units_backward(Tensor? grad_active, Tensor? grad_effective, Tensor mu, Tensor offset, Tensor variance, "
    "float threshold, float temperature) -> Tensor"
)

_library.define(
    "latent_statistics(Tensor z, Tensor mu, Tensor logvar, float threshold, float temperature) -> "
    "(Tensor kl, Tensor logvar_mean, Tensor logvar_square, Tensor z_mean, Tensor z_variance, Tensor mu_mean, "
    "Tensor mu_variance, Tensor active, Tensor effective, Tensor z_offset, Tensor mu_offset)"
)
# grads: of the first nine results, in order.
_library.define(
    "latent_statistics_backward(Tensor?[] grads, Tensor z, Tensor mu, Tensor logvar, Tensor z_offset, "
    "Tensor mu_offset, Tensor mu_variance, float threshold, float temperature, bool[3] want) -> "
    "(Tensor, Tensor, Tensor)"
)

# x: the columns less their means, over their deviations if normalize. product [B, D]: x offdiag(C), where save and
# per_sample, else no elements. second: offdiag(C) [D, D], or x x' [B, B] where D > B. inverse [D]: 1 / deviation, 0 for
# a constant column; 1 without normalize.
_library.define(
    "covariance_penalty(Tensor z, bool normalize, bool per_sample, bool save=False) -> "
    "(Tensor out, Tensor product, Tensor second, Tensor offset, Tensor inverse)"
)
_library.define(
    "covariance_penalty_backward(Tensor grad, Tensor z, Tensor product, Tensor second, Tensor offset, Tensor inverse, "
    "bool normalize, bool per_sample) -> Tensor"
)

OPS = (
    *("min_goal", "min_goal.stats", "min_goal_backward"),
    *("goal_set", "goal_set_backward", "goal_set_keep"),
    *("total_correlation", "total_correlation_backward"),
    *("gaussian_kl", "gaussian_kl_backward"),
    *("consistency_variance", "consistency_variance_backward"),
    *("active_units", "active_units_backward"),
    *("latent_statistics", "latent_statistics_backward"),
    *("covariance_penalty", "covariance_penalty_backward"),
)


@fake("min_goal", _library)
def _(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, route: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    like = goals[0]
    rows = 1 if reduction == Reduction.MIN else batch
    loss = like.new_empty([batch] if reduction == Reduction.NONE else [], dtype=dtype)
    winner = like.new_empty([rows], dtype=torch.int64 if reduction == Reduction.MIN else torch.uint8)
    return loss, winner, like.new_empty([rows], dtype=dtype)


@fake("min_goal.stats", _library)
def _(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, route: int = 0
) -> tuple[Tensor, ...]:
    first = torch.ops.bomkern.min_goal.default(goals, params, curves, reduction)
    batch, count, dtype = check_goals(goals)
    like = goals[0]
    bottleneck = like.new_empty([batch], dtype=torch.int64)
    share, level = like.new_empty([count], dtype=dtype), like.new_empty([count], dtype=dtype)
    return *first, bottleneck, share, level, like.new_empty([], dtype=torch.bool)


@fake("min_goal_backward", _library)
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


@fake("goal_set", _library)
def _(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None = None,
    save: bool = False,
    route: int = 0,
) -> tuple[Tensor, ...]:
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    return (
        params.new_empty([batch] if reduction == Reduction.NONE else []),
        params.new_empty([batch], dtype=torch.int64),
        params.new_empty([RecordAt.of(groups[-1] + 1, count).size]),
        params.new_empty([count, batch] if save else [0]),
    )


@fake("goal_set_backward", _library)
def _(grad: Tensor, weight: Tensor, index: Sequence[int], dim: Sequence[int], dtype: Sequence[int]) -> list[Tensor]:
    count, batch = weight.shape
    shapes: dict[int, list[int]] = {0: [], 1: [batch], 2: [batch, count]}
    return [weight.new_empty(shapes[d], dtype=FLOATS[t]) for d, t in zip(dim, dtype, strict=True)]


@fake("goal_set_keep", _library)
def _(
    record: Tensor,
    ring: Tensor,
    place: Tensor,
    deficit: Tensor | None,
    by_rank: Tensor | None,
    rate: float,
    spill: Sequence[Tensor],
) -> None:
    pass


@fake("total_correlation", _library)
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dims, dtype = check_rows(z, mu, logvar, first)
    check_estimator(batch, dataset_size, stratified)
    rows = z.shape[0]
    return (
        z.new_empty([rows], dtype=dtype),
        z.new_empty([rows], dtype=dtype),
        z.new_empty([dims, rows], dtype=dtype),
    )


@fake("total_correlation_backward", _library)
def _(
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
) -> tuple[Tensor, ...]:
    inputs = (z, mu, logvar)
    return tuple(x.new_empty(x.shape if w else [0]) for x, w in zip(inputs, want, strict=True))


def _as(x: Tensor, wanted: bool = True) -> Tensor:
    """A gradient of x, contiguous, or no elements."""
    return x.new_empty(x.shape if wanted else [0])


@fake("gaussian_kl", _library)
def _(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    batch, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    check_prior(dims, block_size, rho)
    return mu.new_empty([batch], dtype=dtype)


@fake("gaussian_kl_backward", _library)
def _(
    grad: Tensor, mu: Tensor, logvar: Tensor, block_size: int, rho: float, want: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return _as(mu, want[0]), _as(logvar, want[1])


@fake("consistency_variance", _library)
def _(views: Sequence[Tensor], correction: float) -> Tensor:
    _, batch, _, dtype = check_views(views, correction)
    return views[0].new_empty([batch], dtype=dtype)


@fake("consistency_variance_backward", _library)
def _(grad: Tensor, views: Sequence[Tensor], correction: float, want: Sequence[bool]) -> list[Tensor]:
    return [_as(view, wanted) for view, wanted in zip(views, want, strict=True)]


@fake("active_units", _library)
def _(mu: Tensor, threshold: float, temperature: float) -> tuple[Tensor, ...]:
    _, dims, dtype = check_matrices(2, mu=mu)
    check_units(threshold, temperature)
    return tuple(mu.new_empty(shape, dtype=dtype) for shape in ([], [], [dims], [dims]))


@fake("active_units_backward", _library)
def _(
    grad_active: Tensor | None,
    grad_effective: Tensor | None,
    mu: Tensor,
    offset: Tensor,
    variance: Tensor,
    threshold: float,
    temperature: float,
) -> Tensor:
    return _as(mu)


@fake("latent_statistics", _library)
def _(z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float) -> tuple[Tensor, ...]:
    batch, dims, dtype = check_latents(z, mu, logvar, least=2)
    check_units(threshold, temperature)
    shapes: list[list[int]] = [*[[batch]] * 3, *[[dims]] * 4, [], [], [dims], [dims]]
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


@fake("latent_statistics_backward", _library)
def _(
    grads: Sequence[Tensor | None],
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    z_offset: Tensor,
    mu_offset: Tensor,
    mu_variance: Tensor,
    threshold: float,
    temperature: float,
    want: Sequence[bool],
) -> tuple[Tensor, ...]:
    return tuple(_as(x, w) for x, w in zip((z, mu, logvar), want, strict=True))


@fake("covariance_penalty", _library)
def _(z: Tensor, normalize: bool, per_sample: bool, save: bool = False) -> tuple[Tensor, ...]:
    batch, dims, dtype = check_matrices(2, z=z)
    side = dims if dims <= batch else batch
    shapes: list[list[int]] = [
        [batch] if per_sample else [],
        [batch, dims] if per_sample and save else [0],
        [side, side],
        [dims],
        [dims],
    ]
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


@fake("covariance_penalty_backward", _library)
def _(
    grad: Tensor,
    z: Tensor,
    product: Tensor,
    second: Tensor,
    offset: Tensor,
    inverse: Tensor,
    normalize: bool,
    per_sample: bool,
) -> Tensor:
    return _as(z)
