"""`diagnose`: which bucket has a hole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from ..goals.history import History
from . import one_goal as single
from . import thresholds as at
from . import two_goals as pairs
from .finding import Finding, make, when
from .run_view import Digest
from .trends import ramp, trend

NOTHING = "no bucket has a hole, as far as this run tells"
STRICTER = {"Upper": "a lower limit", "Lower": "a higher limit", "Box": "a narrower box"}
STRICTER["BoxAsymmetric"] = STRICTER["Box"]
# A locked goal is what these look like from outside; they say why.
EXPLAINS = ("infeasible box", "miscalibrated", "moving target", "conflict")


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
        return tuple(f for f in self.findings if f.kind != "idle")

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
        parts = [f"{name} {self.share[name]:.0%}" for name in order[:4] if self.share[name] >= at.STARVED]
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
    run = Digest(history, payoff)
    steps = run.steps(0, run.rows)
    if run.rows < at.LEAST_ROWS:
        note = (
            f"too little to judge: {run.rows} rows of {history.stride} steps, at least {at.LEAST_ROWS} rows are needed"
        )
        return Diagnosis((), steps, {}, {}, note)
    found = [f for f in _all(run) if f.confidence >= at.LEAST]
    best: dict[tuple[str, tuple[str, ...]], Finding] = {}
    for finding in sorted(found, key=lambda f: f.severity):
        best[finding.kind, finding.goals] = finding
    kept = _unexplained(list(best.values()))
    kept += [f for f in _idle(run) if not any(f.goals[0] in other.goals for other in kept)]
    order = {name: index for index, name in enumerate(run.goals)}
    kept.sort(key=lambda f: (-f.severity, f.kind, [order[name] for name in f.goals]))
    pull = single.estimated_pull(run)[0].tolist()
    share = run.share.nanmean(0).nan_to_num().tolist()
    return Diagnosis(
        kept,
        steps,
        dict(zip(run.goals, share, strict=True)),
        dict(zip(run.goals, pull, strict=True)),
    )


def _all(run: Digest) -> Iterator[Finding]:
    yield from _not_finite(run)
    for g in range(len(run.goals)):
        for detector in (single.infeasible, single.miscalibrated, single.moving, single.locked, single.starved):
            yield from detector(run, g)
        for j in range(g + 1, len(run.goals)):
            yield from pairs.conflict(run, g, j)
    yield from single.pulling(run)
    yield from pairs.collapse(run)


def _unexplained(found: list[Finding]) -> list[Finding]:
    """Without what another finding of the same goal explains."""
    causes = [f for f in found if f.kind in EXPLAINS]

    def explained(f: Finding) -> bool:
        return f.kind == "locked" and any(c.confidence >= f.confidence / 2 and f.goals[0] in c.goals for c in causes)

    return [f for f in found if not explained(f)]


def _idle(run: Digest) -> Iterator[Finding]:
    """Satisfied: no share over the second half, a high level, and raw not getting worse."""
    half = run.rows // 2
    for g in range(len(run.goals)):
        share, level = run.share[half:, g].nanmean().item(), run.level[half:, g].nanmean().item()
        line = trend(run.worse[half:, g])
        sure = min(
            ramp(share, 2 * at.STARVED, 0.0), ramp(level, *at.HIGH), 1 - ramp(line.t, 2, 4) * ramp(line.change, 0, 0.1)
        )
        if sure >= at.LEAST:
            k = run.mover(g, half, run.rows)
            path = run.path(k, half, run.rows)
            text = f"{when(run, (half, run.rows))}: share {share:.1%}, level {level:.2f}, {path}"
            change = f"none needed; {STRICTER.get(run.columns[k].kind, 'a lower nadir')} would ask more of it"
            yield make(run, "idle", (g,), (half, run.rows), sure, text, change)


def _not_finite(run: Digest) -> Iterator[Finding]:
    """Steps without a finite loss, and the goals at fault where the record still names them."""
    bad = run.finite < 1
    if not bad.any():
        return
    count = float((1 - run.finite).sum()) * run.history.stride
    lost = run.history["raw"].isfinite().logical_not()
    # Where all columns are NaN the row was joined from several steps, and nobody knows whose fault it was.
    named = lost & ~lost.all(1, keepdim=True) & bad[:, None]
    guilty = [g for g in range(len(run.goals)) if named[:, run.members(g)].any()]
    window = int(bad.nonzero().min()), int(bad.nonzero().max()) + 1
    sure = ramp(count / (run.rows * run.history.stride), *at.LOST)
    text = f"{when(run, window)}: {count:.0f} of them had no finite loss"
    change = "lower the learning rate, or clip the gradient's norm"
    for g in guilty:
        first = int(named[:, run.members(g)].any(1).nonzero().min())
        why = f"{text}; raw of {run.goals[g]} was not finite, first at step {run.steps(first, first + 1)[1]}"
        yield make(run, "not finite", (g,), window, sure, why, change)
    if not guilty:
        yield make(run, "not finite", (), window, sure, f"{text}; the record does not say of which goal", change)
