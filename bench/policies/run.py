"""One run of the study: train a problem with an arm, and evaluate it on held-out data."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.policies.arms import ARMS
from bench.policies.faults import DRIFT_FROM, FAULTS
from bench.policies.peers import Weighted, drawn
from bench.policies.problem import Problem
from bench.policies.problems import PROBLEMS
from bench.policies.rules import Arm
from bomkern import diagnose

STARVED, WORSENED = 0.01, 0.05  # a starved goal has less than this share, and got worse by more than this many scales
ALARM = 0.5  # a finding of at least this confidence is a report
LOOKS = 20  # how often the history is diagnosed, to find when a fault was first reported


class Job(NamedTuple):
    """A run: a problem, a fault, an arm (or "sum 7", random weighting number 7) and a seed."""

    data: str
    fault: str
    arm: str
    seed: int


class Starvation:
    """Measure the longest time for which a goal was starved.

    A starved goal has under `STARVED` of the gradient and gets worse, though it is at least half as badly off as the
    worst goal. Shares and deficits are moving averages over some 10 steps. The time counts from the goal's best value
    since it lost the gradient.
    """

    def __init__(self, goals: int) -> None:
        self.share, self.deficit = torch.full((goals,), 1 / goals), torch.full((goals,), torch.nan)
        self.best, self.since = torch.full((goals,), torch.inf), torch.zeros(goals)
        self.longest = 0.0

    def add(self, share: Tensor, deficit: Tensor) -> None:
        self.share.lerp_(share, 0.1)
        self.deficit = torch.where(self.deficit.isnan(), deficit, self.deficit.lerp(deficit, 0.1))
        fed = self.share >= STARVED
        better = fed | (self.deficit < self.best)
        self.best = torch.where(better, self.deficit, self.best)
        self.since = torch.where(better, 0, self.since + 1)
        badly = self.deficit >= self.deficit.max() / 2
        starved = torch.where(badly & (self.deficit > self.best + WORSENED), self.since, 0)
        self.longest = max(self.longest, float(starved.max()))


def train(problem: Problem, arm: Arm) -> dict[str, Any]:
    """Train and evaluate, and return all figures of the run.

    The run is shortened by the updates that the arm spends before the first step. It ends before a step whose raw
    values are not finite, which is then the record's ``diverged``.
    """
    arm.start(problem)
    steps = problem.steps - arm.spent
    if steps < 1:
        raise ValueError(f"steps must exceed the {arm.spent} updates of the probes, got {problem.steps}")
    starvation = Starvation(len(problem.anchors))
    total, seconds, diverged = torch.zeros(len(problem.anchors)), 0.0, None
    begun = time.process_time()
    for step in range(steps):
        raw = problem.raw()
        deficits = problem.outside(raw)
        if not bool(deficits.isfinite().all()):
            diverged = step
            break
        before = time.process_time()
        share = arm.backward(problem, raw).detach().float()
        seconds += time.process_time() - before
        problem.update()
        arm.after(problem)
        total += share
        starvation.add(share, deficits)
    spent = time.process_time() - begun
    share = total / total.sum().clamp(min=1e-12)
    return {
        "validation": problem.evaluate("validation"),
        "test": problem.evaluate("test"),
        "share": dict(zip(problem.anchors, share.tolist(), strict=True)),
        "entropy": float(-(share * share.clamp(min=1e-12).log()).sum() / math.log(len(share))),
        "starvation": starvation.longest / steps,
        "backward_ms": 1000 * seconds / steps,
        "step_ms": 1000 * spent / steps,
        "probes": arm.spent,
        "steps": problem.steps,
        **({} if diverged is None else {"diverged": diverged}),
    }


def reported(problem: Problem, arm: Arm) -> int | None:
    """Return the steps from the fault's onset until `bomkern.diagnose` first names the goal; None if it never does."""
    fault, history = problem.fault, arm.goals.history
    guilty = problem.drifting if fault.drift else problem.blocked if fault.floor else "realism"
    onset = int(DRIFT_FROM * problem.steps) if fault.drift else 0
    for look in range(1, LOOKS + 1):
        rows = len(history) * look // LOOKS
        diagnosis = diagnose(history.first_rows(rows))
        if any(guilty in f.goals and f.confidence >= ALARM for f in diagnosis.faults):
            return max(0, rows * history.stride - onset)
    return None


def run(job: Job, steps: int | None = None, cost: float = 1.0) -> dict[str, Any]:
    """Run a job, and return its record.

    Args:
        job: see `Job`. steps: steps of equal weights, None for the problem's.
        cost: the time of the arm's step, in steps of equal weights; it gets so many fewer steps.
    """
    torch.set_num_threads(1)
    kind = PROBLEMS[job.data]
    problem = kind(job.seed, FAULTS[job.fault], max(1, round((steps or kind.steps) / cost)))
    if job.arm.startswith("sum "):
        arm: Arm = Weighted(drawn(int(job.arm[4:]), len(problem.anchors)))
    else:
        arm = ARMS[job.arm].make(job.data)
    figures = train(problem, arm)
    if arm.goals is not None and job.fault != "none":
        figures["reported"] = reported(problem, arm)
    return {**job._asdict(), **figures}
