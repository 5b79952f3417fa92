"""Reference implementation of deficits and of the bottleneck rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.checks import check_goals, check_params
from ..common.graph_constants import on_device
from ..common.reductions import Reduction
from ..constraints import BARRIER, CURVES, HARD


def _hard(r: Tensor) -> Tensor:
    """Return ``log(1 + r^2)``; where r^2 would overflow, this equals 2 log |r| to the last bit."""
    far = r.abs() > 1e8
    return torch.where(far, 2 * torch.log(torch.where(far, r.abs(), 1)), torch.log1p(torch.where(far, 0, r).square()))


def _barrier(r: Tensor, tail: Tensor) -> Tensor:
    """Return ``-log(1 - r)`` up to ``1 - tail``, and the tangent at that point beyond it."""
    inside = (r <= 1 - tail) & (r < 1)  # 1 - tail may round to 1
    return torch.where(inside, -torch.log1p(-torch.where(inside, r, 0)), (r - 1 + tail) / tail - torch.log(tail))


def deficit(x: Tensor, params: Tensor | None, curves: Tensor | None) -> Tensor:
    """Return ``-log(score)`` of raw values, or of plain scores if ``params`` is None. NaN stays NaN.

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
        # Each curve gets only its own goals' r: a branch that `where` does not use must not put NaN into the gradient.
        d = torch.where(curves == HARD, _hard(torch.where(curves == HARD, r, 0)), r)
        box = curves == BARRIER
        d = torch.where(box, _barrier(torch.where(box, r, 0), torch.where(box, tail, 0.5)), d)
    return torch.where(d == -torch.inf, torch.inf, d)


def level_of(d: Tensor) -> Tensor:
    """Return the scores of deficits, at most 1: a value that beats its ideal is no better than the ideal."""
    return torch.exp(-d.clamp(min=0))


def codes_of(curves: Sequence[int], device: torch.device) -> Tensor:
    """Return the curve codes as a tensor, [K] int64."""
    # The codes are looked up, because a code of 2 may be a symbol while a graph is traced.
    return on_device(tuple(CURVES[code] for code in curves), torch.int64, device)


def worst_of(d: Tensor, dim: int) -> Tensor:
    """Return the lowest index of the largest deficit along ``dim``; NaN is worse than any other."""
    worst = torch.where(d.isnan().any(dim, keepdim=True), d.isnan(), d == d.amax(dim, keepdim=True))
    return worst.to(torch.uint8).argmax(dim)


def matrix_of(goals: Sequence[Tensor], batch: int, dtype: torch.dtype) -> Tensor:
    """Return the goals as one matrix [B, K]."""
    if len(goals) == 1 and goals[0].dim() == 2:
        return goals[0].to(dtype)
    return torch.stack([g.to(dtype).expand(batch) for g in goals], dim=1)


def reduced(per_sample: Tensor, row: Tensor, reduction: int, samples: Tensor | None = None) -> Tensor:
    """Return the reduced loss: [B] for ``NONE``, else 0-dim; for ``MIN`` the loss of the sample ``row``, [1].

    A mean is over ``samples``, if that is given.
    """
    if reduction == Reduction.NONE:
        return per_sample
    if reduction == Reduction.MEAN:
        return per_sample.mean() if samples is None else per_sample.sum() / samples
    return per_sample.sum() if reduction == Reduction.SUM else per_sample.index_select(0, row).reshape(())


def min_goal(
    goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int, stats: bool
) -> tuple[Tensor, ...]:
    """Compute ``l_b = max_k d_kb`` per sample; only the worst goal of a sample gets its gradient.

    See `bomkern.min_goal_loss`.

    Returns:
        ``(loss,)``, or ``(loss, bottleneck, share, level, finite)`` with ``stats``.
    """
    batch, count, dtype = check_goals(goals)
    check_params(params, curves, count, dtype, goals[0].device)
    x = matrix_of(goals, batch, dtype)
    codes = None if params is None else codes_of(curves, x.device)

    every = deficit(x.detach(), params, codes)  # [B, K]
    # Scores themselves are compared, because the logarithms of two close scores may round to the same value.
    winner = worst_of(every if params is not None else torch.where(every.isfinite(), -x.detach(), every), 1)
    worst = every.gather(1, winner[:, None])[:, 0]
    finite = worst.isfinite()
    # The gradient goes through the bottleneck alone; a sample whose loss is not finite gets none.
    own = torch.where(finite, x.gather(1, winner[:, None])[:, 0], 1)
    live = deficit(own, None if params is None else params[winner], None if codes is None else codes[winner])
    per_sample = torch.where(finite, live, worst)

    row = worst_of(worst, 0).reshape(1)  # a tensor, because the host would have to wait for a number
    loss = reduced(per_sample, row, reduction)
    if not stats:
        return (loss,)
    takers = winner.index_select(0, row) if reduction == Reduction.MIN else winner
    share = (takers[:, None] == torch.arange(count, device=x.device)).to(dtype).mean(0)
    return loss, winner, share, level_of(every).mean(0), finite.all()
