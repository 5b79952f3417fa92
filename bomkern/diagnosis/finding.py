"""`Finding`: one result of `bomkern.diagnose`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import thresholds
from .registry import Kind
from .run_view import RunView


class Finding(NamedTuple):
    """A fault of a run, or information about it.

    Attributes:
        kind: the kind in one or two words: "locked", "starved". The docs list all kinds, under "Moving targets".
        goals: names of the goals concerned: one, two for a conflict, all that a crowd leaves badly off; none if the
            record does not tell.
        first, last: steps, counted from 1.
        confidence: in [0, 1]; see the docstring of `bomkern.diagnosis.thresholds`.
        severity: in [0, 1]; findings are sorted by it.
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
        """The names of the goals in one string; of more than two, their number."""
        return f"{len(self.goals)} goals" if len(self.goals) > 2 else " and ".join(self.goals) or "?"

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "goals": list(self.goals)}


def make(
    run: RunView,
    kind: Kind,
    goals: tuple[int, ...],
    window: tuple[int, int],
    sure: float,
    evidence: str,
    suggestion: str,
) -> Finding:
    """Return a finding about goals, by index, over rows ``[a, b)``, with its confidence and severity."""
    confidence = thresholds.SUREST * sure
    severity = kind.weight * confidence * math.sqrt((window[1] - window[0]) / run.rows)
    names = tuple(run.goals[g] for g in goals)
    return Finding(
        kind.name, names, *run.steps(*window), round(confidence, 3), round(severity, 4), evidence, suggestion
    )


def when(run: RunView, window: tuple[int, int]) -> str:
    """Return "steps 1 to 400" for rows ``[a, b)``."""
    first, last = run.steps(*window)
    return f"steps {first} to {last}"
