"""The detectors of `bomkern.diagnose` that look at two goals at once: conflict and collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import thresholds as at
from .finding import Finding, make, when
from .run_view import Digest, number
from .trends import blocks, correlation, ramp, smooth, stretches, trend


def collapse(run: Digest) -> Iterator[Finding]:
    """KL falls to nearly nothing and stays there; surer where a goal that counts units says that they are inactive."""
    kls = [k for k, c in enumerate(run.columns) if at.KL.search(c.name)]
    units = [k for k, c in enumerate(run.columns) if at.UNITS.search(c.name) and k not in kls]
    for k in kls:
        calm = smooth(run.raw[:, k], run.width)
        peak = calm[calm.isfinite()].max().item() if calm.isfinite().any() else 0.0
        runs = stretches(calm < at.GONE * peak)
        if peak <= 0 or not runs or runs[-1][1] < run.rows:
            continue
        a, b = runs[-1]
        shut = [u for u in units if _shut(run, u)]
        left = run.values(k, a).median().item()
        sure = min(ramp((b - a) / run.rows, *at.SPAN), ramp(left, *at.EMPTY), 1.0 if shut else at.ALONE)
        text = f"{when(run, (a, b))}: raw {number(left)}, at most {left / peak:.1%} of the {number(peak)} that it was"
        if shut:
            end = number(run.values(shut[0], a).median().item())
            text += f"; {run.columns[shut[0]].name} {end}: units are inactive"
        goals = (run.columns[k].goal, *[run.columns[u].goal for u in shut[:1]])
        half = number(peak / 2)
        change = f"give {run.columns[k].name} Upper({half}, {half}), so that what is below costs nothing"
        yield make(run, "collapse", tuple(dict.fromkeys(goals)), (a, b), sure, text, change)


def _shut(run: Digest, k: int) -> bool:
    """Whether a fraction of units has come to the bad one of 0 and 1."""
    values = run.values(k, run.rows * 3 // 4)
    if not len(values):
        return False
    end = values.median().item()
    return end < at.NEARLY if run.columns[k].kind == "Lower" else end > 1 - at.NEARLY


def conflict(run: Digest, i: int, j: int) -> Iterator[Finding]:
    """Two goals hold the gradient between them, both badly off, and neither improves.

    That alone says much: the rule stands still at two goals only where their gradients are opposed, or at two floors
    that happen to be at one height. To be surer takes signs that the gain of one is the loss of the other, in both
    directions: raw of j gets worse in blocks in which i has more of the gradient, and the other way round; their raw
    values move in opposite ways; or the payoff table says so.
    """
    between = torch.minimum(run.calm[:, i], run.calm[:, j]) >= at.PAIR[0]
    held = run.calm[:, i] + run.calm[:, j] >= at.PAIR[1]
    for a, b in stretches(between & held, run.width):
        if b - a < run.least:
            continue
        lines = [trend(run.worse[a:b, g]) for g in (i, j)]
        shares, ends = run.share[a:b, [i, j]].nanmean(0), run.deficit[a:b, [i, j]].nanmean(0)
        height = float(ends.min())
        pace = max(abs(line.change) for line in lines) * min(run.rows / (b - a), at.AHEAD)
        stuck = min(
            ramp(float(shares.sum()), *at.PAIR_SHARE),
            ramp((b - a) / run.rows, *at.PAIR_SPAN),
            ramp(height, *at.PAIR_HARM),
            ramp(pace / height if height > 0 else math.inf, *at.PACE),
            ramp(1 - height / max(float(ends.max()), 1e-9), *at.EVEN),
        )
        told, why = _opposed(run, i, j, a, b)
        k, m = run.mover(i, a, b), run.mover(j, a, b)
        text = (
            f"{when(run, (a, b))}: together {float(shares.sum()):.0%} of the gradient, deficits {ends[0]:.2g} and "
            f"{ends[1]:.2g}, {run.path(k, a, b)} and {run.path(m, a, b)}; {why}"
        )
        yield make(run, "conflict", (i, j), (a, b), min(stuck, told), text, _yield(run, k, m))


def _opposed(run: Digest, i: int, j: int, a: int, b: int) -> tuple[float, str]:
    """How sure it is that the gain of one goal is the loss of the other, and what says so."""
    # Where the rule gives each goal a part by its rank, the two worst always hold most: that says nothing by itself.
    stalemate = at.STALEMATE if run.most == 1 else 0.0
    known = _payoff_says(run, i, j)
    if known is not None:
        why = "trained alone, each makes the other worse" if known else "yet trained alone neither harms the other"
        return (1.0 if known else at.DENIED), why
    rates = [_coupling(run, i, j, a, b), _coupling(run, j, i, a, b)]
    motion = [_opposite(run.worse[a:b, i], run.worse[a:b, j]), _opposite(run.worse[a:b, j], run.worse[a:b, i])]
    turns, apart = ramp(min(rates), at.T_NONE, at.T_FULL), ramp(min(motion), at.T_NONE / 2, at.T_FULL - at.T_NONE)
    if turns >= apart and turns > 0:
        return max(
            turns, stalemate
        ), f"each gets worse while the other has the gradient (t = {rates[0]:.1f} and {rates[1]:.1f})"
    if apart > 0:
        return max(apart, stalemate), f"one falls when the other rises (t = {motion[0]:.1f} and {motion[1]:.1f})"
    return stalemate, "or both are at floors of their own, which `bomkern.probe` would tell"


def _payoff_says(run: Digest, i: int, j: int) -> bool | None:
    """Whether training on either alone leaves the other far worse than it could be; None if that is not known, as of
    groups, whose members were trained one by one."""
    if any(len(run.members(g)) > 1 for g in (i, j)):
        return None
    costs = []
    for one, other in ((i, j), (j, i)):
        k, m = run.members(one)[0], run.members(other)[0]
        reached, left = run.alone(m), run.alone(k, m)
        if reached is None or left is None:
            return None
        costs.append(float(_distance(run, m, left) - _distance(run, m, reached)))
    return min(costs) > at.COST


def _distance(run: Digest, k: int, raw: float) -> Tensor:
    return run.columns[k].distance(torch.tensor(raw, dtype=torch.float64), *run.anchor(k))


def _coupling(run: Digest, i: int, j: int, a: int, b: int) -> float:
    """t of: j gets worse within blocks of steps in which i has more of the gradient than j. Noise of single steps moves
    a block's mean share and the slope of raw within it independently."""
    size = max(4, run.width // 2)
    count = (b - a) // size
    if count < 8:
        return 0.0
    share = blocks((run.share[:, i] - run.share[:, j])[a : a + count * size], count)
    raw = run.worse[a : a + count * size, j].view(count, size)
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return correlation(share, (raw * place).sum(1))[1]


def _opposite(x: Tensor, y: Tensor) -> float:
    """-t of the correlation of changes between blocks, of x over even rows and y over odd ones: they share no batch."""
    count = len(x) // (2 * at.HALF)
    if count < 12:
        return 0.0
    even = x[: count * 2 * at.HALF].view(count, at.HALF, 2)[:, :, 0].mean(1)
    odd = y[: count * 2 * at.HALF].view(count, at.HALF, 2)[:, :, 1].mean(1)
    return -correlation(even.diff(), odd.diff())[1]


def _yield(run: Digest, k: int, m: int) -> str:
    column, other = run.columns[m], run.columns[k]
    ideal, scale = run.anchor(m)
    if not column.one_sided or not math.isfinite(scale):
        return f"ask less of {column.name} or of {other.name}: they cannot both have what they want"
    return (
        f"if {other.name} matters more, widen the other: give {column.name} "
        f"Anchored({number(ideal)}, {number(ideal + 2 * scale)})"
    )
