"""`diagnose`: find the goals that keep a run from getting better."""

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
    """A sequence of findings, worst first. It prints as a table.

    Attributes:
        findings: tuple of the findings.
        steps: first and last step of the history.
        share: share of the gradient by goal over the whole run: the mean of the history's ``share``.
        pull: estimated part of the gradient's norm by goal, from ``share * range of raw / scale``.
        note: the reason why nothing can be said, or "".
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
        """The findings that are faults, not information."""
        return tuple(f for f in self.findings if not is_information(f.kind))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "steps": list(self.steps),
            "note": self.note,
            "share": {name: round(value, 4) for name, value in self.share.items()},
            "pull": {name: round(value, 4) for name, value in self.pull.items()},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @property
    def held(self) -> str:
        """A line that names the goals with the largest shares of the gradient."""
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
    """Find the goals that keep a run from getting better; give the cause, a confidence and a change for each.

    The evidence is the shares of the gradient (``share``), the raw values and the anchors. The docstring of
    `bomkern.diagnosis.thresholds` says how it is weighted. A diagnosis can be wrong: a history holds one run, and no
    gradients.

    Args:
        history: a history of T rows, ``GoalSet.history`` or `History.load`. Fewer than 20 rows are too few to judge.
        payoff: the result of `bomkern.probe`, or ``{"goals": K names, "table": K rows of K raw values}``, row i after
            training on goal i alone. With it, floors, conflicts and infeasible boxes are certain.

    Returns:
        The findings, worst first.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

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
    """Run all detectors."""
    goals = range(len(run.goals))
    arguments: dict[Each, list[tuple[int, ...]]] = {
        "run": [()],
        "goal": [(g,) for g in goals],
        "pair": list(itertools.combinations(goals, 2)),
    }
    for each, detector in DETECTORS:
        for indices in arguments[each]:
            yield from detector(run, *indices)


def _unexplained(findings: list[Finding]) -> list[Finding]:
    """Return the findings that no other finding of the same goal explains."""

    def explains(cause: Finding, f: Finding) -> bool:
        same = bool(f.goals) and f.goals[0] in cause.goals
        return same and f.kind in KINDS[cause.kind].explains and cause.confidence >= f.confidence / 2

    return [f for f in findings if not any(explains(cause, f) for cause in findings)]
