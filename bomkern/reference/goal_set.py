"""Reference implementation of the op of a `bomkern.GoalSet` step, and of the op that keeps its record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.autocast import exactly
from ..common.checks import (
    check_goals,
    check_groups,
    check_multipliers,
    check_params,
    check_present,
    check_temperature,
)
from ..common.graph_constants import on_device
from ..common.reductions import Reduction
from .min_goal import codes_of, deficit, level_of, matrix_of, reduced, worst_of
from .record import record_of


def groups_of(groups: Sequence[int], like: Tensor) -> Tensor:
    """Return the weight of each column in each goal, [K, G]: 1 / (number of members) if it is a member, else 0."""
    sizes = [list(groups).count(g) for g in range(groups[-1] + 1)]
    rows = tuple(tuple((owner == g) / size for g, size in enumerate(sizes)) for owner in groups)
    return on_device(rows, like.dtype, like.device)


def counts_of(present: Tensor, groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Count the samples with a goal, those with each goal, and those with each column, [1 + G + K].

    Args:
        present: bool [K, B].
        groups: the goal of each column. A goal is there if any member is.
    """
    columns = present.sum(1)
    if len(groups) == groups[-1] + 1:
        goals = columns
    else:
        sizes = [list(groups).count(g) for g in range(groups[-1] + 1)]
        goals = torch.stack([members.any(0) for members in present.split(sizes)]).sum(1)
    return torch.cat([present.any(0).sum()[None], goals, columns]).to(dtype)


@exactly
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
    """Compute ``mu log sum_g exp(D_bg / mu)`` per sample, or ``max_g D_bg`` if mu is 0.

    D is the mean deficit of a goal's members. With ``multipliers`` lambda [G], constants >= 0, the loss of a sample is
    ``sum_g lambda_g D_bg`` for any mu, and the shares are ``lambda / sum(lambda)``, or 0 if all multipliers are 0. See
    `bomkern.GoalSet`.

    With ``present``, bool [K, B], a column counts only in the samples where it is True, and a goal only where it has
    such a member; D is the mean over these. Other values are never read. A sample without a goal has loss 0 and
    bottleneck -1, and is in no mean. ``counts`` is `counts_of` it, or their sum over the processes whose losses are
    added. Multipliers' shares are then ``lambda_g n_g / sum(lambda n)``, n the number of samples with each goal.

    Returns:
        ``(loss, bottleneck, record)``; `record_parts` names the numbers of the record. What no sample has is NaN there,
        its highest value -inf, its share 0.
    """
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    check_present(present, counts, groups, batch, params)
    x = matrix_of(goals, batch, dtype)
    codes, member = codes_of(curves, x.device), groups_of(groups, params)  # [K], [K, G]
    owner = on_device(tuple(groups), torch.int64, x.device)
    here = there = None
    samples = counts[0].clamp(min=1) if counts is not None else None
    if present is not None and counts is not None:
        here = present.t()  # [B, K]
        x = torch.where(here, x, params[:, 0])
        inside = here[:, :, None] & (member > 0)
        member = inside / inside.sum(1, keepdim=True).clamp(min=1).to(dtype)  # [B, K, G]
        there = inside.any(1)  # [B, G]

    single = deficit(x.detach(), params, codes)  # [B, K]
    every = mean_of_members(single, member)  # [B, G]
    winner = worst_of(every if there is None else torch.where(there, every, -torch.inf), 1)
    worst = every.gather(1, winner[:, None])[:, 0]
    if there is not None:
        winner = torch.where(there.any(1), winner, -1)
        worst = torch.where(there.any(1), worst, 0)
    finite = worst.isfinite()
    hard = (winner[:, None] == torch.arange(member.shape[-1], device=x.device)).to(dtype)
    mu = torch.where(temperature > 0, temperature, 1)
    counted = finite[:, None] if there is None else finite[:, None] & there
    apart = torch.where(counted, every - worst[:, None], -torch.inf)
    soft = finite & (temperature > 0)
    terms = torch.where(soft[:, None], torch.exp(apart / mu), hard)
    total = terms.sum(1, keepdim=True)
    if there is not None:
        total = torch.where(there.any(1, keepdim=True), total, 1)
    weight = terms / total  # [B, G], each goal's weight in the gradient
    per_sample = worst + torch.where(soft, mu * total[:, 0].log(), 0)
    part = weight  # each goal's share in the record
    if multipliers is not None:
        multiplier = multipliers.detach()
        sum_of_all = multiplier.sum()
        if there is not None and counts is not None and samples is not None:
            sum_of_all = (multiplier * counts[1 : 1 + len(multiplier)]).sum() / samples
            multiplier = torch.where(there, multiplier, 0)
            if reduction == Reduction.MIN:
                sum_of_all = multiplier.sum(1, keepdim=True)
        weighted = torch.where(multiplier != 0, multiplier * every, 0).sum(1)  # 0 times an infinite deficit is NaN
        per_sample = torch.where(finite, weighted, worst)
        finite = per_sample.isfinite()
        weight = multiplier.expand_as(every)
        part = torch.where(finite[:, None], multiplier / torch.where(sum_of_all > 0, sum_of_all, 1), hard)

    # The worst sample, as a tensor, because the host would have to wait for a number.
    judged = per_sample if there is None else torch.where(there.any(1), per_sample, -torch.inf)
    row = worst_of(judged, 0).reshape(1)
    loss = reduced(per_sample, row, reduction, samples)
    taken = part.index_select(0, row) if reduction == Reduction.MIN else part
    seen = x.detach()
    known = seen.isfinite() if here is None else seen.isfinite() & here
    means = [taken, level_of(every), every, seen]
    if there is None or here is None or counts is None or samples is None:
        share, level, mean, raw = (values.mean(0) for values in means)
    else:
        share = taken[0] if reduction == Reduction.MIN else taken.sum(0) / samples
        goals_with, columns_with = counts[1:].split([member.shape[-1], count])
        level, mean = (torch.where(there, values, 0).sum(0) / goals_with for values in means[1:3])
        raw = torch.where(here, seen, 0).sum(0) / columns_with
    record = record_of(
        share=share,
        level=level,
        deficit=mean,
        raw=raw,
        highest=torch.where(known, seen, -torch.inf).amax(0),
        ideal=params[:, 0],
        slope=params[:, 1],
        loss=loss.mean() if samples is None or loss.dim() == 0 else loss.sum() / samples,
        finite=finite.all().to(dtype),
    )

    # The gradient is the weighted sum of the deficits' gradients; a sample whose loss is not finite gets none.
    each = weight.index_select(1, owner) * member.amax(-1)  # [B, K], each member's part of its goal's weight
    own = torch.where(finite[:, None] & (each > 0), x, params[:, 0])
    portion = torch.where(finite[:, None], each, 0)
    live = deficit(own, params, codes)
    pull = torch.where(portion > 0, portion * live, 0).sum(1)  # has the gradient of the loss
    if multipliers is None:
        pull = pull + _bend(mean_of_members(live, member), worst, soft[:, None] & (weight > 0), mu)
    return loss + reduced(pull - pull.detach(), row, reduction, samples), winner, record


def _bend(live: Tensor, worst: Tensor, soft: Tensor, mu: Tensor) -> Tensor:
    """Return a term with value 0 and gradient 0 that corrects the higher derivatives of the smooth maximum, [B].

    It adds the change of the weights with the deficits ``live``, [B, G]; the gradient treats them as constants. The
    computation is in units of mu, so that a large mu does not overflow and a small one does not lose the gradient.
    """
    some = soft.any(1, keepdim=True)
    terms = torch.where(soft, (live - torch.where(some, worst[:, None], 0)) / mu, -torch.inf)
    total = torch.where(some, terms, 0).logsumexp(1)
    weight = torch.where(soft, torch.exp(terms - total[:, None]), 0).detach()
    bend = total - torch.where(weight > 0, weight * terms, 0).sum(1)
    return torch.where(some[:, 0], mu * (bend - bend.detach()), 0)


def mean_of_members(single: Tensor, member: Tensor) -> Tensor:
    """Return the mean deficit of each goal's members, [B, G], from ``single`` [B, K].

    ``member``, [K, G] or [B, K, G], is 1 over the number of members for each of them, and 0 for other columns. These
    are masked, since 0 times an infinite deficit would be NaN.
    """
    inside = member > 0
    return torch.where(inside, single[:, :, None] * member, 0).sum(1)


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
    """Write the record of a step into the ring; with spill, update the goals' weights by order. All is in place.

    Args:
        record: [size].
        ring: [rows, size]; row ``place % rows`` is written.
        place: [1] int64; it is incremented.
        deficit: the deficit of each goal in this step, [G]; a value that is not finite moves nothing.
        by_order: weights by order: of the worst goal, of the next, ..., [G].
        rate: weight of a step in the moving average of deficits, which orders the goals; of equals the first is worse.
        spill: no tensor, or four of [G]: the average and the multipliers, and both as they were before this step.
        relative: whether the weight of a goal whose average is above 1 is divided by it. Weights then sum to 1.
        follow: the part of the way, 0 to 1, that the multipliers go from what they were to these weights.
    """
    ring.index_copy_(0, place % len(ring), record.to(ring.dtype)[None])
    place.add_(1)
    if deficit is None or by_order is None:
        return
    average, multipliers, average_before, multipliers_before = spill
    average_before.copy_(average)
    multipliers_before.copy_(multipliers)
    average.add_((deficit.to(average.dtype) - average).nan_to_num_(0.0, 0.0, 0.0), alpha=rate)
    weights = weights_of(average, by_order, relative)
    multipliers.copy_(weights if follow == 1 else multipliers + follow * (weights - multipliers))


def weights_of(average: Tensor, by_order: Tensor, relative: bool) -> Tensor:
    """Return the weights of goals with these averages, [G]; see `goal_set_keep`."""
    weights = torch.empty_like(average)
    weights.scatter_(0, average.argsort(descending=True, stable=True), by_order.to(average.dtype))
    if relative:
        weights = weights / average.clamp(min=1)
        weights = weights / weights.sum()
    return weights
