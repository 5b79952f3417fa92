"""The detectors of `bomkern.diagnose` for a whole run, and for the way its goals share the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import thresholds
from .finding import Finding, make, when
from .one_goal import MISCALIBRATED
from .registry import Kind, detects
from .run_view import RunView, number
from .suggestions import anchored, spread, stricter
from .trends import ramp, rhythm, smooth, stretches, trend

NOT_FINITE = Kind(
    "not finite",
    weight=1.0,
    meaning="steps were lost to NaN or infinity",
    explanation="The loss of some steps was NaN or infinite. The goals are named where the record still knows them.",
)
CROWDED = Kind(
    "crowded",
    weight=0.9,
    meaning="too many goals for the rule",
    explanation="The rule leaves the last goals nearly nothing, and most end hardly better than a trivial answer.",
    explains=("starved",),
)
COLLAPSE = Kind(
    "collapse",
    weight=0.85,
    meaning="the latent code is shut",
    explanation="A KL divergence fell to nearly nothing and stays there, so that the code says nothing.",
)
SWINGING = Kind(
    "swinging",
    weight=0.08,
    meaning="goals trade places",
    explanation="Shares rise and fall with a period: goals of nearly one deficit trade places in the rule's order.",
    information=True,
)
BEATEN = Kind(
    "past ideal",
    weight=0.1,
    meaning="better than ideal; move it",
    explanation="The raw value ends far better than the ideal, so that the goal asks for less than it has.",
    information=True,
)
IDLE = Kind(
    "idle",
    weight=0.05,
    meaning="satisfied; for information",
    explanation="The goal is satisfied and gets no gradient. Nothing needs to change.",
    information=True,
)


@detects(NOT_FINITE, each="run")
def not_finite(run: RunView) -> Iterator[Finding]:
    """Find steps without a finite loss, and the goals at fault if the record still names them."""
    bad = run.finite < 1
    if not bad.any():
        return
    count = float((1 - run.finite).sum()) * run.history.stride
    raw, owner = run.history["raw"], torch.tensor([column.goal for column in run.columns])
    # No sample has a column whose raw value is NaN, although it saw no number and its goal owns no sample.
    absent = raw.isnan() & (run.highest == -torch.inf) & (run.history["share"][:, owner] == 0)
    lost = raw.isfinite().logical_not() & ~absent
    # A row with NaN in all columns was joined from several steps, and does not tell which goal was at fault.
    named = lost & ~lost.all(1, keepdim=True) & bad[:, None]
    guilty = [g for g in range(len(run.goals)) if named[:, run.members(g)].any()]
    window = int(bad.nonzero().min()), int(bad.nonzero().max()) + 1
    sure = ramp(count / (run.rows * run.history.stride), *thresholds.LOST)
    text = f"{when(run, window)}: {count:.0f} of them had no finite loss"
    change = "lower the learning rate, or clip the gradient's norm"
    for g in guilty:
        first = int(named[:, run.members(g)].any(1).nonzero().min())
        why = f"{text}; raw of {run.goals[g]} was not finite, first at step {run.steps(first, first + 1)[1]}"
        yield make(run, NOT_FINITE, (g,), window, sure, why, change)
    if not guilty:
        yield make(run, NOT_FINITE, (), window, sure, f"{text}; the record does not say of which goal", change)


@detects(CROWDED, each="run")
def crowded(run: RunView) -> Iterator[Finding]:
    """Find a run in which most goals end badly off, under a rule that leaves some of them nearly nothing."""
    rule, a = spread(run), run.rows - run.rows // thresholds.LAST
    ends = run.deficit[a:].nanmean(0)
    ends = ends[ends.isfinite()]
    if rule is None or not len(ends):
        return
    middle = ends.median().item()
    least = min(middle, thresholds.CROWD[1])
    badly = [g for g in range(len(run.goals)) if run.deficit[a:, g].nanmean() >= least]
    share = run.share[a:, badly].nanmean(0).nan_to_num()
    text = (
        f"{when(run, (a, run.rows))}: {len(badly)} of {len(run.goals)} goals end with deficits of {least:.2g} and "
        f"more, and have from {float(share.min()):.1%} of the gradient; the rule leaves the last {run.least_share:.1%}"
    )
    sure = min(ramp(len(run.goals), *thresholds.MANY), ramp(middle, *thresholds.CROWD))
    yield make(run, CROWDED, tuple(badly), (0, run.rows), sure, text, rule)


@detects(COLLAPSE, each="run")
def collapse(run: RunView) -> Iterator[Finding]:
    """Find a KL that falls to nearly nothing and stays there. It is surer if a goal that counts units confirms it."""
    kls = [k for k, c in enumerate(run.columns) if thresholds.KL.search(c.name)]
    units = [k for k, c in enumerate(run.columns) if thresholds.UNITS.search(c.name) and k not in kls]
    for k in kls:
        smoothed = smooth(run.raw[:, k], run.width)
        seen = smoothed[smoothed.isfinite()]
        peak = seen.max().item() if len(seen) else 0.0
        runs = stretches(smoothed < thresholds.GONE * peak)
        if peak <= 0 or not runs or runs[-1][1] < run.rows:
            continue
        a, b = runs[-1]
        shut = [u for u in units if _shut(run, u)]
        left = run.values(k, a).median().item()
        sure = min(
            ramp((b - a) / run.rows, *thresholds.SPAN), ramp(left, *thresholds.EMPTY), 1.0 if shut else thresholds.ALONE
        )
        text = f"{when(run, (a, b))}: raw {number(left)}, at most {left / peak:.1%} of the {number(peak)} that it was"
        if shut:
            end = number(run.values(shut[0], a).median().item())
            text += f"; {run.columns[shut[0]].name} {end}: units are inactive"
        goals = (run.columns[k].goal, *[run.columns[u].goal for u in shut[:1]])
        half = number(peak / 2)
        change = f"give {run.columns[k].name} Upper({half}, {half}), so that what is below costs nothing"
        yield make(run, COLLAPSE, tuple(dict.fromkeys(goals)), (a, b), sure, text, change)


def _shut(run: RunView, k: int) -> bool:
    """Return whether a fraction of units has nearly reached the worse of 0 and 1."""
    values = run.values(k, run.rows * 3 // 4)
    if not len(values):
        return False
    end = values.median().item()
    return end < thresholds.NEARLY if run.columns[k].direction < 0 else end > 1 - thresholds.NEARLY


@detects(MISCALIBRATED, each="run")
def pulling(run: RunView) -> Iterator[Finding]:
    """Find a goal that has nearly all of the gradient's norm without nearly all samples.

    The gradient of goal g is share_g / scale_g times that of its raw value. A history does not hold the latter, so the
    range of the raw values replaces it.
    """
    pull, ranges = estimated_pull(run)
    g = int(pull.argmax())
    share = run.share.nanmean(0)[g].item()
    k = max(run.members(g), key=lambda k: ranges[k].item())
    if not run.columns[k].anchorable:
        return
    sure = min(
        ramp(pull[g].item(), *thresholds.PULL),
        ramp(ranges[k].item(), *thresholds.WIDE),
        ramp(share, *thresholds.NOT_ALL),
    )
    text = (
        f"{when(run, (0, run.rows))}: it has {share:.0%} of the samples but, by the range of its values "
        f"({number(ranges[k].item())} scales of {number(run.anchor(k)[1])}), about {pull[g]:.0%} of the gradient's norm"
    )
    yield make(run, MISCALIBRATED, (g,), (0, run.rows), sure, text, anchored(run, k, keep=False))


def estimated_pull(run: RunView) -> tuple[Tensor, Tensor]:
    """Return the estimated part of the gradient's norm of each goal, [G], and the range of each column in scales, [K].

    The range is that over the steps or within a batch, whichever is larger, in the half of the run where it is smaller:
    values that move steadily count as having a small range.
    """
    half, ranges = run.rows // 2, []
    for k in range(len(run.columns)):
        away = run.distance[:, k]
        within = run.worst_distance(k) - away
        halves = [
            torch.fmax(away[rows].nanquantile(0.95) - away[rows].nanquantile(0.05), within[rows].nanmedian())
            for rows in (slice(half), slice(half, None))
        ]
        ranges.append(torch.fmin(*halves).nan_to_num())
    columns = torch.stack(ranges)
    width = torch.stack([columns[run.members(g)].mean() for g in range(len(run.goals))])
    pull = run.share.nanmean(0).nan_to_num() * width
    return pull / pull.sum().clamp(min=1e-300), columns


@detects(SWINGING, each="run")
def swinging(run: RunView) -> Iterator[Finding]:
    """Find goals whose shares rise and fall with a period in the second half of the run."""
    half = run.rows // 2
    found: dict[int, tuple[float, int]] = {}  # by goal: confidence, period in rows
    for g in range(len(run.goals)):
        share = run.share[half:, g]
        period, regular = rhythm(share)
        width = float((share - share.nanmean()).square().nanmean().sqrt())
        sure = min(ramp(regular, *thresholds.RHYTHM), ramp(width, *thresholds.SWING))
        if sure >= thresholds.LEAST:
            found[g] = sure, period
    if not found:
        return
    goals = sorted(found, key=lambda g: -found[g][0])
    sure, period = found[goals[0]]
    low, high = (float(run.share[half:, goals[0]].nanquantile(q)) for q in (0.05, 0.95))
    text = (
        f"{when(run, (half, run.rows))}: the share of {run.goals[goals[0]]} swings between {low:.0%} and {high:.0%} "
        f"about every {period * run.history.stride} steps"
    )
    change = 'none needed; GoalSet(..., spill="auto") would move the weights slowly'
    yield make(run, SWINGING, tuple(sorted(goals)), (half, run.rows), sure, text, change)


@detects(BEATEN, each="goal")
def beaten(run: RunView, g: int) -> Iterator[Finding]:
    """Find a column that ends far better than its ideal, which says nothing of limits and boxes."""
    for k in run.members(g):
        excess, sure = _beats(run, k)
        if sure < thresholds.LEAST:
            continue
        name, window = run.columns[k].name, (run.rows - run.rows // thresholds.LAST, run.rows)
        text = (
            f"{when(run, window)}: {name} beats its ideal: raw {number(run.values(k, window[0]).mean().item())} is "
            f"{excess:.1f} scales better than {number(run.anchor(k)[0])}"
        )
        change = f"move it: {anchored(run, k, keep=False)}"
        yield make(run, BEATEN, (g,), window, sure, text, change)


def _beats(run: RunView, k: int) -> tuple[float, float]:
    """Return by how many scales a column ends better than its ideal, and the confidence that this is too much."""
    excess = -run.distance[-(run.rows // thresholds.LAST) :, k].nanmean().item()
    return excess, ramp(excess, *thresholds.BEATEN) if run.columns[k].anchorable else 0.0


@detects(IDLE, each="goal")
def idle(run: RunView, g: int) -> Iterator[Finding]:
    """Find a satisfied goal: no share over the second half, a high level, and raw that does not get worse."""
    if any(_beats(run, k)[1] >= thresholds.LEAST for k in run.members(g)):
        return
    half = run.rows // 2
    share, level = run.share[half:, g].nanmean().item(), run.level[half:, g].nanmean().item()
    line = trend(run.worse[half:, g])
    sure = min(
        ramp(share, 2 * thresholds.STARVED, 0.0),
        ramp(level, *thresholds.HIGH),
        1 - ramp(line.t, 2, 4) * ramp(line.change, 0, 0.1),
    )
    if sure >= thresholds.LEAST:
        k = run.worst_mover(g, half, run.rows)
        text = f"{when(run, (half, run.rows))}: share {share:.1%}, level {level:.2f}, {run.course(k, half, run.rows)}"
        change = f"none needed; {stricter(run.columns[k])} would ask more of it"
        yield make(run, IDLE, (g,), (half, run.rows), sure, text, change)
