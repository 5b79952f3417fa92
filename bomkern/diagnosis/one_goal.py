"""The detectors of `bomkern.diagnose` for single goals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import thresholds
from .finding import Finding, make, when
from .registry import Kind, detects
from .run_view import RunView, number
from .suggestions import anchored, easier, feed, follow, spread, wider
from .trends import blocks, last_rise, ramp, rise, smooth, stretches, trend

INFEASIBLE = Kind(
    "infeasible box",
    weight=0.95,
    meaning="raw cannot get inside",
    explanation="The raw value stays outside its box although the goal has gradient, or was never inside.",
    explains=("locked",),
)
MISCALIBRATED = Kind(
    "miscalibrated",
    weight=0.9,
    meaning="its scale does not fit its values",
    explanation="The scale does not fit the values seen, or gives the goal nearly all of the gradient's norm.",
    explains=("locked",),
)
MOVING = Kind(
    "moving target",
    weight=0.9,
    meaning="gets worse although it has the gradient",
    explanation="The raw value gets worse although the goal has the gradient, or its measured anchors drift away.",
    explains=("locked",),
)
LOCKED = Kind(
    "locked",
    weight=0.9,
    meaning="holds the gradient at a floor",
    explanation="The goal holds the gradient without getting better, and the others get little or none.",
)
STARVED = Kind(
    "starved",
    weight=0.6,
    meaning="no gradient while it gets worse",
    explanation="The goal has no share of the gradient, gets worse and ends badly off.",
)


def _holding(run: RunView, g: int, share: float) -> Iterator[tuple[int, int]]:
    """Yield windows in which a goal holds at least ``share`` of the gradient that the rule gives to one goal."""
    for a, b in stretches(run.smooth_share[:, g] >= share * run.largest_share, run.width):
        if b - a >= max(run.least_window, thresholds.SPAN[0] * run.rows):
            yield a, b


@detects(STARVED, each="goal")
def starved(run: RunView, g: int) -> Iterator[Finding]:
    """Find a goal without a share while raw gets worse, that ends badly off: it was not just waiting for its turn."""
    for a, b in stretches(run.own_share[:, g] < thresholds.STARVED, run.width // 2):
        if b - a < run.least_window:
            continue
        # From its best value to the end: a loss that it recovers without gradient is noise between batches.
        low = a + last_rise(smooth(run.worse[a:b, g], run.width))
        if b - low < run.least_window:
            continue
        line, end = trend(run.worse[low:b, g]), run.deficit[b - run.width : b, g].nanmean().item()
        sure = min(
            ramp(line.t, thresholds.T_NONE, thresholds.T_FULL),
            ramp((b - low) / run.rows, *thresholds.SPAN),
            ramp(line.change, *thresholds.CHANGE),
            ramp(end, *thresholds.HARM),
        )
        holder, held = run.holder(low, b)
        k, share = run.worst_mover(g, low, b), run.share[low:b, g].nanmean().item()
        text = (
            f"{when(run, (low, b))}: share {share:.1%}, {run.course(k, low, b)} (t = {line.t:.1f}); "
            f"{run.goals[holder]} had {held:.0%} of the gradient"
        )
        yield make(run, STARVED, (g,), (low, b), sure, text, feed(run, holder, held, (low, b)))


@detects(MOVING, each="goal")
def moving(run: RunView, g: int) -> Iterator[Finding]:
    """Find a goal whose raw value gets worse while it holds the gradient, or whose anchors drift."""
    for a, b in _holding(run, g, thresholds.PART[0]):
        low, high = (a + i for i in rise(smooth(run.worse[a:b, g], run.width)))
        if high - low < run.least_window:
            continue
        line, share = trend(run.worse[low:high, g]), run.share[low:high, g].nanmean().item()
        sure = min(
            ramp(line.t, thresholds.T_NONE, thresholds.T_FULL),
            ramp((high - low) / run.rows, *thresholds.SPAN),
            ramp(line.change, *thresholds.CLIMB),
            ramp(share, *thresholds.PART),
        )
        k = run.worst_mover(g, low, high)
        text = (
            f"{when(run, (low, high))}: {run.course(k, low, high)} (t = {line.t:.1f}) although it had {share:.0%} of "
            "the gradient"
        )
        yield make(run, MOVING, (g,), (low, high), sure, text, follow(run, k))
    for k in run.members(g):
        if run.columns[k].moving:
            yield from _drifting(run, k)


def _drifting(run: RunView, k: int) -> Iterator[Finding]:
    """Find a column whose measured anchors drift from their first values."""
    low, high = run.ideal[:, k], run.columns[k].nadir(run.ideal[:, k], run.scale[:, k])
    known = (low.isfinite() & high.isfinite()).nonzero()[:, 0].tolist()
    if not known:
        return
    first, last = known[0], known[-1]
    away = torch.maximum((low - low[first]).abs(), (high - high[first]).abs()) / run.scale[first, k]
    sure = ramp(away[last].item(), *thresholds.DRIFT)
    begun = int((away > thresholds.CHANGE[0]).to(torch.int8).argmax())
    was, now = (f"({number(low[i].item())}, {number(high[i].item())})" for i in (first, last))
    text = (
        f"{when(run, (begun, run.rows))}: its anchors drifted from {was} to {now}, {away[last]:.1f} of its first scale"
    )
    change = f"train what {run.columns[k].name} is measured against more slowly"
    yield make(run, MOVING, (run.columns[k].goal,), (begun, run.rows), sure, text, change)


@detects(LOCKED, each="goal")
def locked(run: RunView, g: int) -> Iterator[Finding]:
    """Find a goal that holds the gradient with the largest deficit, does not improve, and keeps others from it."""
    others = [o for o in range(len(run.goals)) if o != g]
    for a, b in _holding(run, g, thresholds.LOCKED[0]):
        a = _settled(run, g, a, b)
        if b - a < run.least_window or not others:
            continue
        share, deficits = run.share[a:b, g].nanmean().item(), run.deficit[a:b].nanmean(0)
        height, moved = deficits[g].item(), abs(trend(run.worse[a:b, g]).change)
        gap = height - deficits[others].nan_to_num(-math.inf).max().item()
        wait = sum(not _improves(run, o, a, b) for o in others)
        rule = spread(run) if run.largest_share == 1 else None  # by order the others have their part
        alone = thresholds.CARRIED[rule is None]
        advice = f"{rule}; or, if it cannot get better," if rule else "if it cannot get better,"
        sure = min(
            ramp(share / run.largest_share, *thresholds.LOCKED),
            ramp((b - a) / run.rows, *thresholds.SPAN),
            ramp(moved, max(thresholds.CHANGE[1], thresholds.STILL * height), thresholds.CHANGE[0]),
            ramp(gap, *thresholds.GAP),
            alone + (1 - alone) * ramp(wait / len(others), *thresholds.WAIT),
            1 - _goes_on(run.worse[a:b, g], height),
        )
        k = max(run.members(g), key=lambda k: run.distance[a:b, k].nanmean().item())
        text = (
            f"{when(run, (a, b))}: {share:.0%} of the gradient, yet {run.course(k, a, b)} of an ideal "
            f"{number(run.anchor(k)[0])}; deficit {height:.2g}, {gap:.2g} above the next; {wait} of {len(others)} "
            "others improve little or not"
        )
        yield make(run, LOCKED, (g,), (a, b), sure, text, f"{advice} {easier(run, k)}")


def _goes_on(series: Tensor, height: float) -> float:
    """Return the confidence that a goal is slow, not locked: it gets better, and at its pace has far to go."""
    ahead = blocks(series, 3)[-1].item() - _limit(series)
    return min(ramp(-trend(series).t, thresholds.T_NONE, thresholds.T_FULL), ramp(ahead / height, *thresholds.GOES_ON))


def _settled(run: RunView, g: int, a: int, b: int) -> int:
    """Return the row from which on a goal that holds the gradient does not get better, or b if it always does."""
    for eighth in range(6):
        start = a + (b - a) * eighth // 8
        height = run.deficit[start:b, g].nanmean().item()
        if trend(run.worse[start:b, g]).change > -max(thresholds.CHANGE[0], thresholds.CHANGE[0] * height):
            return start
    return b


def _improves(run: RunView, g: int, a: int, b: int) -> bool:
    """Return whether a goal improves much. Shared parameters alone improve it a little."""
    line, start = trend(run.worse[a:b, g]), run.worse[a : a + run.width, g].nanmean().item()
    return line.change < -max(thresholds.CLIMB[0], start / 3) and line.t < -thresholds.T_NONE


@detects(MISCALIBRATED, each="goal")
def miscalibrated(run: RunView, g: int) -> Iterator[Finding]:
    """Find a scale that does not fit the values in the second half of the run."""
    half = run.rows // 2
    for k in run.members(g):
        column, away = run.columns[k], run.distance[:, k]
        late = away[half:][away[half:].isfinite()].abs()
        if not column.anchorable or not len(late):
            continue
        sure, fault, begun = max(_too_small(run, k), _too_large(run, k), _outgrown(run, k))
        if sure > 0:
            share, values = run.share[half:, g].nanmean().item(), run.values(k, half)
            text = (
                f"{when(run, (begun, run.rows))}: its scale {number(run.anchor(k)[1])} is {fault}; raw "
                f"{number(values.quantile(0.25).item())} to {number(values.quantile(0.75).item())} in the second half "
                f"is {number(late.median().item())} scales from its ideal, share {share:.1%}"
            )
            change = anchored(run, k)
            if fault == PERHAPS:
                change = f"if it should get better still, {change}"
            yield make(run, MISCALIBRATED, (g,), (begun, run.rows), sure, text, change)


PERHAPS = "too large, or it was satisfied from the start"
Scale = tuple[float, str, int]  # confidence, fault, first row


def _too_small(run: RunView, k: int) -> Scale:
    size, half, third = run.distance[:, k].abs(), run.rows // 2, run.rows // 3
    # In both halves, since values that move are far for a while.
    lowest = min(size[:half].nanquantile(0.25).item(), size[half:].nanquantile(0.25).item())
    return (
        max(ramp(lowest, *thresholds.FAR), ramp(size[:third].nanquantile(0.25).item(), *thresholds.LONG)),
        "too small",
        0,
    )


def _too_large(run: RunView, k: int) -> Scale:
    """Judge a scale of which no sample used more than a small part.

    A goal that was satisfied from the start looks the same. Full confidence needs raw that gets worse, or that fell far
    from its value without training.
    """
    size, half = run.worst_distance(k).abs(), run.rows // 2
    if not size[:half].nanquantile(0.95) < thresholds.UNUSED:
        return 0.0, "", 0
    share, line = run.share[half:, run.columns[k].goal].nanmean().item(), trend(run.distance[:, k])
    ends = [run.distance[rows, k].nanmean().item() for rows in (slice(0, run.width), slice(-run.width, None))]
    worsens = min(ramp(line.t, thresholds.T_NONE, thresholds.T_FULL), ramp(line.change, 0.0, size.nanmedian().item()))
    wander = smooth(run.distance[half:, k], run.width).std().nan_to_num().item()
    clear = ramp(ends[0] - ends[1], 2 * wander, 4 * wander + 1e-12)
    fell = min(clear, ramp(1 - ends[1] / ends[0], *thresholds.FELL)) if ends[0] > 0 else 0.0
    sure = min(
        ramp(size[half:].nanquantile(0.75).item(), *thresholds.NEAR),
        ramp(share, *thresholds.SPARED),
        max(thresholds.NEGLECT, worsens, fell),
    )
    return sure, "too large" if sure > thresholds.NEGLECT else PERHAPS, 0


def _outgrown(run: RunView, k: int) -> Scale:
    size, half = run.distance[:, k], run.rows // 2
    if not run.columns[k].calibrated:
        return 0.0, "", 0
    past = (smooth(size, run.width) > thresholds.OUTGROWN[0]).to(torch.int8)
    fault = "outgrown: it was calibrated when the goal was easy"
    return ramp(size[half:].nanmedian().item(), *thresholds.OUTGROWN), fault, min(half, int(past.argmax()))


def _limit(series: Tensor) -> float:
    """Return the limit of a series that converges at a steady rate, by Aitken's extrapolation of three means."""
    first, second, third = map(float, blocks(series, 3))
    before, after = second - first, third - second
    if abs(after) >= abs(before) or before * after <= 0:  # it does not converge, or turns back
        return math.copysign(math.inf, after) if before * after > 0 else third
    return third + after * after / (before - after)


@detects(INFEASIBLE, each="goal")
def infeasible(run: RunView, g: int) -> Iterator[Finding]:
    """Find a box that raw stays outside of although the goal has gradient, or in which raw never was."""
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
            f"{when(run, (a, b))}: {run.course(k, a, b)}, never inside ({number(box[0])}, {number(box[1])}), with "
            f"{share:.0%} of the gradient"
        )
        change = wider(run.columns[k], raw[-1].item())
        yield make(run, INFEASIBLE, (g,), (a, b), _shut_out(run, k, (a, b), share), text, change)


def _shut_out(run: RunView, k: int, window: tuple[int, int], share: float) -> float:
    """Return the confidence that raw cannot get into its box. A payoff table, which has measured it, decides."""
    away, rows = run.distance[slice(*window), k], window[1] - window[0]
    tried = max(ramp(share, *thresholds.TRIED), thresholds.NEVER * (rows == run.rows))
    beyond = away[-run.width :].nanmean().item() - 1  # 0 at the edge
    arrives = _limit(away) < 1 and trend(away).t < -thresholds.T_NONE
    sure = min(
        ramp(rows / run.rows, *thresholds.OUTSIDE),
        tried,
        ramp(beyond, *thresholds.BEYOND),
        thresholds.ARRIVES if arrives else 1.0,
    )
    alone, box = run.alone(k), run.columns[k].box
    if alone is None or box is None:
        return sure
    return min(sure, thresholds.REACHED) if box[0] < alone < box[1] else 1.0
