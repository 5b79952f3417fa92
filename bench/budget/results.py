"""The runs of one data set: figures at equal steps and at equal time, and their differences from the exact rule's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bench.budget.arms import ARMS, EXACT

Record = dict[str, Any]
Read = Callable[[Record], float]
STEP, SECONDS, WALL, PSNR, WORST = range(5)  # columns of the points of a run


def curve(record: Record, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the seconds of training and a figure, at every evaluation of a run."""
    points = np.array(record["points"], float)
    return points[:, SECONDS], points[:, column]


def at_steps(column: int) -> Read:
    """Return a function of a record: its figure after the steps of a run."""
    return lambda r: next(point[column] for point in r["points"] if point[STEP] == r["steps"])


def at_time(column: int) -> Read:
    """Return a function of a record: its figure after the seconds in which the exact rule beside it made its steps."""
    return lambda r: float(np.interp(r["clock"], *curve(r, column)))


def milliseconds(r: Record) -> float:
    """Return the processor's milliseconds of a step."""
    return 1e3 * r["points"][-1][SECONDS] / r["points"][-1][STEP]


def speed(r: Record) -> float:
    """Return the steps in the time of one step of the exact rule, trained beside it."""
    return 1e3 * r["clock"] / r["steps"] / milliseconds(r)


class Results:
    """The runs of one data set.

    Attributes:
        arms: names with runs, in order. seeds: those of the runs without a fault.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._by = {(r["arm"], r["fault"], r["seed"]): r for r in records}
        self.arms = [arm for arm in ARMS if any(key[0] == arm for key in self._by)]
        self.seeds = sorted({seed for _, fault, seed in self._by if fault == "none"})
        self.steps = sorted({r["steps"] for r in self._by.values()})

    def runs(self, arm: str, fault: str = "none") -> list[Record]:
        """Return the runs of an arm under a fault, by seed."""
        return [r for key, r in sorted(self._by.items()) if key[:2] == (arm, fault)]

    def values(self, arm: str, read: Read, fault: str = "none") -> np.ndarray:
        return np.array([read(r) for r in self.runs(arm, fault)], float)

    def gains(self, arm: str, read: Read, fault: str = "none") -> np.ndarray:
        """Return the differences from the exact rule's runs of the same seeds."""
        pairs = [(r, self._by.get((EXACT, fault, r["seed"]))) for r in self.runs(arm, fault)]
        return np.array([read(r) - read(exact) for r, exact in pairs if exact is not None], float)
