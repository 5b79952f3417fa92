"""`diagnose`: which bucket has a hole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from ..goals.history import History
from . import one_goal, thresholds, two_goals, whole_run
from .finding import Finding
from .registry import DETECTORS, KINDS, Each, is_information
from .run_view import RunView

NOTHING = "no bucket has a hole, as far as this run tells"
DETECTING = one_goal, two_goals, whole_run  # modules whose import registers the detectors


class Diagnosis(Sequence[Finding]):
    """Findings, worst first. Prints as a table.

    Attributes:
        findings: a tuple of them.
        steps: steps of the history that was read, first and last.
        share: by goal, who really got the gradient over the whole run: the mean of the history's ``share``.
        pull: by goal, its part of the gradient's norm as estimated from ``share * range of raw / scale``.
        note: why there is nothing to say, or "".
    """

    def __init__(
        self,
        findings: Sequence[Finding],
        steps: tuple[int, int],
        share: Mapping[str, float],
        pull: Mapping[str, float],
        note: str = "",
    ) -> None:
        self.findings, self.steps, self.note = tuple(findings), steps, note
        self.share, self.pull = dict(share), dict(pull)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are more than information."""
        return tuple(f for f in self.findings if not is_information(f.kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "steps": list(self.steps),
            "note": self.note,
            "share": {name: round(value, 4) for name, value in self.share.items()},
            "pull": {name: round(value, 4) for name, value in self.pull.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @property
    def held(self) -> str:
        """One line on who held the gradient."""
        order = sorted(self.share, key=lambda name: -self.share[name])
        parts = [f"{name} {self.share[name]:.0%}" for name in order[:4] if self.share[name] >= thresholds.STARVED]
        return f"the gradient went to {', '.join(parts)}" if parts else ""

    def __str__(self) -> str:
        span = f"steps {self.steps[0]} to {self.steps[1]}: " if self.steps[1] >= self.steps[0] else ""
        title = f"{span}{self.note or self.held}"
        if not self.findings:
            return title + ("" if self.note else f"\n{NOTHING}")
        rows = [("", "kind", "goal", "steps", "sure")]
        rows += [
            (str(n), f.kind, f.goal, f"{f.first}-{f.last}", f"{f.confidence:.0%}")
            for n, f in enumerate(self.findings, 1)
        ]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        table = [title, lines[0]]
        for line, finding in zip(lines[1:], self.findings, strict=True):
            table += [line, f"{'':{widths[0]}}  {finding.evidence}", f"{'':{widths[0]}}  -> {finding.suggestion}"]
        return "\n".join(table)

    __repr__ = __str__


def diagnose(history: History, *, payoff: Any = None) -> Diagnosis:
    """Say which goals keep a run from getting better, why, how sure that is, and what to change.

    Reads who got the gradient (``share``), the raw values and the anchors; what counts as evidence, and how much, is in
    the docstring of `bomkern.diagnosis.thresholds`. It can be wrong: a history holds one run, and no gradients.

    Args:
        history: of T rows, ``GoalSet.history`` or `History.load`. With fewer than 20 rows there is too little to judge.
        payoff: what `bomkern.probe` returned, or ``{"goals": K names, "table": K rows of K raw values}``, row i after
            training on goal i alone. It tells floors, conflicts and infeasible boxes for certain.

    Raises:
        TypeError, ValueError: an argument that cannot serve, named in the message.

    Example:
        >>> print(diagnose(goals.history))
    """
    if not isinstance(history, History):
        raise TypeError(f"history must be a History, got {type(history).__name__}")
    run = RunView(history, payoff)
    steps = run.steps(0, run.rows)
    if run.rows < thresholds.LEAST_ROWS:
        needed = f"at least {thresholds.LEAST_ROWS} rows are needed"
        note = f"too little to judge: {run.rows} rows of {history.stride} steps, {needed}"
        return Diagnosis((), steps, {}, {}, note)
    best: dict[tuple[str, tuple[str, ...]], Finding] = {}
    for finding in sorted(_findings(run), key=lambda f: f.severity):
        best[finding.kind, finding.goals] = finding
    faults = [f for f in best.values() if not is_information(f.kind) and f.confidence >= thresholds.LEAST]
    kept = _unexplained(faults)
    with_fault = {name for f in kept for name in f.goals}
    kept += [f for f in best.values() if is_information(f.kind) and with_fault.isdisjoint(f.goals)]
    order = {name: index for index, name in enumerate(run.goals)}
    kept.sort(key=lambda f: (-f.severity, f.kind, [order[name] for name in f.goals]))
    pull = whole_run.estimated_pull(run)[0].tolist()
    share = run.share.nanmean(0).nan_to_num().tolist()
    return Diagnosis(
        kept,
        steps,
        dict(zip(run.goals, share, strict=True)),
        dict(zip(run.goals, pull, strict=True)),
    )


def _findings(run: RunView) -> Iterator[Finding]:
    goals = range(len(run.goals))
    arguments: dict[Each, list[tuple[int, ...]]] = {
        "run": [()],
        "goal": [(g,) for g in goals],
        "pair": list(itertools.combinations(goals, 2)),
    }
    for each, detector in DETECTORS:
        for indices in arguments[each]:
            yield from detector(run, *indices)


def _unexplained(found: list[Finding]) -> list[Finding]:
    """Return the findings that no other finding of the same goal explains."""

    def explains(cause: Finding, f: Finding) -> bool:
        same = bool(f.goals) and f.goals[0] in cause.goals
        return same and f.kind in KINDS[cause.kind].explains and cause.confidence >= f.confidence / 2

    return [f for f in found if not any(explains(cause, f) for cause in found)]
