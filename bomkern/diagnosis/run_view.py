"""What `bomkern.diagnose` reads in a `History`: its parts in float64, all goals brought to one direction and unit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..goals.history import History
from .trends import smooth

WINDOWS = 30  # a moving mean spans one so-many-th of the run: long enough to see shares of 1%, short against findings
LEAST_WIDTH = 5  # and never fewer rows
LEAST_WINDOW = 20  # rows of which something is found: in fewer, goals that settle look like ones that move
_KIND = re.compile(r"\w+")
_ARGUMENT = re.compile(r"(\w+)=(-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf))(?=[,)])")


def number(value: float) -> str:
    """As short as it can be read and typed: 0.476, 12.3, 1.2e+03."""
    return f"{value:.3g}"


class Column:
    """A goal's own column, or a group member's.

    Attributes:
        name: as in the history's layout.
        goal: index of the goal that owns it.
        kind: the constraint's or policy's class name.
        arguments: its numbers by name.
        moving: whether it is ``Anchored(moving=True)``.
    """

    def __init__(self, name: str, goal: int, constraint: str) -> None:
        self.name, self.goal = name, goal
        found = _KIND.match(constraint)
        self.kind = found.group() if found else ""
        self.arguments = {key: float(value) for key, value in _ARGUMENT.findall(constraint)}
        self.moving = "moving=True" in constraint

    def distance(self, raw: Tensor, ideal: float, scale: float) -> Tensor:
        """How far raw values are on the wrong side of the best one, in scales: the ramp of `bomkern.constraints`."""
        get = self.arguments.get
        if self.kind == "Lower":
            return (get("limit", 0.0) - raw) / get("margin", 1.0)
        if self.kind == "MinimizeHard":
            return raw.abs() / scale
        if self.kind in ("Box", "BoxAsymmetric"):
            below = ideal - get("lower", ideal - scale)
            return torch.where(raw > ideal, (raw - ideal) / scale, (ideal - raw) / below)
        return (raw - ideal) / scale

    @property
    def box(self) -> tuple[float, float] | None:
        """(lower, upper) of a box."""
        return (self.arguments["lower"], self.arguments["upper"]) if self.kind.startswith("Box") else None

    @property
    def one_sided(self) -> bool:
        """Whether its deficit grows without end in one direction only and is not 0 on a whole side."""
        return self.kind in ("Minimize", "MinimizeHard", "Anchored", "Calibrated", "Tracking")


class Digest:
    """T rows of G goals and K columns, on the host, float64.

    Attributes:
        goals: names. columns: `Column`s.
        share, level, deficit: [T, G]. calm: the share's moving mean over ``width`` rows. most: `Layout.most`.
        least: rows that a window must have at least.
        raw, ideal, scale, highest: [T, K].
        distance: [T, K], `Column.distance` by the last ideal and scale, so that it moves as raw does.
        worse: [T, G], its mean over a goal's columns: raw in the direction of worse, in scales.
        finite: [T], fraction of the steps.
        payoff: {(trained on, seen): raw} by column name.
    """

    def __init__(self, history: History, payoff: Any = None) -> None:
        layout = history.layout
        self.history, self.goals = history, list(layout.goals)
        self.columns = [Column(*c) for c in zip(layout.columns, layout.owner, layout.constraints, strict=True)]
        for part in ("share", "level", "deficit", "raw", "ideal", "scale", "highest", "finite"):
            setattr(self, part, history[part].double())
        bad = ~(self.finite > 0)[:, None]  # such a step took no sample into any goal's training
        for part in ("share", "level", "deficit", "raw"):
            values = getattr(self, part)
            setattr(self, part, torch.where(bad | ~values.isfinite(), torch.nan, values))
        self.most = layout.most
        self.rows = len(self.finite)
        self.width = max(LEAST_WIDTH, self.rows // WINDOWS)
        self.least = max(2 * self.width, LEAST_WINDOW)
        self.calm = smooth(self.share, self.width)
        self._anchors = [_last(self.ideal[:, k], self.scale[:, k]) for k in range(len(self.columns))]
        self.distance = (
            torch.stack([c.distance(self.raw[:, k], *self.anchor(k)) for k, c in enumerate(self.columns)], dim=1)
            if self.rows
            else self.raw
        )
        self.worse = torch.stack([self.distance[:, self.members(g)].mean(1) for g in range(len(self.goals))], dim=1)
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
        """(ideal, scale) of a column at the end, as far as it is known."""
        return self._anchors[column]

    def members(self, goal: int) -> list[int]:
        """Columns of a goal."""
        return [k for k, column in enumerate(self.columns) if column.goal == goal]

    def steps(self, a: int, b: int) -> tuple[int, int]:
        """The first and the last step of rows [a, b), counted from 1."""
        h = self.history
        return h.first + h.stride * a + 1, h.first + h.stride * b

    def top(self, column: int) -> Tensor:
        """[T]: distance of the worst sample of each step."""
        highest = self.highest[:, column]
        highest = torch.where(highest.isfinite() & (self.finite > 0), highest, torch.nan)
        return self.columns[column].distance(highest, *self.anchor(column))

    def mover(self, goal: int, a: int, b: int) -> int:
        """The column of a goal that got worse most over rows [a, b)."""
        found = self.members(goal)
        if len(found) == 1:
            return found[0]
        start, end = self._ends(self.distance[a:b])
        climbed = (end - start)[found]
        return found[int(torch.where(climbed.isnan(), -torch.inf, climbed).argmax())]

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        n = max(1, min(self.width, len(values) // 4))
        return values[:n].nanmean(0), values[-n:].nanmean(0)

    def path(self, column: int, a: int, b: int) -> str:
        """ "raw 0.2 -> 0.5" over rows [a, b)."""
        start, end = self._ends(self.raw[a:b, column])
        member = f" of {self.columns[column].name}" if len(self.members(self.columns[column].goal)) > 1 else ""
        return f"raw{member} {number(float(start))} -> {number(float(end))}"

    def holder(self, a: int, b: int) -> tuple[int, float]:
        """The goal with the largest share over rows [a, b), and the share."""
        share = self.share[a:b].nanmean(0).nan_to_num()
        return int(share.argmax()), float(share.max())

    def values(self, column: int, a: int = 0, b: int | None = None) -> Tensor:
        """The finite raw values of a column over rows [a, b)."""
        raw = self.raw[a:b, column]
        return raw[raw.isfinite()]

    def alone(self, trained: int, seen: int | None = None) -> float | None:
        """What column ``seen`` (the same one) came to when column ``trained`` was trained alone, if the payoff says."""
        names = self.columns[trained].name, self.columns[trained if seen is None else seen].name
        return self.payoff.get(names)


def _last(ideal: Tensor, scale: Tensor) -> tuple[float, float]:
    """Of [T] each, those of the last row that has both: a row joined of lost steps has none."""
    rows = (~(ideal.isnan() | scale.isnan())).nonzero()
    return (float(ideal[rows[-1]]), float(scale[rows[-1]])) if len(rows) else (math.nan, math.nan)


def payoff_of(given: Any) -> dict[tuple[str, str], float]:
    """{(trained on, seen): raw} of what `bomkern.probe` returned, or of its ``to_dict``."""
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
