"""The definition of every op in plain PyTorch: the oracle of the tests, and what serves where nothing was compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._autocast import exactly
from ._check import (
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
from ._func import under_transform
from ._ranks import ALONE, Ranks
from .constraints import BARRIER, HARD

NONE, MEAN, SUM, MIN = 0, 1, 2, 3


def _hard(r: Tensor) -> Tensor:
    """``log(1 + r^2)``; where r^2 would overflow it is 2 log |r| to the last bit."""
    far = r.abs() > 1e8
    return torch.where(far, 2 * torch.log(torch.where(far, r.abs(), 1)), torch.log1p(torch.where(far, 0, r).square()))


def _barrier(r: Tensor, tail: Tensor) -> Tensor:
    """``-log(1 - r)`` up to ``1 - tail``, then the tangent there."""
    inside = r <= 1 - tail
    return torch.where(inside, -torch.log1p(-torch.where(inside, r, 0)), (r - 1 + tail) / tail - torch.log(tail))


def deficit(x: Tensor, params: Tensor | None, curves: Tensor | None) -> Tensor:
    """``-log(score)`` of raw values, or of plain scores where ``params`` is None. NaN stays NaN.

    Args:
        x: [..., K] raw values.
        params: [..., K, 4] ``(center, right, left, tail)``, see `bomkern.constraints`.
        curves: [..., K] curve codes.
    """
    if params is None or curves is None:
        d = torch.where(x <= 0, torch.inf, -torch.log(x))
    else:
        center, right, left, tail = params.unbind(-1)
        u = x - center
        flat = torch.where(right == left, right, 0)
        slope = torch.where(u > 0, right, torch.where(u < 0, left, flat))
        r = torch.where((slope == 0) & ~u.isnan(), 0, u * slope)
        # Each curve sees only its own goals' r: what `where` leaves unused must not put a NaN into the gradient.
        d = torch.where(curves == HARD, _hard(torch.where(curves == HARD, r, 0)), r)
        box = curves == BARRIER
        d = torch.where(box, _barrier(torch.where(box, r, 0), torch.where(box, tail, 0.5)), d)
    return torch.where(d == -torch.inf, torch.inf, d)


def worst_of(d: Tensor, dim: int) -> Tensor:
    """Lowest index of the largest deficit along ``dim``; a NaN is worse than all."""
    rank = torch.where(d.isnan().any(dim, keepdim=True), d.isnan(), d == d.amax(dim, keepdim=True))
    return rank.to(torch.uint8).argmax(dim)


def min_goal(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, stats: bool
) -> tuple[Tensor, ...]:
    """The bottleneck rule: ``l_b = max_k d_kb``, its gradient to the one worst goal of each sample.

    Returns ``(loss,)``, or ``(loss, bottleneck, share, level, finite)`` with ``stats``. See `bomkern.min_goal_loss`.
    """
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    if len(goals) == 1 and goals[0].dim() == 2:
        x = goals[0].to(dtype)
    else:
        x = torch.stack([g.to(dtype).expand(batch) for g in goals], dim=1)
    codes = None if params is None else torch.tensor(list(curves), device=x.device)

    every = deficit(x.detach(), params, codes)  # [B, K]
    # Scores are compared as they are: of two that are close the logarithms may round to the same.
    winner = worst_of(every if params is not None else torch.where(every.isfinite(), -x.detach(), every), 1)
    worst = every.gather(1, winner[:, None])[:, 0]
    finite = worst.isfinite()
    # The gradient is taken through the bottleneck alone, and not at all where it is not finite.
    own = torch.where(finite, x.gather(1, winner[:, None])[:, 0], 1)
    again = deficit(own, None if params is None else params[winner], None if codes is None else codes[winner])
    per_sample = torch.where(finite, again, worst)

    row = worst_of(worst, 0).reshape(1)  # kept a tensor: an index read by the host would wait for the device
    if reduction == NONE:
        loss = per_sample
    elif reduction == MEAN:
        loss = per_sample.mean()
    elif reduction == SUM:
        loss = per_sample.sum()
    else:
        loss = per_sample.index_select(0, row).reshape(())
    if not stats:
        return (loss,)
    takers = winner.index_select(0, row) if reduction == MIN else winner
    share = (takers[:, None] == torch.arange(count, device=x.device)).to(dtype).mean(0)
    return loss, winner, share, torch.exp(-every).mean(0), finite.all()


def groups_of(groups: Sequence[int], like: Tensor) -> Tensor:
    """[K, G]: 1 / members where a column belongs to a goal, else 0."""
    sizes = [list(groups).count(g) for g in range(groups[-1] + 1)]
    return like.new_tensor([[(owner == g) / size for g, size in enumerate(sizes)] for owner in groups])


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

    Returns ``(loss, bottleneck, record)``. See `bomkern.GoalSet`, and `_records.record_parts` for the record.
    """
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    check_groups(groups, count)
    check_temperature(temperature, params)
    check_multipliers(multipliers, groups, params)
    if len(goals) == 1 and goals[0].dim() == 2:
        x = goals[0].to(dtype)
    else:
        x = torch.stack([g.to(dtype).expand(batch) for g in goals], dim=1)
    codes, member = torch.tensor(list(curves), device=x.device), groups_of(groups, params)  # [K], [K, G]

    single = deficit(x.detach(), params, codes)  # [B, K]
    every = _mean_of_members(single, member)  # [B, G]
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
    if reduction == MEAN:
        loss = per_sample.mean()
    elif reduction == SUM:
        loss = per_sample.sum()
    else:
        loss = per_sample.index_select(0, row).reshape(()) if reduction == MIN else per_sample
    taken = part.index_select(0, row) if reduction == MIN else part
    seen = x.detach()
    highest = torch.where(seen.isfinite(), seen, -torch.inf).amax(0)
    summary = torch.stack([loss.mean(), finite.all().to(dtype)])
    level, raw = torch.exp(-every).mean(0), seen.mean(0)
    record = torch.cat([taken.mean(0), level, every.mean(0), raw, highest, params[:, 0], params[:, 1], summary])

    # The gradient: each deficit's own, weighed. Where a sample's loss is not finite there is none.
    own = torch.where(finite[:, None] & (weight @ member.T > 0), x, params[:, 0])
    share = torch.where(finite[:, None], weight, 0) @ member.T  # [B, K]
    live = deficit(own, params, codes)
    pull = torch.where(share > 0, share * live, 0).sum(1)  # its gradient is the loss's
    if multipliers is None:
        pull = pull + _bend(_mean_of_members(live, member), worst, soft[:, None] & (weight > 0), mu)
    carried = pull - pull.detach()
    if reduction == MIN:
        carried = carried.index_select(0, row).reshape(())
    elif reduction != NONE:
        carried = carried.mean() if reduction == MEAN else carried.sum()
    return loss + carried, winner, record


def _bend(live: Tensor, worst: Tensor, soft: Tensor, mu: Tensor) -> Tensor:
    """What makes the smooth maximum's second derivative right, [B]: its value and its gradient are 0.

    The weights that the gradient counts as constants move with the deficits; ``live`` are these, [B, G].
    """
    terms = torch.exp(torch.where(soft, (live - worst[:, None]) / mu, -torch.inf))
    total = terms.sum(1, keepdim=True)
    weight = terms / torch.where(total > 0, total, 1)
    return ((live - live.detach()) * (weight - weight.detach())).sum(1) / 2


def _mean_of_members(single: Tensor, member: Tensor) -> Tensor:
    """[B, K] deficits -> [B, G]. Each goal sees only its own members: 0 times an infinite one would be NaN."""
    inside = member > 0
    return torch.where(inside, single[:, :, None] * member, 0).sum(1)


def log_weights(rows: Tensor, batch: int, dataset_size: int | None, stratified: bool) -> Tensor:
    """Log weight of each component in the mixture of each of the given rows (Chen et al. 2018, appendix C).

    Plain 1/B, or MWS: 1 / (N B). MSS, with M = B - 1: 1/N for the row's own component, (N - M) / (N M) for the next
    one, 1/M for the rest: a row sums to 1.
    """
    if dataset_size is None or not stratified:
        return rows.new_full((len(rows), batch), -math.log(batch * (dataset_size or 1)), dtype=torch.float64)
    m, n = batch - 1, dataset_size
    weights = rows.new_full((len(rows), batch), 1 / m, dtype=torch.float64)
    weights.scatter_(1, ((rows + 1) % batch)[:, None], (n - m) / (n * m))
    return weights.scatter_(1, rows[:, None], 1 / n).log()


def log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """``log N(z_bd; mu_id, exp(logvar_id))``, [rows, B, D]."""
    return -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def _total_correlation_of(z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor) -> Tensor:
    log_q = log_density(z, mu, logvar)
    joint = (log_q.sum(2) + weights).logsumexp(1)
    marginals = (log_q + weights[:, :, None]).logsumexp(1)
    return joint - marginals.sum(1)


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


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    limit: int = 2**23,
) -> Tensor:
    """``log q(z_b) - sum_d log q(z_bd)``, [R]. See `bomkern.total_correlation`.

    With ``first`` z is [R, D], samples of the R posteriors from that one on among the B of mu and logvar; else R = B.
    Rows go in chunks of at most ``limit`` elements of the [rows, B, D] temporary, and backward computes each again: the
    memory is bounded, whatever B and D, except under torch.func. One chunk is the textbook's formula, as it stands.
    """
    batch, dims, dtype = check_rows(z, mu, logvar, first)
    check_estimator(batch, dataset_size, stratified)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    rows, count = max(1, limit // (batch * dims)), len(z)
    bounded = rows < count and not under_transform()  # torch.func has no hooks on what backward keeps
    out = []
    for begin in range(0, count, rows):
        part = slice(begin, min(begin + rows, count))
        chunk = torch.arange(part.start, part.stop, device=z.device) + (first or 0)
        arguments = (z[part], mu, logvar, log_weights(chunk, batch, dataset_size, stratified).to(dtype))
        if bounded:
            out.append(checkpoint(_total_correlation_of, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(_total_correlation_of(*arguments))
    return torch.cat(out)


LOGVAR_LIMIT = 80.0  # e^80 is finite in float32


def _variance_of(logvar: Tensor) -> Tensor:
    """``exp(logvar)``, its tangent above `LOGVAR_LIMIT`."""
    beyond = logvar > LOGVAR_LIMIT
    tangent = math.exp(LOGVAR_LIMIT) * (1 + (logvar - LOGVAR_LIMIT))  # finite slope at infinity too
    return torch.where(beyond, tangent, torch.exp(torch.where(beyond, LOGVAR_LIMIT, logvar)))


def gaussian_kl(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    """``KL(N(mu, diag e^logvar) || N(0, S))``, [B]. See `bomkern.gaussian_kl`."""
    _, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    check_prior(dims, block_size, rho)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    # S has blocks (1 - rho) I + rho 11', whose inverse is precision I - shared 11'. A block of one is 1, whatever rho.
    rho = 0.0 if block_size == 1 else rho
    precision, last = 1 / (1 - rho), 1 - rho + block_size * rho
    shared, diagonal = precision * rho / last, precision * (1 - rho / last)
    logdet = dims / block_size * ((block_size - 1) * math.log(1 - rho) + math.log(last))
    variance = diagonal * (_variance_of(logvar) - 1) - logvar
    twice = (variance + precision * mu.square()).sum(1)
    if shared != 0:  # 0 times an infinite square would be NaN
        twice = twice - shared * mu.unflatten(1, (-1, block_size)).sum(2).square().sum(1)
    return (twice + (dims * (diagonal - 1) + logdet)) / 2


def consistency_variance(views: Sequence[Tensor], correction: float) -> Tensor:
    """Mean over D of the variance over the views, [B]. See `bomkern.consistency_variance`."""
    _, _, _, dtype = check_views(views, correction)
    x = views[0].to(dtype) if len(views) == 1 else torch.stack([v.to(dtype) for v in views])
    x = x - x[0].detach()  # no digits are lost where all values are far from 0
    return x.var(0, correction=correction).mean(1)


def column_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each column, [D] each; of a constant column exactly 0."""
    shifted = x - x[0].detach()  # no digits are lost where all values are far from 0
    return shifted.mean(0) + x[0].detach(), shifted.var(0)


def merged_moments(mean: Tensor, variance: Tensor, rows: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over all ranks' rows, of those of each rank's (Chan et al. 1979); any shape."""
    means, variances = ranks.gather(torch.stack([mean, variance])).unbind(1)
    origin, total = means[0].detach(), rows * ranks.size
    apart = means - origin
    center = apart.mean(0)
    between = (apart - center).square().sum(0) * (rows / (total - 1))
    return center + origin, variances.mean(0) * (ranks.size * (rows - 1) / (total - 1)) + between


def units_of(variance: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Active and effective fraction, 0-dim each, of column variances [D]. See `bomkern.active_units`."""
    active = torch.sigmoid((variance - threshold) / temperature).mean()
    total = variance.sum()
    p = variance / torch.where(total == 0, 1, total)
    some = p != 0
    entropy = -(p * torch.where(some, p, 1).log()).sum()
    return active, torch.where(total == 0, 0, torch.exp(entropy) / len(variance))


def active_units(mu: Tensor, threshold: float, temperature: float, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Active and effective fraction of the dimensions, 0-dim each. See `bomkern.active_units`."""
    rows, _, dtype = check_matrices(2, mu=mu)
    check_units(threshold, temperature)
    moments = merged_moments(*column_moments(mu.to(dtype)), rows, ranks)
    return units_of(moments[1], threshold, temperature)


def latent_statistics(
    z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, ...]:
    """The fields of `bomkern.LatentStatistics`, in order."""
    _, _, dtype = check_latents(z, mu, logvar, least=2)
    check_units(threshold, temperature)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    kl = (mu.square() + _variance_of(logvar) - 1 - logvar).sum(1) / 2
    moments = *column_moments(z), *column_moments(mu)
    return kl, logvar.mean(1), logvar.square().mean(1), *moments, *units_of(moments[3], threshold, temperature)


def centered(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """x less its column means over all ranks' rows, and the means, [D], without gradient."""
    first = x[0].detach()  # taken off before the mean is: no digits are lost where all values are far from 0
    firsts, means = ranks.gather(torch.stack([first, (x - first).mean(0)])).unbind(1)
    origin = firsts[0].detach()
    mean = (firsts.detach() - origin + means).mean(0)
    return x - origin - mean, (origin + mean).detach()


@exactly
def covariance_penalty(z: Tensor, normalize: bool, per_sample: bool, ranks: Ranks = ALONE) -> Tensor:
    """``B/(B-1) x' offdiag(C) x / D`` of each sample, [B], or ``sum_{i != j} C_ij^2 / D``, 0-dim.

    See `bomkern.covariance_penalty`.
    """
    rows, dims, dtype = check_matrices(2, z=z)
    batch = rows * ranks.size
    x, mean = centered(z.to(dtype), ranks)
    c = ranks.total(x.T @ x) / (batch - 1)
    if normalize:
        variance = c.diagonal()
        constant = variance.detach().sqrt() <= torch.finfo(dtype).eps * mean.abs()
        inverse = torch.where(constant, torch.inf, variance).rsqrt()
        c, x = c * inverse * inverse[:, None], x * inverse
    off = c - torch.diag(c.diagonal())
    if not per_sample:
        return off.square().sum() / dims
    return ((x @ off) * x).sum(1) * (batch / (batch - 1) / dims)
