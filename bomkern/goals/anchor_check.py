"""`GoalSet.check`: compare the anchors of a `bomkern.GoalSet` with the raw values of a batch, before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from ..common.devices import widest_float
from ..constraints import BARRIER, HARD
from ..lazy_goals.evaluate import Evaluation
from ..lazy_goals.lazy import Lazy
from ..reference import deficit
from ..reference.min_goal import codes_of, matrix_of
from .constraint_info import ConstraintInfo
from .looks import all_rows
from .policies import SOURCES, Anchored
from .presence import Masks
from .raw_values import Raw
from .watched import split_step

if TYPE_CHECKING:
    from .goal_set import GoalSet

APART = 100.0  # deficits of two goals that differ by more are not in one unit
FAR = 0.1  # a goal whose first deficit is lower may never come near its nadir
BEYOND = -0.05  # a mean deficit above it can be chance: a statistic of a batch scatters around its floor
CHANCE = 1.0  # a raw value that differs from its ideal by this part of it may do so by chance: a floor is crude
UNTRAINED = "training makes it worse at first, as it does a KL, or the covariance of a code that has not spread yet"
FITS = "every anchor fits"


class AnchorFinding(NamedTuple):
    """A goal whose anchors do not fit a batch. It prints as one line.

    Attributes:
        kind: "unknown", "not finite", "better than its ideal", "far beyond its nadir" or "far from its nadir".
        goal: the name, or "group.member".
        raw: mean of the raw values that are finite; NaN if there are none.
        deficit: mean of their deficits; NaN if it is unknown.
        seen: what was seen, in a sentence.
        use: what to use in its place: an `Anchored` or another constraint as code, if the batch tells one.
    """

    kind: str
    goal: str
    raw: float
    deficit: float
    seen: str
    use: str

    def __str__(self) -> str:
        return f"{self.goal}: {self.seen}; use {self.use}"


class AnchorCheck(Sequence[AnchorFinding]):
    """The findings of `GoalSet.check`, in the order of the goals. It prints a line for each, and is falsy without any.

    Attributes:
        findings: tuple of the findings.
        deficits: the mean deficit of every goal or member, by name; NaN where it is unknown.
    """

    def __init__(self, findings: Sequence[AnchorFinding], deficits: Mapping[str, float]) -> None:
        self.findings, self.deficits = tuple(findings), dict(deficits)

    @overload
    def __getitem__(self, index: int) -> AnchorFinding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AnchorFinding, ...]: ...
    def __getitem__(self, index: int | slice) -> AnchorFinding | tuple[AnchorFinding, ...]:
        return self.findings[index]

    def __len__(self) -> int:
        return len(self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings)) or FITS

    __repr__ = __str__


class _Column(NamedTuple):
    """What a batch says of a column: how many samples have it, in how many it is finite, and the means of these."""

    name: str
    info: ConstraintInfo
    samples: int
    finite: int
    raw: float
    deficit: float
    ideal: float
    nadir: float

    @property
    def satisfiable(self) -> bool:
        """Whether some range of raw values satisfies it, so that a small deficit says nothing."""
        return self.info.curve == BARRIER or 0 in self.info.ramp[1:3]

    @property
    def at_ideal(self) -> bool:
        """Whether its values are at their ideal, but for chance. Such a batch says nothing of the nadir."""
        return self.deficit <= 0 or abs(self.raw - self.ideal) <= CHANCE * abs(self.ideal)


def check_anchors(goals: GoalSet, raw: Raw, mask: Masks | None) -> AnchorCheck:
    """Check the anchors of all goals, see `GoalSet.check`."""
    parts: list[tuple[GoalSet, Any, Any]] = [(goals, raw, mask)]
    if goals.watched is not None and isinstance(raw, Mapping):
        (trained, others), (seen, masks) = split_step(goals.watched, raw, mask)
        parts = [(goals, trained, others), (goals.watched, seen, masks)]
    findings: list[AnchorFinding] = []
    deficits: dict[str, float] = {}
    for part, values, masks in parts:
        columns = _measure(part, values, masks)
        deficits |= {column.name: column.deficit for column in columns}
        apart = {} if part is goals.watched else _apart(columns)
        judged = (_judge(part, column, apart.get(column.name)) for column in columns)
        findings += [finding for finding in judged if finding is not None]
    return AnchorCheck(findings, deficits)


@torch.no_grad()
def _measure(goals: GoalSet, raw: Raw, mask: Masks | None) -> list[_Column]:
    """Return the means of each column over the samples of all ranks that have it."""
    given, absent = goals._raw.columns(raw)
    params, presence = goals.params, goals.presence
    values: list[Any] = list(given)
    if any(type(value) is Lazy for value in given):
        for k, value in all_rows(Evaluation(given)).items():
            values[k] = value
    if goals._watching:  # a hit may be a bool or a whole number
        values = [
            value.float() if isinstance(value, Tensor) and not value.is_floating_point() else value for value in values
        ]
    there: Tensor | None = None
    if absent or mask is not None or presence.needed(values):
        with presence.unchanged():
            values, present = presence.of(values, mask, params.device)
        there = present.mask.T
    goals._raw.explain(values, params.device)
    batch = max((len(value) for value in values if value.dim()), default=1) if there is None else len(there)
    wide = widest_float(params.device)
    x = matrix_of([value.detach() for value in values], batch, wide)
    there = torch.ones_like(x, dtype=torch.bool) if there is None else there
    finite = there & x.isfinite()
    d = deficit(x, params.to(wide), codes_of(goals.curves, x.device))
    sums = [there, finite, torch.where(finite, x, 0), torch.where(finite, d, 0)]
    total = goals._ranks.gather(torch.stack([part.to(wide).sum(0) for part in sums])).sum(0)
    columns = []
    numbers = zip(goals.policies, goals.layout.constraints, total.T.tolist(), params.tolist(), strict=True)
    for name, info, (count, known, value, away), (ideal, right, left, _) in numbers:
        mean, deep = (value / known, away / known) if known else (math.nan, math.nan)
        nadir = ideal + 1 / (right or left)
        if not _is_known(goals, name):
            deep = ideal = nadir = math.nan
        columns.append(_Column(name, info, int(count), int(known), mean, deep, ideal, nadir))
    return columns


def _is_known(goals: GoalSet, name: str) -> bool:
    """Return whether the ideal and the scale of a column are known before training."""
    return name not in goals.anchoring.waiting and goals.policies[name].until == 0


def _apart(columns: Sequence[_Column]) -> dict[str, _Column]:
    """Return the columns whose deficits differ by more than `APART` times, each with the one that it is compared to.

    Of two, the one that is further from 1 counts as wrong: untrained networks are near the nadir of most goals.
    """
    left = [c for c in columns if 0 < c.deficit < math.inf and (c.deficit > 1 or not c.satisfiable)]
    left.sort(key=lambda column: column.deficit)
    apart = {}
    while len(left) > 1 and left[-1].deficit > APART * left[0].deficit:
        high = left[-1].deficit * left[0].deficit > 1
        wrong = left.pop(-1 if high else 0)
        apart[wrong.name] = left[0 if high else -1]
    return apart


def _judge(goals: GoalSet, column: _Column, other: _Column | None) -> AnchorFinding | None:
    """Return what is wrong with a column, or None."""
    name, d, start = column.name, column.deficit, f"it starts at {column.raw:.3g}"
    if column.finite < column.samples:
        seen = f"{column.samples - column.finite} of {column.samples} raw values are not finite"
        use = f"finite ones, or leave the others out: goals(raw, mask={{{name!r}: values.isfinite()}})"
        return AnchorFinding("not finite", name, column.raw, d, seen, use)
    if column.samples and name in goals.anchoring.waiting:
        return _unknown(goals, column)
    against = "" if other is None else f", while {other.name} is at {other.deficit:.2g}"
    if d < BEYOND:
        seen = f"{start}, better than its ideal, {column.ideal:.4g}, by {-d:.3g} of its scale"
        if d < -1:
            better = "smaller" if column.info.direction < 0 else "larger"
            seen += f"; if {better} values are better, it is {_anchored(column.ideal, column.raw, column)}"
        use = f"{_anchored(column.raw, column.nadir, column)}, unless {UNTRAINED}"
        return AnchorFinding("better than its ideal", name, column.raw, d, seen, use)
    if other is not None and d > other.deficit:
        seen = f"{start}, which is {d:.3g} times as bad as its nadir, {column.nadir:.4g}{against}"
        return AnchorFinding("far beyond its nadir", name, column.raw, d, seen, _fitting(column))
    if not column.satisfiable and not column.at_ideal and d < FAR:
        seen = f"{start}, deficit {d:.2g}, far from its nadir, {column.nadir:.4g}, which it may never reach{against}"
        use = f"{_fitting(column)}, unless {UNTRAINED}"
        return AnchorFinding("far from its nadir", name, column.raw, d, seen, use)
    return None


def _unknown(goals: GoalSet, column: _Column) -> AnchorFinding:
    """Return the finding of a goal that waits for `GoalSet.anchor`."""
    policy, name = goals.policies[column.name], column.name
    assert isinstance(policy, Anchored)
    known, waits = goals.anchoring.so_far(name)
    seen = f"its {' and '.join(waits)} {'are' if len(waits) > 1 else 'is'} not known yet; it starts at {column.raw:.3g}"
    sources = {source if isinstance(source, str) else None for source in waits.values()}
    supply = [f"{source}={{{name!r}: ...}}" for source in SOURCES if source in sources]
    use = f"goals.anchor({', '.join(['batch'] * (None in sources) + supply)})"
    ideal = known.get("ideal", 0.0)
    if column.raw != ideal and (column.raw < ideal) == policy.maximize:
        use += f" or {_anchored(ideal, column.raw, column)}"
    return AnchorFinding("unknown", name, column.raw, math.nan, seen, use)


def _fitting(column: _Column) -> str:
    """Return a constraint as code under which the deficit of the batch is about 1."""
    if column.info.curve == BARRIER:
        return f"a {column.info.kind} that holds {column.raw:.3g}"
    size = f"{abs(column.raw - column.ideal):.3g}"
    if column.satisfiable:
        return f"{column.info.kind}({column.ideal:.6g}, margin={size})"
    return f"MinimizeHard({size})" if column.info.curve == HARD else _anchored(column.ideal, column.raw, column)


def _anchored(ideal: float, nadir: float, column: _Column) -> str:
    """Return an `Anchored` as code, with as many digits as its scale needs."""
    scale = nadir - ideal
    for digits in (3, 6, 17):
        low, high = (f"{x:.{digits}g}" for x in (ideal, nadir))
        if abs(float(high) - float(low) - scale) <= 0.02 * abs(scale):
            break
    return f"Anchored({low}, {high}{', moving=True' * column.info.moving})"
