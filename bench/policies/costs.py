"""The time of an arm's step, in steps of equal weights, which decides how many steps it gets.

Every run of a problem has one time budget: that of equal weights. A budget in seconds would end each run after another
number of steps on a busy machine, so that no run could be repeated. So the cost of a step is measured once, in turn
with equal weights in one process, and a run gets a fixed number of steps. Its seconds are recorded as well.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.policies.arms import ARMS, EQUAL
from bench.policies.faults import FAULTS
from bench.policies.problem import Problem
from bench.policies.problems import PROBLEMS
from bench.policies.rules import Arm

Costs = dict[str, dict[str, float]]  # by problem and arm
BLOCK, SLOW_BLOCK = 20, 4  # steps that are timed together: a multiple of the period of rules that have one
SLOW = 0.02  # seconds of a step from which blocks are short
ROUNDS = 7  # blocks of each arm
NOISE = 0.05  # costs that differ from 1 by no more are 1


def _seconds(problem: Problem, arm: Arm, steps: int) -> float:
    begun = time.process_time()
    for _ in range(steps):
        arm.backward(problem, problem.raw())
        problem.update()
        arm.after(problem)
    return time.process_time() - begun


def measure(data: str, arms: Iterable[str]) -> dict[str, float]:
    """Return the cost of each arm on a problem: the median over pairs of blocks that follow each other."""
    torch.set_num_threads(1)
    start = PROBLEMS[data](0, FAULTS["none"])
    found = {}
    for name in arms:
        equal, mine = ((copy.deepcopy(start), ARMS[each].make(data)) for each in (EQUAL, name))
        for problem, arm in (equal, mine):
            arm.start(problem)
        block = SLOW_BLOCK if _seconds(*equal, 2) > 2 * SLOW else BLOCK
        _seconds(*mine, 2)
        ratio = statistics.median(1 / (_seconds(*equal, block) / _seconds(*mine, block)) for _ in range(ROUNDS))
        found[name] = 1.0 if abs(ratio - 1) <= NOISE else round(ratio, 2)
    return found


def read(path: Path) -> Costs:
    """Return the costs that a file holds."""
    return json.loads(path.read_text()) if path.exists() else {}


def complete(path: Path, data: str, found: dict[str, float]) -> None:
    """Add costs to the file."""
    costs = read(path)
    costs.setdefault(data, {}).update(found)
    path.write_text(json.dumps(costs, indent=1) + "\n")
