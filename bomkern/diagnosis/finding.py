"""What `bomkern.diagnose` finds, and how its sentences are made."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import thresholds as at
from .run_view import Digest, number


class Finding(NamedTuple):
    """One thing that is wrong with a run, or worth knowing.

    Attributes:
        kind: one of "not finite", "infeasible box", "miscalibrated", "moving target", "locked" (by a floor),
            "collapse", "conflict", "starved", "idle" (satisfied: for information only).
        goals: the names it is about: one, or two for a conflict; none where the record no longer says.
        first, last: steps, counted from 1.
        confidence: in [0, 1]; how it comes about is in the docstring of `bomkern.diagnosis.thresholds`.
        severity: in [0, 1], what findings are ranked by.
        evidence: one sentence with steps and values.
        suggestion: one change to make.
    """

    kind: str
    goals: tuple[str, ...]
    first: int
    last: int
    confidence: float
    severity: float
    evidence: str
    suggestion: str

    @property
    def goal(self) -> str:
        """The names in one string."""
        return " and ".join(self.goals) or "?"

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "goals": list(self.goals)}


def make(
    run: Digest, kind: str, goals: tuple[int, ...], window: tuple[int, int], sure: float, evidence: str, suggestion: str
) -> Finding:
    confidence = at.SUREST * sure
    severity = at.WEIGHT[kind] * confidence * math.sqrt((window[1] - window[0]) / run.rows)
    names = tuple(run.goals[g] for g in goals)
    return Finding(kind, names, *run.steps(*window), round(confidence, 3), round(severity, 4), evidence, suggestion)


def when(run: Digest, window: tuple[int, int]) -> str:
    first, last = run.steps(*window)
    return f"steps {first} to {last}"


def anchored(run: Digest, column: int, ideal: float | None, moving: bool = False) -> str:
    """ "give realism Anchored(0.5, 1)": the nadir it has, if that lies well beyond the ideal, else what it has seen."""
    values = run.values(column)
    low, high = (values.quantile(q).item() if len(values) else 0.0 for q in (0.05, 0.95))
    ideal = low if ideal is None else ideal
    old_ideal, scale = run.anchor(column)
    spread = max(high - low, 0.1 * abs(ideal), 1e-6)
    nadir = old_ideal + scale if math.isfinite(scale) else math.inf
    if not ideal + spread / 3 < nadir < ideal + 30 * spread:
        nadir = max(high, ideal + spread)
    return _give(run, column, ideal, nadir, ", moving=True" * moving)


def raised(run: Digest, column: int, ideal: float) -> str:
    """ "give realism Anchored(0.5, 1)", an ideal that it can reach. A nadir that was named stays if that leaves half of
    the scale. Else the scale stays: between an ideal raised to where it is and an old nadir, the goal would be so steep
    that it held the gradient again."""
    old_ideal, scale = run.anchor(column)
    named = run.columns[column].kind == "Anchored" and old_ideal + scale >= ideal + scale / 2
    return _give(run, column, ideal, old_ideal + scale if named else ideal + max(scale, 0.1 * abs(ideal), 1e-6))


def _give(run: Digest, column: int, ideal: float, nadir: float, more: str = "") -> str:
    return f"give {run.columns[column].name} Anchored({number(ideal)}, {number(nadir)}{more})"
