"""The detector of `bomkern.diagnose` for pairs of goals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import thresholds
from .finding import Finding, make, when
from .registry import Kind, detects
from .run_view import RunView
from .suggestions import compromise
from .trends import blocks, correlation, ramp, stretches, trend

CONFLICT = Kind(
    "conflict",
    weight=0.8,
    meaning="the gain of one is the loss of the other",
    explanation="Two goals hold the gradient between them, are both badly off, and neither gets better.",
    explains=("locked",),
)


@detects(CONFLICT, each="pair")
def conflict(run: RunView, i: int, j: int) -> Iterator[Finding]:
    """Find two goals that hold the gradient between them, are both badly off, and do not improve.

    This alone is strong evidence: the rule stalls at two goals only if their gradients are opposed, or if both are at
    floors of the same deficit. More confidence needs evidence that the gain of one is the loss of the other, in both
    directions. Raw of j gets worse in blocks in which i has more of the gradient, and the other way round; or their raw
    values move in opposite directions; or the payoff table shows it.
    """
    between = torch.minimum(run.smooth_share[:, i], run.smooth_share[:, j]) >= thresholds.PAIR[0]
    held = run.smooth_share[:, i] + run.smooth_share[:, j] >= thresholds.PAIR[1]
    for a, b in stretches(between & held, run.width):
        if b - a < run.least_window:
            continue
        lines = [trend(run.worse[a:b, g]) for g in (i, j)]
        shares, ends = run.share[a:b, [i, j]].nanmean(0), run.deficit[a:b, [i, j]].nanmean(0)
        height = float(ends.min())
        pace = max(abs(line.change) for line in lines) * min(run.rows / (b - a), thresholds.AHEAD)
        stuck = min(
            ramp(float(shares.sum()), *thresholds.PAIR_SHARE),
            ramp((b - a) / run.rows, *thresholds.PAIR_SPAN),
            ramp(height, *thresholds.PAIR_HARM),
            ramp(pace / height if height > 0 else math.inf, *thresholds.PACE),
            ramp(1 - height / max(float(ends.max()), 1e-9), *thresholds.EVEN),
        )
        opposed, why = _opposed(run, i, j, a, b)
        k, m = run.worst_mover(i, a, b), run.worst_mover(j, a, b)
        text = (
            f"{when(run, (a, b))}: together {float(shares.sum()):.0%} of the gradient, deficits {ends[0]:.2g} and "
            f"{ends[1]:.2g}, {run.course(k, a, b)} and {run.course(m, a, b)}; {why}"
        )
        yield make(run, CONFLICT, (i, j), (a, b), min(stuck, opposed), text, compromise(run, k, m))


def _opposed(run: RunView, i: int, j: int, a: int, b: int) -> tuple[float, str]:
    """Return the confidence that the gain of one goal is the loss of the other, and the evidence in words."""
    # Under weights by order the two worst goals always hold most of the gradient, so a stalemate is no evidence.
    stalemate = thresholds.STALEMATE if run.largest_share == 1 else 0.0
    known = _payoff_says(run, i, j)
    if known is not None:
        why = "trained alone, each makes the other worse" if known else "yet trained alone neither harms the other"
        return (1.0 if known else thresholds.DENIED), why
    rates = [_coupling(run, i, j, a, b), _coupling(run, j, i, a, b)]
    motion = [_opposite(run.worse[a:b, i], run.worse[a:b, j]), _opposite(run.worse[a:b, j], run.worse[a:b, i])]
    turns, apart = (
        ramp(min(rates), thresholds.T_NONE, thresholds.T_FULL),
        ramp(min(motion), thresholds.T_NONE / 2, thresholds.T_FULL - thresholds.T_NONE),
    )
    if turns >= apart and turns > 0:
        return max(
            turns, stalemate
        ), f"each gets worse while the other has the gradient (t = {rates[0]:.1f} and {rates[1]:.1f})"
    if apart > 0:
        return max(apart, stalemate), f"one falls when the other rises (t = {motion[0]:.1f} and {motion[1]:.1f})"
    return stalemate, "or both are at floors of their own, which `bomkern.probe` would tell"


def _payoff_says(run: RunView, i: int, j: int) -> bool | None:
    """Return whether training on either goal alone leaves the other far worse than it could be; None if unknown.

    It is unknown for groups, whose members were trained one by one.
    """
    if any(len(run.members(g)) > 1 for g in (i, j)):
        return None
    costs = []
    for trained, other in ((i, j), (j, i)):
        k, m = run.members(trained)[0], run.members(other)[0]
        reached, left = run.alone(m), run.alone(k, m)
        if reached is None or left is None:
            return None
        costs.append(float(_distance(run, m, left) - _distance(run, m, reached)))
    return min(costs) > thresholds.COST


def _distance(run: RunView, k: int, raw: float) -> Tensor:
    return run.columns[k].distance(torch.tensor(raw, dtype=torch.float64, device="cpu"), *run.anchor(k))


def _coupling(run: RunView, i: int, j: int, a: int, b: int) -> float:
    """Return t of the correlation, over blocks of steps, of the excess share of i over j and the slope of raw of j.

    Noise of single steps moves a block's mean share and its slope of raw independently.
    """
    size = max(4, run.width // 2)
    count = (b - a) // size
    if count < 8:
        return 0.0
    share = blocks((run.share[:, i] - run.share[:, j])[a : a + count * size], count)
    raw = run.worse[a : a + count * size, j].view(count, size)
    place = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    return correlation(share, (raw * place).sum(1))[1]


def _opposite(x: Tensor, y: Tensor) -> float:
    """Return -t of the correlation of changes between blocks, of x over even rows and of y over odd rows.

    Even and odd rows share no batch.
    """
    count = len(x) // (2 * thresholds.HALF)
    if count < 12:
        return 0.0
    even = x[: count * 2 * thresholds.HALF].view(count, thresholds.HALF, 2)[:, :, 0].mean(1)
    odd = y[: count * 2 * thresholds.HALF].view(count, thresholds.HALF, 2)[:, :, 1].mean(1)
    return -correlation(even.diff(), odd.diff())[1]
