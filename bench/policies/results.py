"""The runs of a problem, and the figures that tables and plots show of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.policies.arms import ARMS
from bench.policies.problem import Measure
from bench.policies.problems import PROBLEMS

Record = dict[str, Any]
Read = Callable[[Record], float]
DRAWS = 10_000


class Results:
    """The runs of one problem, by arm and fault, in the order of the seeds.

    Args:
        data: the problem. records: all its runs. tuned: the random sum behind each tuned sum, by name.
        seeds: seeds of the arms. If no run has one of them, those of the runs are taken.
        tuning: seed of the random sums.

    Attributes:
        measure: the problem's main figure.
    """

    def __init__(
        self, data: str, records: list[Record], tuned: Mapping[str, str], seeds: tuple[int, ...], tuning: int
    ) -> None:
        self.data, self.tuned = data, tuned
        self.by = {(r["arm"], r["fault"], r["seed"]): r for r in records}
        self.measure: Measure = PROBLEMS[data].measure
        ran = sorted({r["seed"] for r in records} - {tuning})
        self.seeds = seeds if set(seeds) & set(ran) else tuple(ran)
        self.sums = [r for r in records if r["seed"] == tuning and r["arm"].startswith("sum ")]
        self.arms = [arm for arm in (*ARMS, *tuned) if self.runs(arm, "none")]

    def main(self, r: Record) -> float:
        """Return the held-out main figure of a run."""
        return self.measure.of(r["test"])

    def runs(self, arm: str, fault: str) -> list[Record]:
        """Return the runs of an arm under a fault, of the seeds that have been run so far."""
        name = self.tuned.get(arm, arm)
        return [self.by[name, fault, seed] for seed in self.seeds if (name, fault, seed) in self.by]

    def values(self, arm: str, fault: str, read: Read) -> np.ndarray:
        return np.array([read(r) for r in self.runs(arm, fault)], float)

    def gain(self, arm: str, other: str, fault: str, read: Read) -> np.ndarray:
        """Return paired differences over the seeds that both arms have; 0 where both have diverged."""
        a, b = ({r["seed"]: read(r) for r in self.runs(name, fault)} for name in (arm, other))
        both = [seed for seed in self.seeds if seed in a and seed in b]
        return np.array([0.0 if a[seed] == b[seed] else a[seed] - b[seed] for seed in both], float)

    def better(self, arm: str, other: str) -> np.ndarray:
        """Return paired gains of the main figure without a fault, signed so that a larger one is better."""
        return self.gain(arm, other, "none", self.main) * (1 if self.measure.larger else -1)


def worst(r: Record) -> float:
    return Measure("worst", "worst goal", larger=False).of(r["test"])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and its bootstrap 95% interval; all are the mean if a value is infinite."""
    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if not np.isfinite(values).all():
        return mean, mean, mean
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    return mean, *(float(q) for q in np.quantile(draws, (0.025, 0.975)))


def cell(values: np.ndarray, digits: int, sign: bool = False) -> str:
    """Return the mean and its interval, or that a run has diverged."""
    mean, low, high = interval(values)
    if math.isnan(mean) and not len(values):
        return ""
    if not math.isfinite(mean):
        return "diverged"
    plus = "+" if sign else ""
    return f"{mean:{plus}.{digits}f} ({low:{plus}.{digits}f}, {high:{plus}.{digits}f})"


def mean(values: np.ndarray, digits: int) -> str:
    """Return the mean, or that a run has diverged."""
    if not len(values):
        return ""
    return f"{values.mean():.{digits}f}" if np.isfinite(values).all() else "diverged"


def rows(heads: list[str], lines: list[list[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])
