"""Train all arms of a seed side by side, each until it has the steps and the seconds of the exact rule."""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import torch

from bench.budget.arms import ARMS, EXACT, OnRows
from bench.policies.faults import FAULTS
from bench.policies.problems import VAES
from bench.policies.vae import VAE
from bomkern import Lazy

POINTS = 16  # evaluations in the steps of a run
WARM = 2  # steps of each arm on a copy of the problem, before anything is timed


class Job(NamedTuple):
    """A run: a data set, a fault, a seed and an arm."""

    data: str
    fault: str
    seed: int
    arm: str


class Runner:
    """An arm and its own copy of the problem.

    Attributes:
        step: steps so far. seconds, wall: processor's and wall-clock seconds of these, without evaluations.
        points: by evaluation: step, seconds, wall, PSNR, worst goal.
        held_out: the last evaluation.
    """

    def __init__(self, problem: VAE, name: str) -> None:
        self.problem, self.entry, self.arm = problem, ARMS[name], ARMS[name].make(problem.family)
        self.arm.start(problem)
        self.step, self.seconds, self.wall = 0, 0.0, 0.0
        self.points: list[tuple[float, ...]] = []
        self.held_out: dict[str, Any] = {}

    def advance(self, steps: int) -> None:
        """Train for some steps."""
        wall, begun = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._take()
        self.seconds += time.process_time() - begun
        self.wall += time.perf_counter() - wall
        self.step += steps

    def _take(self) -> None:
        problem, entry = self.problem, self.entry
        raw = problem.lazy_raw() if entry.lazy else problem.raw()
        if entry.whole:
            raw = {name: x if isinstance(x, Lazy) else x.mean() for name, x in raw.items()}
        self.arm.backward(problem, raw)
        problem.update(problem.recon.evaluated[1] if entry.made and isinstance(problem.recon, Lazy) else None)
        self.arm.after(problem)

    def look(self) -> None:
        """Evaluate the averaged weights on held-out images."""
        self.held_out = self.problem.evaluate("test")
        figures = self.seconds, self.wall, self.held_out["psnr"], self.held_out["worst"]
        self.points.append((self.step, *(float(f"{x:.6g}") for x in figures)))

    @property
    def walked(self) -> float:
        """The mean part of the lazy goals' backward that ran."""
        return self.arm.walked / self.step if isinstance(self.arm, OnRows) else 1.0


def run(data: str, fault: str, seed: int, arms: list[str], steps: int | None = None) -> list[dict[str, Any]]:
    """Train arms in turn, a few steps each, so that load affects all alike; return a record for each.

    Every arm starts from the same weights and gets the same images. It is trained until it has the steps of a run, and
    the seconds in which the exact rule made these.
    """
    torch.set_num_threads(1)
    problem = VAES[data](seed, FAULTS[fault], steps)
    runners = {name: Runner(copy.deepcopy(problem), name) for name in dict.fromkeys([EXACT, *arms])}
    for name in runners:
        Runner(copy.deepcopy(problem), name).advance(WARM)
    clock = runners[EXACT]
    part = max(1, problem.steps // POINTS)
    at_end: dict[str, dict[str, Any]] = {}
    while clock.step < problem.steps:
        for name, runner in runners.items():
            while runner is clock or runner.step < clock.step or runner.seconds < clock.seconds:
                runner.advance(min(part, problem.steps - runner.step) if runner.step < problem.steps else part)
                runner.look()
                if runner.step == problem.steps:
                    at_end[name] = runner.held_out
                if runner is clock:
                    break
    return [
        {
            **Job(data, fault, seed, name)._asdict(),
            "steps": problem.steps,
            "clock": clock.seconds,  # of this process, in which the arm was trained side by side with the exact rule
            "points": runners[name].points,
            "deficits": {goal: round(d, 5) for goal, d in at_end[name]["deficits"].items()},
            "walked": round(runners[name].walked, 4),
        }
        for name in arms
    ]
