"""The op of a step of `bomkern.GoalSet`, and the one that keeps its record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.autocast import exactly
from ..common.checks import check_goals, check_groups, check_multipliers, check_params, check_temperature
from ..common.graph_constants import on_device
from ..common.reductions import Reduction
from .min_goal import codes_of, deficit, matrix_of, reduced, worst_of
from .record import record_of


def groups_of(groups: Sequence[int], like: Tensor) -> Tensor:
    """[K, G]: 1 / members where a column belongs to a goal, else 0."""
    sizes = [list(groups).count(g) for g in range(groups[-1] + 1)]
    rows = tuple(tuple((owner == g) / size for g, size in enumerate(sizes)) for owner in groups)
    return on_device(rows, like.dtype, like.device)


@exactly
def goal_set(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mu log sum_g exp(D_bg / mu)``, D the mean deficit of a goal's members; at mu = 0 ``max_g D_bg``.

    With ``multipliers`` lambda [G], constants >= 0, it is ``sum_g lambda_g D_bg`` whatever mu, and the shares are
    ``lambda / sum(lambda)``, 0 where all are 0.

    Returns ``(loss, bottleneck, record)``. See `bomkern.GoalSet`; `record_parts` names the numbers of the record.
    """
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    x = matrix_of(goals, batch, dtype)
    codes, member = codes_of(curves, x.device), groups_of(groups, params)  # [K], [K, G]
    owner = on_device(tuple(groups), torch.int64, x.device)

    single = deficit(x.detach(), params, codes)  # [B, K]
    every = mean_of_members(single, member)  # [B, G]
    winner = worst_of(every, 1)
    worst = every.gather(1, winner[:, None])[:, 0]
    finite = worst.isfinite()
    hard = (winner[:, None] == torch.arange(member.shape[1], device=x.device)).to(dtype)
    mu = torch.where(temperature > 0, temperature, 1)
    apart = torch.where(finite[:, None], every - worst[:, None], -torch.inf)
    soft = finite & (temperature > 0)
    terms = torch.where(soft[:, None], torch.exp(apart / mu), hard)
    weight = terms / terms.sum(1, keepdim=True)  # [B, G]: who gets the gradient
    per_sample = worst + torch.where(soft, mu * terms.sum(1).log(), 0)
    part = weight  # as the record counts it
    if multipliers is not None:
        given = multipliers.detach()
        weighed = torch.where(given != 0, given * every, 0).sum(1)  # 0 times an infinite deficit would be NaN
        per_sample = torch.where(finite, weighed, worst)
        finite = per_sample.isfinite()
        weight, total = given.expand_as(every), given.sum()
        part = torch.where(finite[:, None], given / torch.where(total > 0, total, 1), hard)

    row = worst_of(per_sample, 0).reshape(1)  # kept a tensor: an index read by the host would wait for the device
    loss = reduced(per_sample, row, reduction)
    taken = part.index_select(0, row) if reduction == Reduction.MIN else part
    seen = x.detach()
    highest = torch.where(seen.isfinite(), seen, -torch.inf).amax(0)
    record = record_of(
        share=taken.mean(0),
        level=torch.exp(-every).mean(0),
        deficit=every.mean(0),
        raw=seen.mean(0),
        highest=highest,
        ideal=params[:, 0],
        slope=params[:, 1],
        loss=loss.mean(),
        finite=finite.all().to(dtype),
    )

    # The gradient: each deficit's own, weighed. Where a sample's loss is not finite there is none.
    each = weight.index_select(1, owner) * member.amax(1)  # [B, K]: a member's part of its goal's
    own = torch.where(finite[:, None] & (each > 0), x, params[:, 0])
    share = torch.where(finite[:, None], each, 0)
    live = deficit(own, params, codes)
    pull = torch.where(share > 0, share * live, 0).sum(1)  # its gradient is the loss's
    if multipliers is None:
        pull = pull + _bend(mean_of_members(live, member), worst, soft[:, None] & (weight > 0), mu)
    return loss + reduced(pull - pull.detach(), row, reduction), winner, record


def _bend(live: Tensor, worst: Tensor, soft: Tensor, mu: Tensor) -> Tensor:
    """What makes the smooth maximum's higher derivatives right, [B]: its value and its gradient are 0.

    The weights that the gradient counts as constants move with the deficits ``live``, [B, G]. All is in units of mu,
    where neither a large one overflows nor a small one loses the gradient.
    """
    some = soft.any(1, keepdim=True)
    terms = torch.where(soft, (live - torch.where(some, worst[:, None], 0)) / mu, -torch.inf)
    total = torch.where(some, terms, 0).logsumexp(1)
    weight = torch.where(soft, torch.exp(terms - total[:, None]), 0).detach()
    bend = total - torch.where(weight > 0, weight * terms, 0).sum(1)
    return torch.where(some[:, 0], mu * (bend - bend.detach()), 0)


def mean_of_members(single: Tensor, member: Tensor) -> Tensor:
    """[B, K] deficits -> [B, G]. Each goal sees only its own members: 0 times an infinite one would be NaN."""
    inside = member > 0
    return torch.where(inside, single[:, :, None] * member, 0).sum(1)


def goal_set_keep(
    record: Tensor,
    ring: Tensor,
    place: Tensor,
    deficit: Tensor | None,
    by_rank: Tensor | None,
    rate: float,
    spill: Sequence[Tensor],
) -> None:
    """What a step leaves behind, all in place: its record in the ring, and with spill the goals' weights by rank.

    Args:
        record: [size]. ring: [rows, size]; row ``place % rows`` is written. place: [1] int64, counted up.
        deficit: of each goal in this step, [G]; what is not finite moves nothing.
        by_rank: weights of the worst goal, of the next, ..., [G].
        rate: of the moving average of deficits, whose order ranks the goals; of equals the first is worse.
        spill: no tensor, or [G] each: the average and the multipliers, and what they were before this step.
    """
    ring.index_copy_(0, place % len(ring), record.to(ring.dtype)[None])
    place.add_(1)
    if deficit is None or by_rank is None:
        return
    average, multipliers, average_before, multipliers_before = spill
    average_before.copy_(average)
    multipliers_before.copy_(multipliers)
    average.add_((deficit.to(average.dtype) - average).nan_to_num_(0.0, 0.0, 0.0), alpha=rate)
    multipliers.scatter_(0, average.argsort(descending=True, stable=True), by_rank)
