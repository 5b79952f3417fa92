"""The main README's table of the study: each problem, and what the default does there beside its peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.policies.arms import ARMS, BRIGHT, DEFAULT, EQUAL, TUNED
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
                _cell(results, TUNED),
                _cell(results, BRIGHT),
                f"{peer}: {_cell(results, peer)}" if peer else "",
                _cell(results, DEFAULT),
            ]
        )
    seeds = max((len(results.seeds) for results in sets.values()), default=0)
    heads = ["problem", "measure / worst goal", "equal weights", "best of 30 by worst goal", "best of 30 by measure"]
    told = "\n".join(f"- {line}" for line in summary(Overview(sets)))
    means = f"(`{COMMAND}`; means of {seeds} seeds, {_budget(sets)}.{missing(sets)})"
    return f"{rows([*heads, 'best peer there', 'bomkern'], lines)}\n\n{means}\n\n{told}"


def _budget(sets: Mapping[str, Results]) -> str:
    """Return what the runs have in common; those from before there was a time budget had equal updates."""
    timed = ["steps" in r for results in sets.values() for arm in results.arms for r in results.runs(arm, "none")]
    return "at one time budget" if all(timed) else "partly at equal updates" if any(timed) else "at equal updates"


def summary(found: Overview) -> list[str]:
    """Return sentences about the default beside the other rules."""
    peers = [arm for arm in found.field if ARMS[arm].peer and arm != EQUAL]
    best = min(peers, key=lambda arm: found.mean_rank(arm).mean(), default=None)
    others = {"bomkern": DEFAULT, "equal weights": EQUAL}
    others |= {} if best is None else {f"the best published balancer of these, {best}": best}
    ranks = [
        f"{name} {found.mean_rank(arm).mean():.1f} ({found.mean_rank(arm, ('main',)).mean():.1f} by the measure, "
        f"{found.mean_rank(arm, ('worst',)).mean():.1f} by the worst goal)"
        for name, arm in others.items()
    ]
    verdicts = found.verdicts(DEFAULT, EQUAL)
    each = [
        f"{says} on {_names(name for name, verdict in verdicts.items() if verdict == says) or 'none'}"
        for says in ("better", "worse", "undecided")
    ]
    won = found.winning(DEFAULT, TUNED)
    return [
        f"Against equal weights: {'; '.join(each)}. *Worse* means one figure beyond its 95% interval, *better* one "
        "figure and none worse.",
        f"Ahead of the best of 30 by worst goal, with the measure no lower, on {len(won)} of {len(found.families)}: "
        f"{_names(won) or 'none'}.",
        f"Mean rank among the {len(found.field)} rules that fit all of them: {'; '.join(ranks)}.",
    ]


def _names(problems: Iterable[str]) -> str:
    return ", ".join(PROBLEMS[name].title for name in problems)


def missing(sets: Mapping[str, Results]) -> str:
    """Return a sentence that names the problems without runs, if there are any."""
    names = [PROBLEMS[data].title for data in PROBLEMS if data not in sets and data == PROBLEMS[data].family]
    return f" Not measured yet: {', '.join(names)}." if names else ""
