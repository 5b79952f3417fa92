"""The arms of the study, by name: rules that see all rows, spill with a budget of rows, and others' balancers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bench.policies import command, peers, rules
from bench.policies.arms import ARMS as POLICIES
from bench.policies.arms import TUNED
from bench.policies.problem import Problem
from bench.policies.problems import VAES
from bench.policies.rules import Arm
from bomkern import Lazy, Spill

RATIO = 1 / 2
EXACT = "exact"  # the arm that sets the time which all others get
BUDGETS = (1.0, 2.0, 3.0)


class OnRows(rules.Bottleneck):
    """A `GoalSet` that notes which part of the lazy goals' backward runs.

    Attributes:
        walked: the sum over the steps so far.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(rules.anchored, **options)
        self.walked = 0.0

    def backward(self, problem: Problem, raw: dict[str, Tensor | Lazy]) -> Tensor:
        out = self.goals(raw)
        out.loss.backward()
        self.walked += 1.0 if out.walked is None else out.walked
        return out.share


class Entry(NamedTuple):
    """An arm.

    Attributes:
        make: makes a new arm for each run from the name of the problem.
        says: a description for the page.
        lazy: whether goals of images are lazy, which is faster where rows are left out.
        made: whether the judge trains on the reconstructions of the rows that were made. Otherwise all are made.
        whole: whether goals of the code alone, which are computed for all rows anyway, count with all rows.
        faults: whether the arm is run under every fault on the photographs too, whose runs take long.
        peer: whether it is somebody else's, and run without faults alone.
    """

    make: Callable[[str], Arm]
    says: str
    lazy: bool = False
    made: bool = False
    whole: bool = False
    faults: bool = False
    peer: bool = False


class Tuned(peers.Weighted):
    """The sum of `bench.policies` that is best by its worst goal on the validation split, of 30 random weightings."""

    def __init__(self, data: str) -> None:
        self.number = int(picked()[data].removeprefix("sum "))

    def start(self, problem: Problem) -> None:
        self.weights = peers.drawn(self.number, len(problem.anchors))


@functools.cache
def picked() -> dict[str, str]:
    """Return the name of the tuned sum of each problem, from the committed runs of `bench.policies`."""
    runs = command.read(command.RUNS)
    return {data: command.picks(runs, data)[TUNED] for data in VAES}


def budget(rows: float) -> Callable[[str], Arm]:
    return lambda _: OnRows(spill=Spill(RATIO, budget=rows))


ARMS: dict[str, Entry] = {
    "sum": Entry(lambda _: peers.Weighted(), "the plain sum of the deficits, all rows", faults=True),
    "hard": Entry(lambda _: OnRows(), 'hard minimum, lazy goals, `route="auto"`', lazy=True, faults=True),
    EXACT: Entry(lambda _: OnRows(spill=RATIO), "spill 1/2, all rows", faults=True),
    **{
        f"budget {rows:g}": Entry(
            budget(rows), f"`Spill(0.5, budget={rows:g})`, lazy goals", lazy=True, made=True, faults=rows == 2
        )
        for rows in BUDGETS
    },
    "budget 2, code whole": Entry(
        budget(2.0), "budget 2, and goals of the code alone count with all rows", lazy=True, made=True, whole=True
    ),
    "budget 2, tensors": Entry(budget(2.0), "budget 2, plain tensors: the same loss, and nothing is saved"),
    "budget 2, judge sees all": Entry(
        budget(2.0), "budget 2, and the judge trains on the reconstructions of all rows", lazy=True
    ),
    TUNED: Entry(Tuned, "the best of 30 random weightings of the sum, by `bench.policies`", peer=True),
    **{name: Entry(POLICIES[name].make, POLICIES[name].says, peer=True) for name in ("STCH", "FAMO", "UPGrad")},
}
