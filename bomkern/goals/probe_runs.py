"""The runs of `bomkern.probe`: training on one goal alone, for some steps or until it has settled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .goal_set import GoalSet
from .monitor import ROWS
from .payoff_anchors import FIRST, SURE, median, median_error, result_of, settled, step_noise

CHUNK = 50  # fewest steps between two looks at whether a run has settled
LONGER = 4  # a run is prolonged by 1/4 of its length


class Run(NamedTuple):
    """A run on one goal.

    Attributes:
        values: raw values of each step, [T, K] float64 on the host; smaller is better, NaN where one is not finite.
        steps: number of steps.
        settled: whether the goal improved little at the end.
        finite: whether the goal had finite values at the end.
    """

    values: Tensor
    steps: int
    settled: bool
    finite: bool


def signs_of(goals: GoalSet) -> Tensor:
    """Return -1 for the columns of which larger values are better, 1 for the others, [K] float64."""
    falls = [info.direction < 0 for info in goals.layout.constraints]
    return torch.tensor([-1.0 if fall else 1.0 for fall in falls], dtype=torch.float64, device="cpu")


class Runs:
    """Makes the runs of a probe.

    Args:
        step: makes one training step with ``goals``.
        limit: most steps of a run.
        tolerance: see `settled`.
        auto: whether a run ends when it has settled.
        bar: the progress bar.
    """

    def __init__(
        self, step: Callable[[], object], goals: GoalSet, limit: int, tolerance: float, auto: bool, bar: Any
    ) -> None:
        self.step, self.goals, self.limit, self.bar = step, goals, limit, bar
        self.tolerance, self.auto, self.signs = tolerance, auto, signs_of(goals)

    def alone(self, column: str, patient: bool = False) -> Run:
        """Train on one column until the limit, or until it has settled; if ``patient``, after it has gained."""
        k, done, ends = self.goals.anchoring.index(column), 0, False
        parts: list[Tensor] = []
        self.goals.train()
        self.goals.monitor.take()
        with self.goals.only(column):
            while done < self.limit and not ends:
                chunk = min(max(CHUNK, done // LONGER), self.limit - done)
                parts.append(self._steps(chunk))
                done += chunk
                if not len(parts[-1]):
                    why = "step never called the GoalSet"
                    raise ValueError(f"training on {column} alone gave no value to anchor by: {why}")
                own = [part[:, k] for part in parts]
                ends = bool(own[-1].isnan().all()) or (self.auto and self._settled(own, patient))
        values = torch.cat(parts)
        finite = not bool(result_of(values)[k].isnan())
        return Run(values, done, ends or self._settled(list(values[:, k].tensor_split(4)), patient=False), finite)

    def _settled(self, own: list[Tensor], patient: bool) -> bool:
        """Return whether a goal, of whose values there are some parts, improved little in the last one."""
        own = [part for part in own if len(part)]
        if len(own) < 2:
            return False
        start, best = float(median(own[0][:FIRST])), min(float(median(part)) for part in own)
        noise = step_noise(torch.cat(own)[:, None])[0]
        if patient and start - best <= SURE * float(median_error(noise, FIRST)):
            return False
        return settled(own[-2], own[-1], start, best, self.tolerance)

    def _steps(self, count: int) -> Tensor:
        """Make so many steps, and return their raw values, [T, K]."""
        parts, layout = [], self.goals.layout
        for done in range(1, count + 1):
            self.step()
            self.bar.update()
            if done % ROWS == 0 or done == count:  # replayed graphs leave no more records than that
                parts.append(layout.parts(self.goals.monitor.take())["raw"])
        values = torch.cat(parts).double() * self.signs
        return torch.where(values.isfinite(), values, torch.nan)
