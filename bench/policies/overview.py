"""All problems together: ranks of the rules, and how they compare with equal weights and with tuned ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bench.policies.arms import ARMS, BRIGHT, DEFAULT, EQUAL, TUNED
from bench.policies.problems import PROBLEMS
from bench.policies.results import Results, cell, interval, mean, rows, worst

BOTH = ("main", "worst")


class Overview:
    """The runs without a fault of several problems.

    A problem's variants, such as its optimizers, count as one problem together.

    Args:
        sets: results by problem.

    Attributes:
        families: the sets of each problem.
        field: the arms that were run everywhere, which ranks count. The tuned sums are not among them.
    """

    def __init__(self, sets: Mapping[str, Results]) -> None:
        self.sets = sets
        self.families: dict[str, list[Results]] = {}
        for data, results in sets.items():
            self.families.setdefault(PROBLEMS[data].family, []).append(results)
        self.arms = [arm for arm in (*ARMS, TUNED, BRIGHT) if any(arm in r.arms for r in sets.values())]
        self.field = [arm for arm in ARMS if all(arm in r.arms for r in sets.values())]

    def ranks(self, arm: str, kind: str) -> list[np.ndarray]:
        """Return the arm's ranks by seed on each problem that it was run on, 1 for the best.

        An arm's rank is one more than the number of arms of the field that are better, and half a rank for a tie. So an
        arm outside the field gets the rank that it would have had in it.

        Args:
            arm: its name. kind: "main" for the main figure, "worst" for the worst goal.
        """
        found = []
        for variants in self.families.values():
            each = [self._ranks(results, arm, kind) for results in variants if arm in results.arms]
            if each:
                count = min(map(len, each))
                found.append(np.mean([r[:count] for r in each], axis=0))
        return found

    def _ranks(self, results: Results, arm: str, kind: str) -> np.ndarray:
        sign = -1 if kind == "worst" or not results.measure.larger else 1
        read = worst if kind == "worst" else results.main

        def by_seed(name: str) -> dict[int, float]:
            return {r["seed"]: sign * read(r) for r in results.runs(name, "none")}

        mine, others = by_seed(arm), [by_seed(name) for name in self.field if name != arm]
        ranks = []
        for seed, value in mine.items():
            rivals = [other[seed] for other in others if seed in other]
            ranks.append(1 + sum(x > value for x in rivals) + sum(x == value for x in rivals) / 2)
        return np.array(ranks)

    def mean_rank(self, arm: str, kinds: tuple[str, ...] = BOTH) -> np.ndarray:
        """Return the mean over problems and kinds, by seed."""
        each = [ranks for kind in kinds for ranks in self.ranks(arm, kind)]
        count = min(map(len, each), default=0)
        return np.mean([ranks[:count] for ranks in each], axis=0) if each else np.array([])

    def gains(self, arm: str, other: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return paired gains of the main figure and of the worst goal, by each problem that both were run on.

        Both are signed so that a larger one is better.
        """
        found = {}
        for name, variants in self.families.items():
            shared = [results for results in variants if {arm, other} <= set(results.arms)]
            if shared:
                found[name] = (
                    np.concatenate([r.better(arm, other) for r in shared]),
                    -np.concatenate([r.gain(arm, other, "none", worst) for r in shared]),
                )
        return found

    def ahead(self, arm: str, other: str) -> tuple[int, int]:
        """Return on how many problems the worst goal is better and the main figure no lower, and of how many."""
        return len(self.winning(arm, other)), len(self.gains(arm, other))

    def level(self, arm: str, other: str) -> tuple[int, int]:
        """Return on how many problems neither figure is worse beyond its interval, and of how many."""
        found = self.verdicts(arm, other)
        return sum(verdict != "worse" for verdict in found.values()), len(found)

    def verdicts(self, arm: str, other: str) -> dict[str, str]:
        """Return "better", "worse" or "undecided" by problem.

        Worse: a figure is worse beyond its interval. Better: a figure is better beyond it, and none is worse.
        """
        found = {}
        for name, pair in self.gains(arm, other).items():
            lows, highs = zip(*(interval(x)[1:] for x in pair), strict=True)
            found[name] = "worse" if min(highs) < 0 else "better" if max(lows) > 0 else "undecided"
        return found

    def winning(self, arm: str, other: str) -> list[str]:
        """Return the problems on which the worst goal is better and the main figure no lower, in the mean."""
        gains = self.gains(arm, other).items()
        return [name for name, (good, bad) in gains if bad.mean() > 0 and good.mean() >= 0]


def _name(arm: str) -> str:
    return f"**{arm}**" if arm == DEFAULT else arm


def rank_table(found: Overview) -> str:
    """Return the table of all rules, the best mean rank first."""
    lines = []
    order = sorted(found.arms, key=lambda arm: found.mean_rank(arm).mean())
    for arm in order:
        count = len(found.ranks(arm, "main"))
        cells = [cell(found.mean_rank(arm), 1)]
        cells += [f"{found.mean_rank(arm, (kind,)).mean():.1f}" for kind in BOTH]
        cells.append(f"{count} of {len(found.families)}")
        pairs = [found.level(arm, EQUAL), found.ahead(arm, TUNED)]
        same = [arm == EQUAL, arm == TUNED]
        cells += ["" if skip or not of else f"{n} of {of}" for skip, (n, of) in zip(same, pairs, strict=True)]
        lines.append([_name(arm), *cells])
    heads = ["rule", "mean rank", "by the measure", "by the worst goal", "problems"]
    return rows([*heads, "no worse than equal weights", "ahead of the tuned sum"], lines)


def figure_table(found: Overview) -> str:
    """Return the main figure / worst goal of all rules on all problems."""
    heads = [f"{PROBLEMS[data].title}: {results.measure.says}" for data, results in found.sets.items()]
    lines = []
    for arm in found.arms:
        cells = []
        for results in found.sets.values():
            pair = (results.values(arm, "none", read) for read in (results.main, worst))
            good, bad = (mean(v, n) for v, n in zip(pair, (results.measure.digits, 2), strict=True))
            cells.append(f"{good} / {bad}" if good else "")
        lines.append([_name(arm), *cells])
    return rows(["rule", *heads], lines)


def default_table(found: Overview) -> str:
    """Return the default's paired differences from equal weights and from the tuned sum, with intervals."""
    heads = ["problem", "measure"]
    for other in ("equal weights", "the tuned sum"):
        heads += [f"measure, from {other}", f"worst goal, from {other}"]
    lines = []
    for data, results in found.sets.items():
        if DEFAULT not in results.arms:
            continue
        cells = [
            PROBLEMS[data].title,
            f"{results.measure.says}, {'more' if results.measure.larger else 'less'} is better",
        ]
        for other in (EQUAL, TUNED):
            for read, digits in ((results.main, results.measure.digits), (worst, 3)):
                cells.append(cell(results.gain(DEFAULT, other, "none", read), digits, sign=True))
        lines.append(cells)
    return rows(heads, lines)


def target(found: Overview) -> str:
    """Return a sentence about the default and what is asked of it."""
    count = len(found.families)
    peers = [arm for arm in found.field if ARMS[arm].peer and arm != EQUAL]
    mine = found.mean_rank(DEFAULT).mean() if DEFAULT in found.arms else math.nan
    best = min(peers, key=lambda arm: found.mean_rank(arm).mean(), default=None)
    level, ahead = found.level(DEFAULT, EQUAL)[0], found.ahead(DEFAULT, TUNED)[0]
    rank = "" if best is None else f"; the best balancer, {best}: {found.mean_rank(best).mean():.1f}"
    equal = f"equal weights: {found.mean_rank(EQUAL).mean():.1f}" if EQUAL in found.arms else ""
    return (
        f"The default, {DEFAULT}: mean rank {mine:.1f} ({equal}{rank}); no worse than equal weights on {level} of "
        f"{count} problems (asked for: all); ahead of the tuned sum in the worst goal, with the measure no lower, on "
        f"{ahead} (asked for: 6)."
    )


def section(sets: Mapping[str, Results]) -> list[str]:
    """Return the paragraphs of the page."""
    found = Overview(sets)
    return ["## All problems", HOW, target(found), rank_table(found), figure_table(found), default_table(found)]


HOW = """\
Cells of the second table are the problem's measure / the worst goal. A rank is that among the rules that were run on
every problem, by the measure and by the worst goal of each seed; variants of a problem count as one. Others, and the
tuned sums, have the rank that they would have among these. *No worse than equal weights*: neither figure is worse
beyond its interval. *Ahead of the tuned sum*: the worst goal is better, and the measure is no lower. Brackets hold
bootstrap 95% intervals; those of differences are over paired seeds.
"""
