"""The main README's table of the study: each problem, and what the default does there beside its peers."""

from __future__ import annotations

from collections.abc import Mapping

from bench.policies.arms import ARMS, DEFAULT, EQUAL, TUNED
from bench.policies.overview import Overview
from bench.policies.problems import PROBLEMS
from bench.policies.results import Results, mean, rows, worst

COMMAND = "python -m bench.policies"
WORDS = {"digits": "VAE, 6 goals, digits", "photographs": "VAE, 9 goals, photographs"}


def _cell(results: Results, arm: str) -> str:
    good, bad = (results.values(arm, "none", read) for read in (results.main, worst))
    return f"{mean(good, results.measure.digits)} / {mean(bad, 2)}" if len(good) else ""


def best_peer(results: Results) -> str | None:
    """Return the published balancer with the best measure on the problem, chosen after the fact."""
    sign = 1 if results.measure.larger else -1
    peers = [arm for arm in results.arms if arm in ARMS and ARMS[arm].peer and arm != EQUAL]
    return max(peers, key=lambda arm: sign * results.values(arm, "none", results.main).mean(), default=None)


def table(sets: Mapping[str, Results]) -> str:
    """Return the table, and the sentence of how far the default is from what was asked of it."""
    lines = []
    for data, results in sets.items():
        if DEFAULT not in results.arms:
            continue
        peer = best_peer(results)
        better = "" if results.measure.larger else " (less is better)"
        lines.append(
            [
                WORDS.get(data, PROBLEMS[data].title),
                f"{results.measure.says}{better}",
                _cell(results, EQUAL),
                f"{peer}: {_cell(results, peer)}" if peer else "",
                _cell(results, TUNED),
                _cell(results, DEFAULT),
            ]
        )
    seeds = max((len(results.seeds) for results in sets.values()), default=0)
    heads = ["problem", "measure / worst goal", "equal weights", "best peer there", "best of 30 weightings", "bomkern"]
    told = f"means of {seeds} seeds, {_budget(sets)}. {summary(Overview(sets))}{missing(sets)}"
    return f"{rows(heads, lines)}\n\n(`{COMMAND}`; {told})"


def _budget(sets: Mapping[str, Results]) -> str:
    """Return what the runs have in common; those from before there was a time budget had equal updates."""
    timed = ["steps" in r for results in sets.values() for arm in results.arms for r in results.runs(arm, "none")]
    return "at one time budget" if all(timed) else "partly at equal updates" if any(timed) else "at equal updates"


def summary(found: Overview) -> str:
    """Return sentences about the default beside the other rules."""
    peers = [arm for arm in found.field if ARMS[arm].peer and arm != EQUAL]
    best = min(peers, key=lambda arm: found.mean_rank(arm).mean(), default=None)
    others = {"equal weights": EQUAL} | ({} if best is None else {f"the best published balancer, {best},": best})
    ranks = ", ".join(f"that of {name} is {found.mean_rank(arm).mean():.1f}" for name, arm in others.items())
    level, ahead = found.level(DEFAULT, EQUAL)[0], found.ahead(DEFAULT, TUNED)[0]
    worse = [WORDS.get(name, PROBLEMS[name].title) for name in found.worse(DEFAULT, EQUAL)]
    but = f" (a figure is worse beyond its interval on {', '.join(worse)})" if worse else ""
    return (
        f'bomkern is `GoalSet(..., spill="auto")`. Its mean rank among {len(found.field)} rules is '
        f"{found.mean_rank(DEFAULT).mean():.1f}, {ranks}. It is no worse than equal weights on {level} of "
        f"{len(found.families)} problems{but}, and ahead of the best of 30 weightings in the worst goal, with the "
        f"measure no lower, on {ahead}."
    )


def missing(sets: Mapping[str, Results]) -> str:
    """Return a sentence that names the problems without runs, if there are any."""
    names = [PROBLEMS[data].title for data in PROBLEMS if data not in sets and data == PROBLEMS[data].family]
    return f" Not measured yet: {', '.join(names)}." if names else ""
