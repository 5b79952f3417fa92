"""The record of every op: its schemas, and the other fields of `registry.Op`. csrc/NAME.cpp registers the kernels.

To add an op, add its record here and its fake kernels to `fakes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.checks import (
    check_estimator,
    check_goals,
    check_latents,
    check_matrices,
    check_params,
    check_rows,
    check_views,
)
from ..reference import statistics
from . import fakes
from .registry import Op, Schema
from .routing import routed_goal_set, routed_min_goal

library = torch.library.Library("bomkern", "DEF")


def check_columns(goals: Any, params: Any, curves: Any, *more: Any) -> None:
    """Check the goals and their constraints."""
    _, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)


def compiled_min_goal() -> Callable[..., Any]:
    """Return a function that calls the compiled min_goal, by the overload with or without statistics."""
    plain, with_stats = torch.ops.bomkern.min_goal.default, torch.ops.bomkern.min_goal.stats

    def serve(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
        try:
            return (with_stats if stats else plain)(goals, params, curves, reduction, route)
        except (RuntimeError, TypeError, ValueError):
            check_columns(goals, params, curves)  # names what was refused, and says what to write instead
            raise

    return serve


def compiled_total_correlation() -> Callable[..., Any]:
    """Return a function that calls the compiled total_correlation, by the overload with or without log q."""
    plain, with_log_q = torch.ops.bomkern.total_correlation.default, torch.ops.bomkern.total_correlation.parts

    def serve(*arguments: Any, parts: bool = False) -> Any:
        try:
            return with_log_q(*arguments)[:2] if parts else plain(*arguments)[0]
        except (RuntimeError, TypeError, ValueError):
            TOTAL_CORRELATION.check(*arguments)
            raise

    return serve


def min_goal_loss(goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int) -> Tensor:
    return reference.min_goal(goals, params, curves, reduction, False)[0]


def goal_set_loss(*arguments: Any) -> Tensor:
    return reference.goal_set(*arguments)[0]


# reduction: see common/reductions.py. winner, slope: saved for backward. curves: see constraints.py. route: bit k is
# set if the gradient of goal k may be undefined instead of zero, see dispatch/routing.py.
MIN_GOAL = Op(
    forward=Schema(
        "min_goal(Tensor[] goals, Tensor? params, int[] curves, int reduction, int route=0) -> "
        "(Tensor loss, Tensor winner, Tensor slope)",
        fakes.min_goal,
    ),
    more=(
        Schema(
            "min_goal.stats(Tensor[] goals, Tensor? params, int[] curves, int reduction, int route=0) -> (Tensor loss, "
            "Tensor winner, Tensor slope, Tensor bottleneck, Tensor share, Tensor level, Tensor finite)",
            fakes.min_goal_stats,
        ),
    ),
    # For each requested gradient: index of its goal, dim of that tensor (2: the [B, K] matrix), index of its dtype in
    # FLOATS.
    backward=Schema(
        "min_goal_backward(Tensor grad, Tensor winner, Tensor slope, SymInt batch, int goals, int[] index, int[] dim, "
        "int[] dtype, int reduction) -> Tensor[]",
        fakes.min_goal_backward,
    ),
    reference=reference.min_goal,
    check=check_columns,
    definition=(
        "min_goal_reference(Tensor[] goals, Tensor? params, int[] curves, int reduction) -> Tensor",
        min_goal_loss,
    ),
    compiled=compiled_min_goal,
    routed=routed_min_goal,
    loss_alone=True,
    public="min_goal_loss",
)

# groups: the goal of each column, ascending. multipliers [G]: fixed weights instead of the rule. record: see
# reference/record.py. weight [K, B]: d loss / d column with save, else no elements. present bool [K, B], counts
# [1 + G + K]: which columns count in which samples, see reference/goal_set.py.
GOAL_SET = Op(
    forward=Schema(
        "goal_set(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, int reduction, "
        "Tensor? multipliers=None, bool save=False, int route=0, Tensor? present=None, Tensor? counts=None) -> "
        "(Tensor loss, Tensor bottleneck, Tensor record, Tensor weight)",
        fakes.goal_set,
    ),
    # index, dim, dtype: as in min_goal_backward.
    backward=Schema(
        "goal_set_backward(Tensor grad, Tensor weight, int[] index, int[] dim, int[] dtype) -> Tensor[]",
        fakes.goal_set_backward,
    ),
    # In place, without a host sync: write the record into row ``place % rows`` of the ring, and increment place [1]
    # int64. spill (average, multipliers, average_before, multipliers_before), [G] each: the moving average of the
    # goals' deficits and their weights by order, and both as they were before.
    more=(
        Schema(
            "goal_set_keep(Tensor record, Tensor(a!) ring, Tensor(b!) place, Tensor? deficit, Tensor? by_order, "
            "float rate, Tensor(c!)[] spill, bool relative=False, float follow=1.0) -> ()",
            fakes.goal_set_keep,
            in_place=reference.goal_set_keep,
        ),
    ),
    reference=reference.goal_set,
    check=check_columns,
    definition=(
        "goal_set_reference(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, "
        "int reduction, Tensor? multipliers, Tensor? present, Tensor? counts) -> Tensor",
        goal_set_loss,
    ),
    results=slice(3),
    routed=routed_goal_set,
    loss_alone=True,
)

# joint [R], marginal [D, R]: saved for backward, in an implementation's own units. dataset_size None: plain 1/B.
# first: index in the batch of the first of the R rows of z; None: z holds all rows, R = B. log_q [R]: log q(z_b) in
# float64, because the parts are small differences of it.
TOTAL_CORRELATION = Op(
    forward=Schema(
        "total_correlation(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified, int? first=None) -> "
        "(Tensor out, Tensor joint, Tensor marginal)",
        fakes.total_correlation,
    ),
    more=(
        Schema(
            "total_correlation.parts(Tensor z, Tensor mu, Tensor logvar, int? dataset_size, bool stratified, "
            "int? first=None) -> (Tensor out, Tensor log_q, Tensor joint, Tensor marginal)",
            fakes.total_correlation_parts,
        ),
    ),
    # want, here and below: the gradients to compute; the others have no elements.
    backward=Schema(
        "total_correlation_backward(Tensor grad, Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginal, "
        "int? dataset_size, bool stratified, int? first, bool[3] want, Tensor? grad_log_q=None) -> "
        "(Tensor, Tensor, Tensor)",
        fakes.total_correlation_backward,
    ),
    reference=statistics.total_correlation,
    check=lambda z, mu, logvar, size, stratified, first=None: check_estimator(
        check_rows(z, mu, logvar, first)[0], size, stratified
    ),
    definition=(  # the gradient itself, whose memory stays bounded
        "total_correlation_gradients_reference(Tensor grad, Tensor z, Tensor mu, Tensor logvar, int? dataset_size, "
        "bool stratified, int? first, Tensor? grad_log_q=None) -> (Tensor, Tensor, Tensor)",
        statistics.total_correlation_gradients,
    ),
    compiled=compiled_total_correlation,
)

# block_size 1: the standard normal prior.
GAUSSIAN_KL = Op(
    forward=Schema("gaussian_kl(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor", fakes.gaussian_kl),
    backward=Schema(
        "gaussian_kl_backward(Tensor grad, Tensor mu, Tensor logvar, int block_size, float rho, bool[2] want) -> "
        "(Tensor, Tensor)",
        fakes.gaussian_kl_backward,
    ),
    reference=statistics.gaussian_kl,
    check=lambda mu, logvar, *_: check_matrices(mu=mu, logvar=logvar),
    definition=(
        "gaussian_kl_reference(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor",
        statistics.gaussian_kl,
    ),
)

# views: one [V, B, D] tensor, or V tensors [B, D]. There are as many gradients as tensors.
CONSISTENCY_VARIANCE = Op(
    forward=Schema("consistency_variance(Tensor[] views, float correction) -> Tensor", fakes.consistency_variance),
    backward=Schema(
        "consistency_variance_backward(Tensor grad, Tensor[] views, float correction, bool[] want) -> Tensor[]",
        fakes.consistency_variance_backward,
    ),
    reference=statistics.consistency_variance,
    check=check_views,
    definition=(
        "consistency_variance_reference(Tensor[] views, float correction) -> Tensor",
        statistics.consistency_variance,
    ),
)

# offset [D]: a column's mean minus its first value, which keeps the digits of a mean that is far from 0.
ACTIVE_UNITS = Op(
    forward=Schema(
        "active_units(Tensor mu, float threshold, float temperature) -> "
        "(Tensor active, Tensor effective, Tensor offset, Tensor variance)",
        fakes.active_units,
    ),
    backward=Schema(
        "active_units_backward(Tensor? grad_active, Tensor? grad_effective, Tensor mu, Tensor offset, Tensor variance, "
        "float threshold, float temperature) -> Tensor",
        fakes.active_units_backward,
    ),
    reference=statistics.active_units,
    check=lambda mu, *_: check_matrices(2, mu=mu),
    definition=(
        "active_units_reference(Tensor mu, float threshold, float temperature) -> (Tensor, Tensor)",
        statistics.active_units,
    ),
    results=slice(2),
)

LATENT_STATISTICS = Op(
    forward=Schema(
        "latent_statistics(Tensor z, Tensor mu, Tensor logvar, float threshold, float temperature) -> "
        "(Tensor kl, Tensor logvar_mean, Tensor logvar_square, Tensor z_mean, Tensor z_variance, Tensor mu_mean, "
        "Tensor mu_variance, Tensor active, Tensor effective, Tensor z_offset, Tensor mu_offset)",
        fakes.latent_statistics,
    ),
    # grads: the gradients of the first nine results, in order.
    backward=Schema(
        "latent_statistics_backward(Tensor?[] grads, Tensor z, Tensor mu, Tensor logvar, Tensor z_offset, "
        "Tensor mu_offset, Tensor mu_variance, float threshold, float temperature, bool[3] want) -> "
        "(Tensor, Tensor, Tensor)",
        fakes.latent_statistics_backward,
    ),
    reference=statistics.latent_statistics,
    check=lambda z, mu, logvar, *_: check_latents(z, mu, logvar, least=2),
    definition=(
        "latent_statistics_reference(Tensor z, Tensor mu, Tensor logvar, float threshold, float temperature) -> "
        f"({', '.join(['Tensor'] * 9)})",
        statistics.latent_statistics,
    ),
    results=slice(9),
)

# x: the columns minus their means, over their deviations if normalize. product [B, D]: x offdiag(C) with save and
# per_sample, else no elements. second: offdiag(C) [D, D], or x x' [B, B] if D > B. inverse [D]: 1 / deviation, 0 for a
# constant column; 1 without normalize.
COVARIANCE_PENALTY = Op(
    forward=Schema(
        "covariance_penalty(Tensor z, bool normalize, bool per_sample, bool save=False) -> "
        "(Tensor out, Tensor product, Tensor second, Tensor offset, Tensor inverse)",
        fakes.covariance_penalty,
    ),
    backward=Schema(
        "covariance_penalty_backward(Tensor grad, Tensor z, Tensor product, Tensor second, Tensor offset, "
        "Tensor inverse, bool normalize, bool per_sample) -> Tensor",
        fakes.covariance_penalty_backward,
    ),
    reference=statistics.covariance_penalty,
    check=lambda z, *_: check_matrices(2, z=z),
    definition=(
        "covariance_penalty_reference(Tensor z, bool normalize, bool per_sample) -> Tensor",
        statistics.covariance_penalty,
    ),
    results=0,
)

# In the order of `bomkern.info`.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        *(MIN_GOAL, GOAL_SET, TOTAL_CORRELATION, GAUSSIAN_KL, CONSISTENCY_VARIANCE, ACTIVE_UNITS),
        *(LATENT_STATISTICS, COVARIANCE_PENALTY),
    )
}

for _op in OPS.values():
    for _schema in _op.schemas:
        library.define(_schema.text)
        torch.library.register_fake(f"bomkern::{_schema.name}", _schema.fake, lib=library)
        if _schema.in_place is not None:
            library.impl(_schema.name, _schema.in_place, "CompositeExplicitAutograd")

# Tells the monitor with this handle that a record is about to be put into its ring, see goals/monitor.py. A CUDA graph
# cannot replay work of the host, so Inductor calls an op with this tag between its graphs.
library.define("goal_set_notice(Tensor(a!) place, int handle, SymInt rows) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
