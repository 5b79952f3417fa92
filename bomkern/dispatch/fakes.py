"""Fake kernels, which return the shapes and dtypes of an op's results for torch.compile, torch.export and fake tensors.

Each is named after its op and makes the same checks. `schemas` lists them beside the schemas.
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
    check_present,
    check_prior,
    check_rows,
    check_temperature,
    check_units,
    check_views,
)
from ..common.reductions import Reduction
from ..reference import RecordAt


def gradient_of(x: Tensor, wanted: bool = True) -> Tensor:
    """Return an uninitialized contiguous gradient of ``x``, without elements if it is not wanted."""
    return x.new_empty(x.shape if wanted else [0])


def min_goal(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, route: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    like = goals[0]
    rows = 1 if reduction == Reduction.MIN else batch
    loss = like.new_empty([batch] if reduction == Reduction.NONE else [], dtype=dtype)
    winner = like.new_empty([rows], dtype=torch.int64 if reduction == Reduction.MIN else torch.uint8)
    return loss, winner, like.new_empty([rows], dtype=dtype)


def min_goal_stats(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, route: int = 0
) -> tuple[Tensor, ...]:
    first = min_goal(goals, params, curves, reduction)
    batch, count, dtype = check_goals(goals)
    like = goals[0]
    bottleneck = like.new_empty([batch], dtype=torch.int64)
    share, level = like.new_empty([count], dtype=dtype), like.new_empty([count], dtype=dtype)
    return *first, bottleneck, share, level, like.new_empty([], dtype=torch.bool)


def min_goal_backward(
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


def goal_set(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None = None,
    save: bool = False,
    route: int = 0,
    present: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    check_present(present, counts, groups, batch, params)
    return (
        params.new_empty([batch] if reduction == Reduction.NONE else []),
        params.new_empty([batch], dtype=torch.int64),
        params.new_empty([RecordAt.of(groups[-1] + 1, count).size]),
        params.new_empty([count, batch] if save else [0]),
    )


def goal_set_backward(
    grad: Tensor, weight: Tensor, index: Sequence[int], dim: Sequence[int], dtype: Sequence[int]
) -> list[Tensor]:
    count, batch = weight.shape
    shapes: dict[int, list[int]] = {0: [], 1: [batch], 2: [batch, count]}
    return [weight.new_empty(shapes[d], dtype=FLOATS[t]) for d, t in zip(dim, dtype, strict=True)]


def goal_set_keep(
    record: Tensor,
    ring: Tensor,
    place: Tensor,
    deficit: Tensor | None,
    by_order: Tensor | None,
    rate: float,
    spill: Sequence[Tensor],
    relative: bool = False,
    follow: float = 1.0,
) -> None:
    pass


def total_correlation(
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


def total_correlation_parts(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, first: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, joint, marginal = total_correlation(z, mu, logvar, dataset_size, stratified, first)
    return out, torch.empty_like(out, dtype=torch.float64), joint, marginal


def total_correlation_backward(
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
) -> tuple[Tensor, ...]:
    return tuple(gradient_of(x, w) for x, w in zip((z, mu, logvar), want, strict=True))


def gaussian_kl(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    batch, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    check_prior(dims, block_size, rho)
    return mu.new_empty([batch], dtype=dtype)


def gaussian_kl_backward(
    grad: Tensor, mu: Tensor, logvar: Tensor, block_size: int, rho: float, want: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return gradient_of(mu, want[0]), gradient_of(logvar, want[1])


def consistency_variance(views: Sequence[Tensor], correction: float) -> Tensor:
    _, batch, _, dtype = check_views(views, correction)
    return views[0].new_empty([batch], dtype=dtype)


def consistency_variance_backward(
    grad: Tensor, views: Sequence[Tensor], correction: float, want: Sequence[bool]
) -> list[Tensor]:
    return [gradient_of(view, wanted) for view, wanted in zip(views, want, strict=True)]


def active_units(mu: Tensor, threshold: float, temperature: float) -> tuple[Tensor, ...]:
    _, dims, dtype = check_matrices(2, mu=mu)
    check_units(threshold, temperature)
    return tuple(mu.new_empty(shape, dtype=dtype) for shape in ([], [], [dims], [dims]))


def active_units_backward(
    grad_active: Tensor | None,
    grad_effective: Tensor | None,
    mu: Tensor,
    offset: Tensor,
    variance: Tensor,
    threshold: float,
    temperature: float,
) -> Tensor:
    return gradient_of(mu)


def latent_statistics(
    z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, ...]:
    batch, dims, dtype = check_latents(z, mu, logvar, least=2)
    check_units(threshold, temperature)
    shapes: list[list[int]] = [*[[batch]] * 3, *[[dims]] * 4, [], [], [dims], [dims]]
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


def latent_statistics_backward(
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
    return tuple(gradient_of(x, w) for x, w in zip((z, mu, logvar), want, strict=True))


def covariance_penalty(z: Tensor, normalize: bool, per_sample: bool, save: bool = False) -> tuple[Tensor, ...]:
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


def covariance_penalty_backward(
    grad: Tensor,
    z: Tensor,
    product: Tensor,
    second: Tensor,
    offset: Tensor,
    inverse: Tensor,
    normalize: bool,
    per_sample: bool,
) -> Tensor:
    return gradient_of(z)
