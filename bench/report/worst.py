"""Summarize figures over the regimes, the kinds of data that an op is benched on: the worst, their spread, and all.

The worst regime is the one with bomkern's longest time, or for a peer that with its least ratio to bomkern's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bench.report.tables import Lines, against, ratio, table, text, time
from bench.report.tables import named as sized
from bench.results import Results, Row, Size

OURS, EAGER, BOTH = "bomkern", "eager", "forward+backward"
LIMIT = 1.3  # the most that bomkern's slowest regime may take over its fastest, in single precision
TURNS = "forward+backward, regimes in turn"  # the direction of benches that time all regimes in turn
HALF = "half"  # the regime of half precision: half the bytes, and conversions in every kernel
WORDS = {
    "busy and idle": "means from 0.03 to 2 deviations wide by dimension, log-variances about -1",
    "wide": "means 0.3 deviations wide, log-variances about -0.3: posteriors that overlap",
    "noisy views": "normal codes, each view with noise of deviation 0.3",
    "step 0": "codes of the trainer's encoder before its first step, see bench/regimes.py",
    "step 100": "the same after 100 steps",
    "step 1000": "the same after 1,000 steps",
    "normal": "means of deviation 1, log-variances about 0",
    "separated": "clusters ten posterior deviations apart, log-variance -3",
    "collapsed": "the posterior is the prior to some hundredths",
    "sharp": "means of deviation 1, log-variance -8",
    "uniform": "raw values between 0.05 and 1.05",
    "near the ideal": "deficits from 1e-6 to 1e-2",
    "far beyond": "deficits from 100 to 10,000",
    "all tied": "linear goals tie exactly in each sample, others are at their ideal",
    "one behind": "one deficit from 8 to 12, where weights of the smooth minimum underflow, the others below 0.05",
    "one hopeless": "one deficit from 50 to 1,000, the others below 0.05",
    HALF: "bfloat16: of codes those of step 1000, of goals deficits between 0.05 and 1.05",
}
Peers = Mapping[str, Row]


class Worst(NamedTuple):
    """The worst figures over the regimes of a case at a size.

    Attributes:
        slowest: bomkern's bench with the longest time. where: its regime.
        spread: `spread` of bomkern's times with regimes timed in turn. widest: the slowest regime of those.
        least: each peer's least ratio and its regime, for peers with a right result in any regime.
    """

    slowest: Row
    where: str
    spread: float | None
    widest: str | None
    least: dict[str, tuple[float, str]]

    @property
    def bad(self) -> str:
        """The regime in which the ratio to eager is least."""
        return self.least[EAGER][1] if EAGER in self.least else ""


def worst(regimes: Mapping[str, Peers], turns: Row | None = None) -> Worst | None:
    """Return the worst figures, or None where bomkern was not measured.

    ``turns`` is the bench that timed the regimes in turn, if there is one.
    """
    ours = {name: peers[OURS] for name, peers in regimes.items() if OURS in peers}
    if not ours:
        return None
    where = max(ours, key=lambda name: ours[name]["seconds"])
    least: dict[str, tuple[float, str]] = {}
    for name, mine in ours.items():
        for peer, row in regimes[name].items():
            if peer != OURS and "seconds" in row:
                ratio_here = row["seconds"] / mine["seconds"], name
                least[peer] = min(ratio_here, least.get(peer, ratio_here))
    turns = turns or {}
    return Worst(ours[where], where, turns.get("spread"), turns.get("slowest"), least)


def by_case(results: Results, case: str, direction: str) -> dict[Size, Worst]:
    """Return the worst figures for each size at which bomkern was measured."""
    turns = {size: peers[OURS] for size, peers in results.of(case, TURNS).items()} if direction == BOTH else {}
    sizes = results.regimes(case, direction)
    return {size: figures for size, regimes in sizes.items() if (figures := worst(regimes, turns.get(size)))}


def spread(seconds: Mapping[str, float]) -> tuple[float, str] | None:
    """Return the slowest regime of single precision over the fastest, and its name; None with fewer than two."""
    single = {name: spent for name, spent in seconds.items() if name != HALF}
    if len(single) < 2:
        return None
    slowest = max(single, key=lambda name: single[name])
    return single[slowest] / min(single.values()), slowest


def as_info(seconds: Mapping[str, float]) -> dict[str, float | str]:
    """Return `spread` as entries of ``extra_info``, empty where there is none."""
    measured = spread(seconds)
    return {} if measured is None else {"spread": measured[0], "slowest": measured[1]}


def told(apart: float | None) -> str:
    """Format a spread, in bold above the limit."""
    if apart is None:
        return ""
    return f"{apart:.1f}x" if apart <= LIMIT else f"**{apart:.2f}x**"


def by_size(results: Results, case: str, direction: str) -> Lines:
    """Return a table of the worst figures over the regimes, with a row for each peer and a column for each size.

    The table is empty where bomkern was not measured.
    """
    sizes, by_size = results.regimes(case, direction), by_case(results, case, direction)
    if not by_size:
        return []
    peers = list(dict.fromkeys(peer for regimes in sizes.values() for rows in regimes.values() for peer in rows))
    lines = [[OURS, *(time(w.slowest["seconds"]) for w in by_size.values())]]
    for peer in peers:
        if peer != OURS:
            lines.append([peer, *(ratio(w.least[peer][0]) if peer in w.least else "" for w in by_size.values())])
    if any(len(regimes) > 1 for regimes in sizes.values()):
        lines.append(["slowest / fastest", *(told(w.spread) for w in by_size.values())])
        lines.append(["slowest regime", *(w.where if len(sizes[size]) > 1 else "" for size, w in by_size.items())])
        lines.append(["worst regime", *(w.bad if len(sizes[size]) > 1 else "" for size, w in by_size.items())])
    return table(["", *map(sized, by_size)], lines)


def of_all(results: Results, case: str) -> Lines:
    """Return a table of forward and backward with a row for each size and regime; empty where there is one regime."""
    sizes = {size: regimes for size, regimes in results.regimes(case, BOTH).items() if len(regimes) > 1}
    peers = list(dict.fromkeys(peer for regimes in sizes.values() for rows in regimes.values() for peer in rows))
    peers = [OURS, *(peer for peer in peers if any(_in_several_regimes(regimes, peer) for regimes in sizes.values()))]
    rows = [
        [sized(size), regime, *(_cell(by_peer.get(peer), by_peer.get(OURS)) for peer in peers)]
        for size, regimes in sizes.items()
        for regime, by_peer in regimes.items()
    ]
    return table(["", "", *peers], rows) if rows else []


def _in_several_regimes(regimes: Mapping[str, Peers], peer: str) -> bool:
    """Return whether a peer was timed in more than the usual regime."""
    return peer != OURS and sum(peer in rows for rows in regimes.values()) > 1


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None or ours is None:
        return ""
    return "wrong" if "wrong" in row else against(row, ours)


def apart(results: Results, cases: Mapping[str, str]) -> list[tuple[str, Size, Worst]]:
    """Return the cases and sizes at which bomkern's spread is above the limit, largest first."""
    over = [
        (case, size, figures)
        for case in cases
        for size, figures in by_case(results, case, BOTH).items()
        if figures.spread and figures.spread > LIMIT
    ]
    return sorted(over, key=lambda entry: -(entry[2].spread or 0.0))


def section(results: Results, cases: Mapping[str, str]) -> Lines:
    """Return the page's section on kinds of data: their description, bomkern's spread, and all figures."""
    tables = {case: lines for case in cases if (lines := of_all(results, case))}
    if not tables:
        return []
    used = {regime for case in tables for regimes in results.regimes(case, BOTH).values() for regime in regimes}
    lines = ["## Kinds of data", ""]
    lines += text(
        "bomkern's time forward and backward on every kind of data, and each peer's time over it. A peer is wrong "
        "where its result differs from the reference's by more than its tolerance (bench/harness.py); it is not timed "
        "then."
    )
    lines += table(["regime", ""], [[name, words] for name, words in WORDS.items() if name in used])
    over = apart(results, cases)
    lines += text(
        f"In single precision bomkern's slowest regime may take {LIMIT} times as long as its fastest. For this "
        "comparison the regimes are timed in turn, so that load on the machine affects all alike. "
        + ("The limit does not hold for:" if over else "The limit holds everywhere.")
    )
    if over:
        rows = [[case, sized(size), told(figures.spread), figures.widest or ""] for case, size, figures in over]
        lines += table(["", "", "slowest / fastest", "slowest regime"], rows)
    for case, rows_of_case in tables.items():
        lines += [f"{cases[case]}:", "", *rows_of_case]
    return lines
