"""The score of the advice, as a page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.policies.problems import PROBLEMS
from bench.policies.results import rows

Trial = dict[str, Any]
MOST = 10.0  # a gain counts at most so many times the noise
FIGURES = ("main", "worst")


def noise(trials: Iterable[Trial]) -> dict[tuple[str, str], float]:
    """Return the standard deviation between seeds of the first runs, by problem and figure."""
    cells: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        for figure in FIGURES:
            cells[trial["data"], figure][trial["fault"], trial["rule"]].append(trial["before"][figure])
    found = {}
    for key, values in cells.items():
        spread = [np.var(v, ddof=1) for v in values.values() if len(v) > 1 and np.isfinite(v).all()]
        found[key] = math.sqrt(float(np.mean(spread))) if spread else math.nan
    return found


def gain(trial: Trial, noises: dict[tuple[str, str], float]) -> float:
    """Return the gain of the second run in noises: that of the measure and that of the worst goal, added."""
    signs = {"main": 1 if PROBLEMS[trial["data"]].measure.larger else -1, "worst": -1}
    total = 0.0
    for figure, sign in signs.items():
        before, after = trial["before"][figure], trial["after"][figure]
        change = sign * (after - before) / noises[trial["data"], figure] if after != before else 0.0
        total += min(max(change, -MOST), MOST)
    return total


def score(trials: list[Trial], noises: dict[tuple[str, str], float]) -> dict[str, int]:
    """Return how many trials had advice, followed it, ended better, and ended worse by more than noise."""
    gains = [gain(t, noises) for t in trials if "after" in t]
    return {
        "runs": len(trials),
        "advised": sum("advice" in t for t in trials),
        "followed": len(gains),
        "better": sum(g > 0 for g in gains),
        "worse": sum(g < -1 for g in gains),
    }


def _by(
    trials: list[Trial], noises: dict[tuple[str, str], float], key: Callable[[Trial], str | None]
) -> list[list[str]]:
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if (name := key(trial)) is not None:
            groups[name].append(trial)
    return [[name, *map(str, score(group, noises).values())] for name, group in groups.items()]


HEADS = ["runs", "with a finding", "followed", "better", "worse by more than noise"]
HOW = """\
`python -m bench.advice` makes this page. It trains the eight problems of `bench.policies` with three rules, under every
planted fault and none, and diagnoses each history. The change that the first finding suggests is made as its text says,
and the run is repeated from the same seed. Moving anchors are measured every 50 steps. Advice that depends on what only
a user knows, or that a `GoalSet` cannot follow, such as another learning rate, is not followed. Findings below 50% are
none. A run's gain is that of the problem's measure plus that of the worst goal on held-out data, each divided by its
standard deviation between seeds. *Worse by more than noise* is a gain below -1. Planted lifts are not in these figures.
"""


def write(trials: list[Trial], to: Path) -> str:
    """Write the page ``to``.md, and return it."""
    noises = noise(trials)
    found = score(trials, noises)
    share = {key: found[key] / max(1, found["followed"]) for key in ("better", "worse")}
    page = [
        "# What the advice does",
        HOW,
        "## Score",
        f"Of {found['runs']} runs {found['advised']} had a finding, and {found['followed']} followed its advice: "
        f"{share['better']:.0%} ended better (asked for: 80%), {share['worse']:.0%} worse by more than noise "
        "(asked for: at most 5%).",
        rows(["problem", *HEADS], _by(trials, noises, lambda t: PROBLEMS[t["data"]].title)),
        rows(["fault", *HEADS], _by(trials, noises, lambda t: t["fault"])),
        rows(["rule", *HEADS], _by(trials, noises, lambda t: t["rule"])),
        rows(["first finding", *HEADS], _by(trials, noises, lambda t: t.get("kind"))),
    ]
    text = "\n\n".join(page) + "\n"
    to.with_suffix(".md").write_text(text)
    return text
