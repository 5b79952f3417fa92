"""The changes that `bomkern.diagnose` suggests. Constraints in them are code that can be pasted."""

from __future__ import annotations

import math

from . import thresholds
from .run_view import Column, RunView, number


def anchored(run: RunView, k: int, *, keep: bool = True, moving: bool = False) -> str:
    """Suggest anchors that fit the values in the history: "give realism Anchored(0.5, 1)".

    The nadir stays if it lies well beyond the ideal. A named ideal stays too, unless ``keep`` is False.
    """
    sign = run.columns[k].sign  # in what follows, larger values are worse
    values = sign * run.values(k)
    low, high = (values.quantile(q).item() if len(values) else 0.0 for q in (0.05, 0.95))
    old_ideal, scale = run.anchor(k)
    old_ideal *= sign
    ideal = old_ideal if keep and run.columns[k].named else low
    spread = max(high - low, 0.1 * abs(ideal), 1e-6)
    nadir = old_ideal + scale if math.isfinite(scale) else math.inf
    if not ideal + spread / 3 < nadir < ideal + 30 * spread:
        nadir = max(high, ideal + spread)
    return _anchors(run.columns[k], sign * ideal, sign * nadir, ", moving=True" * moving)


def raised(run: RunView, k: int, ideal: float) -> str:
    """Suggest an ideal that the goal can reach.

    A named nadir stays if that leaves half of the scale. Otherwise the scale stays, because a goal between a raised
    ideal and an old nadir would be so steep that it holds the gradient again.
    """
    column, (old_ideal, scale) = run.columns[k], run.anchor(k)
    keep = column.named and column.sign * (old_ideal - ideal) >= -scale / 2
    size = max(scale, 0.1 * abs(ideal), 1e-6)
    return _anchors(column, ideal, column.nadir(old_ideal, scale) if keep else column.nadir(ideal, size))


def _anchors(column: Column, ideal: float, nadir: float, more: str = "") -> str:
    return f"give {column.name} Anchored({number(ideal)}, {number(nadir)}{more})"


def reached(run: RunView, k: int) -> float:
    """Return the value that a goal reached: trained alone, if the payoff has it, else while it held the gradient."""
    alone = run.alone(k)
    if alone is not None:
        return alone
    held = run.raw[run.smooth_share[:, run.columns[k].goal] >= thresholds.HOLDS * run.largest_share, k]
    better = 0.75 if run.columns[k].direction < 0 else 0.25
    return (held if held.isfinite().any() else run.raw[:, k]).nanquantile(better).item()


def spread(run: RunView) -> str | None:
    """Suggest weights that leave every goal a part, where the rule leaves some goal nearly nothing; else None."""
    if len(run.goals) > 1 and run.least_share * len(run.goals) < thresholds.SCANT:
        return 'let every goal have a part of the gradient: GoalSet(..., spill="auto")'
    return None


def easier(run: RunView, k: int) -> str:
    """Suggest a limit, a box or an ideal that the goal can reach."""
    column, value = run.columns[k], reached(run, k)
    if column.box:
        return wider(column, value)
    if column.has_limit and column.direction:
        kind = "Upper" if column.direction > 0 else "Lower"
        return f"give {column.name} {kind}({number(value)}, {number(column.margin)})"
    return raised(run, k, value) if column.anchorable else f"ask less of {column.name}"


def wider(column: Column, value: float) -> str:
    """Suggest a wider box, in which a value lies two thirds of the way from the far end, or nearer the middle."""
    assert column.box
    low, high = column.box
    if value > (low + high) / 2:
        high = max(high, low + 1.5 * (value - low))
    else:
        low = min(low, high - 1.5 * (high - value))
    return f"give {column.name} Box({number(low)}, {number(high)})"


def stricter(column: Column) -> str:
    """Return a change that asks more of a satisfied goal."""
    if column.box:
        return "a narrower box"
    bound = "limit" if column.has_limit else "nadir"
    return f"a {'higher' if column.direction < 0 else 'lower'} {bound}"


def feed(run: RunView, holder: int, held: float, window: tuple[int, int]) -> str:
    """Suggest a change that gives a starved goal gradient: a share for all, or a reachable ideal for the holder."""
    rule, k = spread(run), run.worst_mover(holder, *window)
    if rule is not None:
        return rule
    if held >= thresholds.HOLDS * run.largest_share and run.columns[k].anchorable:
        return raised(run, k, reached(run, k))
    return f"give {run.columns[k].name} a wider scale, which makes its deficit smaller"


def follow(run: RunView, k: int) -> str:
    """Suggest a change for a moving target."""
    column = run.columns[k]
    if column.moving:
        return f"train the adversary of {column.name} more slowly, or measure its anchors more often"
    if not column.anchorable:
        return f"ask less of {column.name}, or train what it is measured against more slowly"
    change = f"{anchored(run, k, moving=True)} and measure its anchors (GoalSet.remeasure)"
    return change if spread(run) else f"if {column.name} became harder by itself, {change}"


def compromise(run: RunView, k: int, m: int) -> str:
    """Suggest a concession by one of two goals in conflict."""
    column, other = run.columns[m], run.columns[k]
    ideal, scale = run.anchor(m)
    if not column.anchorable or not math.isfinite(scale):
        return f"ask less of {column.name} or of {other.name}: they cannot both have what they want"
    return f"if {other.name} matters more, widen the other: {_anchors(column, ideal, column.nadir(ideal, 2 * scale))}"
