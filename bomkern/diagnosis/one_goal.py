"""The detectors of `bomkern.diagnose` that look at one goal: each yields what it finds in a digest of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import thresholds as at
from .finding import Finding, anchored, make, raised, when
from .run_view import Column, Digest, number
from .trends import blocks, last_rise, ramp, rise, smooth, stretches, trend


def _holding(run: Digest, g: int, share: float) -> Iterator[tuple[int, int]]:
    """Windows in which a goal holds the gradient, or as much of it as the rule gives to one."""
    for a, b in stretches(run.calm[:, g] >= share * run.most, run.width):
        if b - a >= max(run.least, at.SPAN[0] * run.rows):
            yield a, b


def starved(run: Digest, g: int) -> Iterator[Finding]:
    """No share while raw gets worse, and the goal ends badly off: it was not just waiting for its turn."""
    for a, b in stretches(run.calm[:, g] < at.STARVED, run.width // 2):
        if b - a < run.least:
            continue
        # From its best on to the end: what it loses and finds again without gradient is how batches differ.
        low = a + last_rise(smooth(run.worse[a:b, g], run.width))
        if b - low < run.least:
            continue
        line, end = trend(run.worse[low:b, g]), run.deficit[b - run.width : b, g].nanmean().item()
        sure = min(
            ramp(line.t, at.T_NONE, at.T_FULL),
            ramp((b - low) / run.rows, *at.SPAN),
            ramp(line.change, *at.CHANGE),
            ramp(end, *at.HARM),
        )
        holder, held = run.holder(low, b)
        k, share = run.mover(g, low, b), run.share[low:b, g].nanmean().item()
        text = (
            f"{when(run, (low, b))}: share {share:.1%}, {run.path(k, low, b)} (t = {line.t:.1f}); "
            f"{run.goals[holder]} had {held:.0%} of the gradient"
        )
        yield make(run, "starved", (g,), (low, b), sure, text, _feed(run, holder, held, (low, b)))


def _feed(run: Digest, holder: int, held: float, window: tuple[int, int]) -> str:
    """What gives a starved goal gradient: a reachable ideal for who holds it, or a share for all."""
    k = run.mover(holder, *window)
    if held >= at.HOLDS * run.most and run.columns[k].one_sided:
        return raised(run, k, _reached(run, k))
    if run.most < 1:
        return f"give {run.columns[k].name} a wider scale, so that it ranks lower"
    return "let the gradient spill over to every goal: GoalSet(..., spill=0.5)"


def _reached(run: Digest, k: int) -> float:
    """What a goal came to: trained alone, if the payoff says, else while it held the gradient."""
    alone = run.alone(k)
    if alone is not None:
        return alone
    held = run.raw[run.calm[:, run.columns[k].goal] >= at.HOLDS * run.most, k]
    better = 0.75 if run.columns[k].kind == "Lower" else 0.25
    return (held if held.isfinite().any() else run.raw[:, k]).nanquantile(better).item()


def moving(run: Digest, g: int) -> Iterator[Finding]:
    """Raw gets worse while the goal holds the gradient; or its anchors drift."""
    for a, b in _holding(run, g, at.PART[0]):
        low, high = (a + i for i in rise(smooth(run.worse[a:b, g], run.width)))
        if high - low < run.least:
            continue
        line, share = trend(run.worse[low:high, g]), run.share[low:high, g].nanmean().item()
        sure = min(
            ramp(line.t, at.T_NONE, at.T_FULL),
            ramp((high - low) / run.rows, *at.SPAN),
            ramp(line.change, *at.CLIMB),
            ramp(share, *at.PART),
        )
        k = run.mover(g, low, high)
        text = (
            f"{when(run, (low, high))}: {run.path(k, low, high)} (t = {line.t:.1f}) although it had {share:.0%} of "
            "the gradient"
        )
        yield make(run, "moving target", (g,), (low, high), sure, text, _follow(run, k))
    for k in run.members(g):
        if run.columns[k].moving:
            yield from _drifting(run, k)


def _follow(run: Digest, k: int) -> str:
    if run.columns[k].moving:
        return f"train the adversary of {run.columns[k].name} more slowly, or measure its anchors more often"
    if not run.columns[k].one_sided:
        return f"ask less of {run.columns[k].name}, or train what it is measured against more slowly"
    ideal = run.anchor(k)[0]
    return anchored(run, k, ideal if run.columns[k].kind == "Anchored" else None, moving=True) + (
        " and measure its anchors (GoalSet.remeasure)"
    )


def _drifting(run: Digest, k: int) -> Iterator[Finding]:
    low, high = run.ideal[:, k], run.ideal[:, k] + run.scale[:, k]
    known = (low.isfinite() & high.isfinite()).nonzero()[:, 0].tolist()
    if not known:
        return
    first, last = known[0], known[-1]
    away = torch.maximum((low - low[first]).abs(), (high - high[first]).abs()) / run.scale[first, k]
    sure = ramp(away[last].item(), *at.DRIFT)
    begun = int((away > at.CHANGE[0]).to(torch.int8).argmax())
    was, now = (f"({number(low[i].item())}, {number(high[i].item())})" for i in (first, last))
    text = (
        f"{when(run, (begun, run.rows))}: its anchors drifted from {was} to {now}, {away[last]:.1f} of its first scale"
    )
    change = f"train what {run.columns[k].name} is measured against more slowly"
    yield make(run, "moving target", (run.columns[k].goal,), (begun, run.rows), sure, text, change)


def locked(run: Digest, g: int) -> Iterator[Finding]:
    """Holds the gradient, stands out, does not improve; the others get none and do not improve either."""
    others = [o for o in range(len(run.goals)) if o != g]
    for a, b in _holding(run, g, at.LOCKED[0]):
        a = _settled(run, g, a, b)
        if b - a < run.least or not others:
            continue
        share, deficits = run.share[a:b, g].nanmean().item(), run.deficit[a:b].nanmean(0)
        height, moved = deficits[g].item(), abs(trend(run.worse[a:b, g]).change)
        gap = height - deficits[others].nan_to_num(-math.inf).max().item()
        wait = sum(not _improves(run, o, a, b) for o in others)
        sure = min(
            ramp(share / run.most, *at.LOCKED),
            ramp((b - a) / run.rows, *at.SPAN),
            ramp(moved, max(at.CHANGE[1], at.STILL * height), at.CHANGE[0]),
            ramp(gap, *at.GAP),
            at.CARRIED + (1 - at.CARRIED) * ramp(wait / len(others), *at.WAIT),
        )
        k = max(run.members(g), key=lambda k: run.distance[a:b, k].nanmean().item())
        text = (
            f"{when(run, (a, b))}: {share:.0%} of the gradient, yet {run.path(k, a, b)} of an ideal "
            f"{number(run.anchor(k)[0])}; deficit {height:.2g}, {gap:.2g} above the next; {wait} of {len(others)} "
            "others improve little or not"
        )
        yield make(run, "locked", (g,), (a, b), sure, text, _lower(run, k))


def _settled(run: Digest, g: int, a: int, b: int) -> int:
    """From where on a goal that holds the gradient does not get better."""
    for eighth in range(6):
        start = a + (b - a) * eighth // 8
        height = run.deficit[start:b, g].nanmean().item()
        if trend(run.worse[start:b, g]).change > -max(at.CHANGE[0], at.CHANGE[0] * height):
            return start
    return b


def _improves(run: Digest, g: int, a: int, b: int) -> bool:
    """Whether a goal gets much of its way: what shared parameters carry along is little."""
    line, start = trend(run.worse[a:b, g]), run.worse[a : a + run.width, g].nanmean().item()
    return line.change < -max(at.CLIMB[0], start / 3) and line.t < -at.T_NONE


def _lower(run: Digest, k: int) -> str:
    column, reached = run.columns[k], _reached(run, k)
    if column.kind in ("Upper", "Lower"):
        return f"give {column.name} {column.kind}({number(reached)}, {number(column.arguments.get('margin', 1.0))})"
    return _wider(column, reached) if column.box else raised(run, k, reached)


def _wider(column: Column, reached: float) -> str:
    """A box in which what the goal came to lies two thirds of the way from the other end, or nearer the middle."""
    assert column.box
    low, high = column.box
    if reached > (low + high) / 2:
        high = max(high, low + 1.5 * (reached - low))
    else:
        low = min(low, high - 1.5 * (high - reached))
    return f"give {column.name} Box({number(low)}, {number(high)})"


def miscalibrated(run: Digest, g: int) -> Iterator[Finding]:
    """A scale that has nothing to do with the values seen, over the second half of the run."""
    half = run.rows // 2
    for k in run.members(g):
        column, away = run.columns[k], run.distance[:, k]
        late = away[half:][away[half:].isfinite()].abs()
        if not column.one_sided or not len(late):
            continue
        sure, what, begun = max(_too_small(run, k), _too_large(run, k), _outgrown(run, k))
        if sure > 0:
            share, values = run.share[half:, g].nanmean().item(), run.values(k, half)
            text = (
                f"{when(run, (begun, run.rows))}: its scale {number(run.anchor(k)[1])} is {what}; raw "
                f"{number(values.quantile(0.25).item())} to {number(values.quantile(0.75).item())} in the second half "
                f"is {number(late.median().item())} scales from its ideal, share {share:.1%}"
            )
            ideal = run.anchor(k)[0] if column.kind == "Anchored" else None
            change = anchored(run, k, ideal)
            if what == PERHAPS:
                change = f"if it should get better still, {change}"
            yield make(run, "miscalibrated", (g,), (begun, run.rows), sure, text, change)


PERHAPS = "too large, or it was satisfied from the start"
Scale = tuple[float, str, int]  # how sure, what is wrong with it, from which row


def _too_small(run: Digest, k: int) -> Scale:
    size, half, third = run.distance[:, k].abs(), run.rows // 2, run.rows // 3
    lowest = min(size[:half].nanquantile(0.25).item(), size[half:].nanquantile(0.25).item())  # else the values moved
    return max(ramp(lowest, *at.FAR), ramp(size[:third].nanquantile(0.25).item(), *at.LONG)), "too small", 0


def _too_large(run: Digest, k: int) -> Scale:
    """No sample ever used more than a small part of it. A goal satisfied from the start looks alike, so it takes raw
    that gets worse, or that fell far from where no training had left it, to be sure."""
    size, half = run.top(k).abs(), run.rows // 2
    if not size[:half].nanquantile(0.95) < at.UNUSED:
        return 0.0, "", 0
    share, line = run.share[half:, run.columns[k].goal].nanmean().item(), trend(run.distance[:, k])
    ends = [run.distance[rows, k].nanmean().item() for rows in (slice(0, run.width), slice(-run.width, None))]
    worsens = min(ramp(line.t, at.T_NONE, at.T_FULL), ramp(line.change, 0.0, size.nanmedian().item()))
    wander = smooth(run.distance[half:, k], run.width).std().nan_to_num().item()
    clear = ramp(ends[0] - ends[1], 2 * wander, 4 * wander + 1e-12)
    fell = min(clear, ramp(1 - ends[1] / ends[0], *at.FELL)) if ends[0] > 0 else 0.0
    sure = min(
        ramp(size[half:].nanquantile(0.75).item(), *at.NEAR), ramp(share, *at.SPARED), max(at.NEGLECT, worsens, fell)
    )
    return sure, "too large" if sure > at.NEGLECT else PERHAPS, 0


def _outgrown(run: Digest, k: int) -> Scale:
    size, half = run.distance[:, k], run.rows // 2
    if run.columns[k].kind != "Calibrated":
        return 0.0, "", 0
    past = (smooth(size, run.width) > at.OUTGROWN[0]).to(torch.int8)
    what = "outgrown: it was calibrated when the goal was easy"
    return ramp(size[half:].nanmedian().item(), *at.OUTGROWN), what, min(half, int(past.argmax()))


def pulling(run: Digest) -> Iterator[Finding]:
    """One goal has nearly all of the gradient's norm without nearly all samples.

    The gradient of goal g is share_g / scale_g times that of its raw value, which a history does not hold; the range
    of its values stands in for it.
    """
    pull, ranges = estimated_pull(run)
    g = int(pull.argmax())
    share = run.share.nanmean(0)[g].item()
    k = max(run.members(g), key=lambda k: ranges[k].item())
    if not run.columns[k].one_sided:
        return
    sure = min(ramp(pull[g].item(), *at.PULL), ramp(ranges[k].item(), *at.WIDE), ramp(share, *at.NOT_ALL))
    text = (
        f"{when(run, (0, run.rows))}: it has {share:.0%} of the samples but, by the range of its values "
        f"({number(ranges[k].item())} scales of {number(run.anchor(k)[1])}), about {pull[g]:.0%} of the gradient's norm"
    )
    yield make(run, "miscalibrated", (g,), (0, run.rows), sure, text, anchored(run, k, None))


def estimated_pull(run: Digest) -> tuple[Tensor, Tensor]:
    """[G] estimated parts of the gradient's norm; and [K] the range of each column's values in scales, over the steps
    or within a batch, in the half of the run where it is less: values that move away have no range."""
    half, ranges = run.rows // 2, []
    for k in range(len(run.columns)):
        away = run.distance[:, k]
        within = run.top(k) - away
        halves = [
            torch.fmax(away[rows].nanquantile(0.95) - away[rows].nanquantile(0.05), within[rows].nanmedian())
            for rows in (slice(half), slice(half, None))
        ]
        ranges.append(torch.fmin(*halves).nan_to_num())
    found = torch.stack(ranges)
    width = torch.stack([found[run.members(g)].mean() for g in range(len(run.goals))])
    pull = run.share.nanmean(0).nan_to_num() * width
    return pull / pull.sum().clamp(min=1e-300), found


def _limit(series: Tensor) -> float:
    """Where a series that approaches something at a steady rate is going (Aitken's extrapolation of three means)."""
    first, second, third = map(float, blocks(series, 3))
    before, after = second - first, third - second
    if abs(after) >= abs(before) or before * after <= 0:  # no approach: further, or back
        return math.copysign(math.inf, after) if before * after > 0 else third
    return third + after * after / (before - after)


def infeasible(run: Digest, g: int) -> Iterator[Finding]:
    """A box that raw stays outside of, although the goal holds gradient; or that it never was in at all."""
    for k in run.members(g):
        box = run.columns[k].box
        if box is None:
            continue
        raw = smooth(run.raw[:, k], run.width)
        runs = stretches((raw <= box[0]) | (raw >= box[1]))
        if not runs or runs[-1][1] < run.rows:
            continue
        a, b = runs[-1]
        share = run.share[a:b, g].nanmean().item()
        text = (
            f"{when(run, (a, b))}: {run.path(k, a, b)}, never inside ({number(box[0])}, {number(box[1])}), with "
            f"{share:.0%} of the gradient"
        )
        change = _wider(run.columns[k], raw[-1].item())
        yield make(run, "infeasible box", (g,), (a, b), _shut_out(run, k, (a, b), share), text, change)


def _shut_out(run: Digest, k: int, window: tuple[int, int], share: float) -> float:
    """How sure it is that raw cannot get into its box. Trained alone it was measured: no need to infer."""
    away, rows = run.distance[slice(*window), k], window[1] - window[0]
    tried = max(ramp(share, *at.TRIED), at.NEVER * (rows == run.rows))
    beyond = away[-run.width :].nanmean().item() - 1  # 0 at the edge
    arrives = _limit(away) < 1 and trend(away).t < -at.T_NONE
    sure = min(ramp(rows / run.rows, *at.OUTSIDE), tried, ramp(beyond, *at.BEYOND), at.ARRIVES if arrives else 1.0)
    alone, box = run.alone(k), run.columns[k].box
    if alone is None or box is None:
        return sure
    return min(sure, at.REACHED) if box[0] < alone < box[1] else 1.0
