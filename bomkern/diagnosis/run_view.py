"""`RunView`: a `History` as the detectors read it, in float64, with all goals in one direction and unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..goals.constraint_info import BARRIER, CALIBRATED, FIXED, HARD, LINEAR, NAMED, ConstraintInfo
from ..goals.history import History
from ..goals.record import Layout
from .trends import smooth

WINDOWS = 30  # a moving mean spans this part of a run: enough rows to see shares of 1%, few against those of a finding
LEAST_WIDTH = 5  # smallest number of rows of a moving mean
LEAST_WINDOW = 20  # smallest number of rows of a finding: in fewer, a goal that settles looks like one that moves


def number(value: float) -> str:
    """Format a number with three digits: 0.476, 12.3, 1.2e+03."""
    return f"{value:.3g}"


class Column:
    """The column of a goal or of a group member.

    Attributes:
        name: as in the history's layout.
        goal: index of the goal that owns it.
        direction: 1 if larger values are worse, -1 if smaller values are, 0 if both are.
        has_limit: whether the goal is satisfied everywhere on one side.
        box: (lower, upper) of a barrier on both sides, else None.
        anchorable: whether `bomkern.Anchored` can replace it: values on one side are worse, without end or limit.
        sign: -1 if smaller values are worse, else 1.
        margin: raw units per unit of deficit, beyond a limit or the ideal, before the first step.
        named: whether its ideal and its nadir were named, and so have a meaning.
        calibrated: whether its scale comes from the first steps.
        moving: whether the goal's difficulty changes during training.
    """

    def __init__(self, name: str, goal: int, constraint: ConstraintInfo) -> None:
        self.name, self.goal = name, goal
        center, right, left, _ = constraint.ramp
        if constraint.curve == HARD:  # its deficit is even in the ramp
            right, left = abs(right), -abs(left)
        self._right, self._left = right, left
        self._hard, self._fixed = constraint.curve == HARD, constraint.anchors == FIXED
        self.direction = constraint.direction
        self.sign = -1 if self.direction < 0 else 1
        self.has_limit = right == 0 or left == 0
        self.box = None
        if constraint.curve == BARRIER and right > 0 > left:
            least = 1e-9 * (1 / right - 1 / left)  # an edge at 0 may round to this
            lower, upper = (edge if abs(edge) > least else 0.0 for edge in (center + 1 / left, center + 1 / right))
            self.box = lower, upper
        straight = constraint.curve == LINEAR and right * left > 0
        self.anchorable = straight or (self._hard and right > 0 > left)
        self.margin = 1 / abs(right or left or math.inf)
        self.named, self.calibrated = constraint.anchors == NAMED, constraint.anchors == CALIBRATED
        self.moving = constraint.moving

    def distance(self, raw: Tensor, ideal: float, scale: float) -> Tensor:
        """Return the distance of raw values from the best value, on the worse side, in scales.

        This is the ramp of `bomkern.constraints`, continued where it is flat: values below 0 are better than a limit.
        ``ideal`` and ``scale`` are those of a record, where the scale is the size of that of the right side.
        """
        right, left, away = self._right, self._left, raw - ideal
        scale = math.copysign(scale, right)
        if right == 0 and (self._fixed or not math.isfinite(scale)):
            return away * left  # a record does not hold the scale of the left side
        if not self._fixed:
            right, left = 1.0, -1.0 if left < 0 <= right else 1.0  # a policy gives both sides the same scale
        return torch.where(away > 0, away / scale, away / (scale * right / left if left else scale))

    def nadir(self, ideal: Any, scale: Any) -> Any:
        """Return the raw value one scale from the ideal, on the worse side."""
        return ideal + self.sign * scale


def columns_of(layout: Layout) -> list[Column]:
    """Return the columns of a history, in order."""
    return [Column(*c) for c in zip(layout.columns, layout.owner, layout.constraints, strict=True)]


class RunView:
    """T rows of G goals and K columns, on the host, in float64.

    Attributes:
        goals: names of the goals.
        columns: their `Column`s.
        share, level, deficit: [T, G].
        smooth_share: moving mean of the shares over ``width`` rows, [T, G].
        own_share: the same over the rows in which a sample had the goal; NaN without one.
        largest_share, least_share: the largest and the smallest share that the rule gives to one goal.
        least_window: smallest number of rows of a window.
        raw, ideal, scale, highest: [T, K].
        distance: [T, K], `Column.distance` by the last ideal and scale, so that it moves as raw does.
        worse: [T, G], mean of the distances over a goal's columns; larger is worse, in scales.
        finite: [T], fraction of the steps with a finite loss.
        payoff: {(trained on, measured): raw} by column name.
    """

    def __init__(self, history: History, payoff: Any = None) -> None:
        layout = history.layout
        self.history, self.goals = history, list(layout.goals)
        self.columns = columns_of(layout)
        for part in ("share", "level", "deficit", "raw", "ideal", "scale", "highest", "finite"):
            setattr(self, part, history[part].double())
        bad = ~(self.finite > 0)[:, None]  # no step of such a row trained any goal
        for part in ("share", "level", "deficit", "raw"):
            values = getattr(self, part)
            setattr(self, part, torch.where(bad | ~values.isfinite(), torch.nan, values))
        self.largest_share, self.least_share = layout.most, layout.least
        self.rows = len(self.finite)
        self.width = max(LEAST_WIDTH, self.rows // WINDOWS)
        self.least_window = max(2 * self.width, LEAST_WINDOW)
        self.smooth_share = smooth(self.share, self.width)
        self.own_share = smooth(torch.where(self.level.isnan(), torch.nan, self.share), self.width)
        self._anchors = [_last(self.ideal[:, k], self.scale[:, k]) for k in range(len(self.columns))]
        self.distance = (
            torch.stack([c.distance(self.raw[:, k], *self.anchor(k)) for k, c in enumerate(self.columns)], dim=1)
            if self.rows
            else self.raw
        )
        self.worse = torch.stack([self.distance[:, self.members(g)].nanmean(1) for g in range(len(self.goals))], dim=1)
        self.payoff = payoff_of(payoff)

    share: Tensor
    level: Tensor
    deficit: Tensor
    raw: Tensor
    ideal: Tensor
    scale: Tensor
    highest: Tensor
    finite: Tensor

    def anchor(self, column: int) -> tuple[float, float]:
        """Return the last (ideal, scale) of a column; NaN if unknown."""
        return self._anchors[column]

    def members(self, goal: int) -> list[int]:
        """Return the indices of a goal's columns."""
        return [k for k, column in enumerate(self.columns) if column.goal == goal]

    def steps(self, a: int, b: int) -> tuple[int, int]:
        """Return the first and the last step of rows [a, b), counted from 1."""
        h = self.history
        return h.first + h.stride * a + 1, h.first + h.stride * b

    def worst_distance(self, column: int) -> Tensor:
        """Return the distance of the worst sample of each step, [T].

        A record holds the highest raw value alone. Where that is the best one, the worst is taken to be as far from
        the mean on the other side.
        """
        highest = self.highest[:, column]
        highest = torch.where(highest.isfinite() & (self.finite > 0), highest, torch.nan)
        away = self.columns[column].distance(highest, *self.anchor(column))
        return 2 * self.distance[:, column] - away if self.columns[column].direction < 0 else away

    def worst_mover(self, goal: int, a: int, b: int) -> int:
        """Return the column of a goal that got worse most over rows [a, b)."""
        members = self.members(goal)
        if len(members) == 1:
            return members[0]
        start, end = self._ends(self.distance[a:b])
        climbed = (end - start)[members]
        return members[int(torch.where(climbed.isnan(), -torch.inf, climbed).argmax())]

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        n = max(1, min(self.width, len(values) // 4))
        return values[:n].nanmean(0), values[-n:].nanmean(0)

    def course(self, column: int, a: int, b: int) -> str:
        """Return "raw 0.2 -> 0.5", the values at both ends of rows [a, b)."""
        start, end = self._ends(self.raw[a:b, column])
        member = f" of {self.columns[column].name}" if len(self.members(self.columns[column].goal)) > 1 else ""
        return f"raw{member} {number(float(start))} -> {number(float(end))}"

    def holder(self, a: int, b: int) -> tuple[int, float]:
        """Return the goal with the largest share over rows [a, b), and the share."""
        share = self.share[a:b].nanmean(0).nan_to_num()
        return int(share.argmax()), float(share.max())

    def values(self, column: int, a: int = 0, b: int | None = None) -> Tensor:
        """Return the finite raw values of a column over rows [a, b)."""
        raw = self.raw[a:b, column]
        return raw[raw.isfinite()]

    def alone(self, trained: int, measured: int | None = None) -> float | None:
        """Return raw of column ``measured`` after training on column ``trained`` alone.

        It is None if the payoff lacks it, or if it is not finite. ``measured`` is ``trained`` by default.
        """
        names = self.columns[trained].name, self.columns[trained if measured is None else measured].name
        value = self.payoff.get(names)
        return value if value is not None and math.isfinite(value) else None


def _last(ideal: Tensor, scale: Tensor) -> tuple[float, float]:
    """Return the ideal and the scale of the last row that has both; a row of rejected steps has none."""
    rows = (~(ideal.isnan() | scale.isnan())).nonzero()
    return (float(ideal[rows[-1]]), float(scale[rows[-1]])) if len(rows) else (math.nan, math.nan)


def payoff_of(given: Any) -> dict[tuple[str, str], float]:
    """Return {(trained on, measured): raw} for the result of `bomkern.probe`, or for its ``to_dict``."""
    if given is None:
        return {}
    if hasattr(given, "to_dict"):
        given = given.to_dict()
    if not isinstance(given, Mapping) or not {"goals", "table"} <= given.keys():
        raise TypeError('payoff must be what `bomkern.probe` returned, or {"goals": [...], "table": [[...]]}')
    names, table = [str(name) for name in given["goals"]], given["table"]
    try:
        square = [[float(value) for value in row] for row in table]
    except (TypeError, ValueError) as why:
        raise TypeError(f"payoff: table must hold numbers ({why})") from None
    if [len(row) for row in square] != [len(names)] * len(names):
        raise ValueError(f"payoff: table must have {len(names)} rows of {len(names)} numbers, one for each goal")
    return {(i, j): value for i, row in zip(names, square, strict=True) for j, value in zip(names, row, strict=True)}
