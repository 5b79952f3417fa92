"""bomkern's rules in the study: every policy and option of a `GoalSet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.policies.faults import CALIBRATION
from bench.policies.problem import Problem
from bomkern import Anchored, Calibrated, Constraint, GoalSet, Minimize, Policy, probe

Goals = Callable[[Problem], Mapping[str, Constraint | Policy]]


class Arm:
    """A rule that turns the raw values of a step into gradients.

    Attributes:
        spent: updates before the first step, by which the run is shortened.
        goals: the `GoalSet` of the arm, if it has one.
    """

    spent = 0
    goals: GoalSet | None = None

    def start(self, problem: Problem) -> None:
        """Prepare the arm before the first step."""

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        """Compute the gradients, and return each goal's share of them, [K], summing to 1.

        A share is the fraction of samples whose loss the goal is; for weighted losses, the weight of the goal's outside
        deficit.
        """
        raise NotImplementedError

    def after(self, problem: Problem) -> None:
        """Adjust the arm after the update."""


# The rules of bomkern.


class Bottleneck(Arm):
    """A `GoalSet`.

    Args:
        goals: makes the goals. probes: the part of all updates that `bomkern.probe` has, 0 for no probe.
        schedule: temperature as a function of the completed fraction of the run.
        remeasure: steps between measurements of moving goals.
        options: options of the GoalSet.
    """

    def __init__(
        self,
        goals: Goals,
        *,
        probes: float = 0.0,
        schedule: Callable[[float], float] | None = None,
        remeasure: int = 0,
        **options: Any,
    ) -> None:
        self.make, self.probes, self.schedule, self.options = goals, probes, schedule, options
        self.remeasure = remeasure

    def start(self, problem: Problem) -> None:
        self.goals = GoalSet(self.make(problem), **self.options)
        if self.probes:
            self.goals.anchor(probe=self._probe(problem))

    def _probe(self, problem: Problem) -> Any:
        def step() -> None:
            self.backward(problem, problem.raw())
            problem.update()

        each = max(1, int(self.probes * problem.steps / len(problem.anchors)))
        anchors = probe(step, self.goals, each, state=problem.state, progress=False)
        self.spent = anchors.updates
        return anchors

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        if self.schedule is not None:
            self.goals.temperature.fill_(self.schedule(problem.step / problem.steps))
        out = self.goals(raw)
        out.loss.backward()
        return out.share

    def after(self, problem: Problem) -> None:
        if self.remeasure and problem.step % self.remeasure == 0:
            self.goals.remeasure({"realism": judged(problem)})


def judged(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return realism's raw values of real images and of their mean colour by the current judge, [n] each."""
    with torch.no_grad():
        image = problem.images("validation")
        flat = image.mean((0, 2, 3), keepdim=True).expand_as(image)
        real, trivial = ((1 - torch.sigmoid(problem.judge(x).flatten(1))).mean(1) for x in (image, flat))
    return real, trivial


def anchored(problem: Problem) -> dict[str, Policy]:
    return {name: Anchored(*anchor) for name, anchor in problem.anchors.items()}


def probed(problem: Problem) -> dict[str, Policy]:
    return {name: Anchored("probe", "probe") for name in problem.anchors}


def moving(problem: Problem) -> dict[str, Policy]:
    return {name: Anchored(*anchor, moving=name == "realism") for name, anchor in problem.anchors.items()}


def every(policy: Callable[[], Policy]) -> Goals:
    return lambda problem: {name: policy() for name in problem.anchors}


def by_hand(problem: Problem) -> dict[str, Constraint | Policy]:
    """Return bomkern's first recipe: automatic scales, except for goals whose difficulty moves."""
    hand = {"realism": 2.0, "consistency": 500.0, "capacity": 0.4}
    return {name: Minimize(hand[name]) if name in hand else Calibrated(CALIBRATION) for name in problem.anchors}
