"""The main README's table of the study: each problem, and what the default does there beside its peers."""

from __future__ import annotations

from collections.abc import Mapping

from bench.policies.arms import ARMS, DEFAULT, EQUAL, TUNED
from bench.policies.overview import Overview, target
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
                f"**{_cell(results, DEFAULT)}**",
            ]
        )
    seeds = max((len(results.seeds) for results in sets.values()), default=0)
    heads = ["problem", "measure / worst goal", "equal weights", "best peer there", "best of 30 weightings", "bomkern"]
    last = f"(`{COMMAND}`; means of {seeds} seeds at one time budget. {target(Overview(sets))})"
    return f"{rows(heads, lines)}\n\n{last}"
