"""Figures over the regimes, the kinds of data that an op is benched on: the worst of them, how far they lie apart, all.

A regime is worst for bomkern's time where that is longest, and for a peer where its time over bomkern's is least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bench.report.tables import Lines, against, ratio, table, text, time
from bench.report.tables import named as sized
from bench.results import Results, Row, Size

OURS, EAGER, BOTH = "bomkern", "eager", "forward+backward"
LIMIT = 1.3  # bomkern's slowest regime over its fastest of single precision
TURNS = "forward+backward, regimes in turn"  # the direction of what tells how far they lie apart
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
    """Of the regimes of a case at a size.

    Attributes:
        slowest: bomkern's bench where it took longest. where: that regime.
        spread: `spread` of bomkern's times when regimes are timed in turn. widest: the slowest one then.
        least: of each peer that was right somewhere its least ratio, and the regime.
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
    """None where bomkern was not measured. ``turns`` is the bench of regimes in turn, if there is one."""
    ours = {name: peers[OURS] for name, peers in regimes.items() if OURS in peers}
    if not ours:
        return None
    where = max(ours, key=lambda name: ours[name]["seconds"])
    least: dict[str, tuple[float, str]] = {}
    for name, mine in ours.items():
        for peer, row in regimes[name].items():
            if peer != OURS and "seconds" in row:
                found = row["seconds"] / mine["seconds"], name
                least[peer] = min(found, least.get(peer, found))
    turns = turns or {}
    return Worst(ours[where], where, turns.get("spread"), turns.get("slowest"), least)


def by_case(results: Results, case: str, direction: str) -> dict[Size, Worst]:
    """Of each size at which bomkern was measured."""
    turns = {size: peers[OURS] for size, peers in results.of(case, TURNS).items()} if direction == BOTH else {}
    sizes = results.regimes(case, direction)
    return {size: seen for size, regimes in sizes.items() if (seen := worst(regimes, turns.get(size)))}


def spread(seconds: Mapping[str, float]) -> tuple[float, str] | None:
    """The slowest regime of single precision over the fastest, and which it is; None where there is one."""
    single = {name: spent for name, spent in seconds.items() if name != HALF}
    if len(single) < 2:
        return None
    slowest = max(single, key=lambda name: single[name])
    return single[slowest] / min(single.values()), slowest


def as_info(seconds: Mapping[str, float]) -> dict[str, float | str]:
    """`spread` as a bench keeps it; nothing where there is none."""
    found = spread(seconds)
    return {} if found is None else {"spread": found[0], "slowest": found[1]}


def told(apart: float | None) -> str:
    """In bold above the limit."""
    if apart is None:
        return ""
    return f"{apart:.1f}x" if apart <= LIMIT else f"**{apart:.2f}x**"


def by_size(results: Results, case: str, direction: str) -> Lines:
    """A row for each peer, a column for each size: the worst over the regimes, and which they are.

    Nothing where bomkern was not measured.
    """
    sizes, found = results.regimes(case, direction), by_case(results, case, direction)
    if not found:
        return []
    peers = list(dict.fromkeys(peer for regimes in sizes.values() for rows in regimes.values() for peer in rows))
    lines = [[OURS, *(time(seen.slowest["seconds"]) for seen in found.values())]]
    for peer in peers:
        if peer != OURS:
            lines.append([peer, *(ratio(seen.least[peer][0]) if peer in seen.least else "" for seen in found.values())])
    if any(len(regimes) > 1 for regimes in sizes.values()):
        lines.append(["slowest / fastest", *(told(seen.spread) for seen in found.values())])
        lines.append(["slowest regime", *(seen.where if len(sizes[size]) > 1 else "" for size, seen in found.items())])
        lines.append(["worst regime", *(seen.bad if len(sizes[size]) > 1 else "" for size, seen in found.items())])
    return table(["", *map(sized, found)], lines)


def of_all(results: Results, case: str) -> Lines:
    """Forward and backward, a row for each size and regime; nothing where there is one regime."""
    sizes = {size: regimes for size, regimes in results.regimes(case, BOTH).items() if len(regimes) > 1}
    peers = list(dict.fromkeys(peer for regimes in sizes.values() for rows in regimes.values() for peer in rows))
    peers = [OURS, *(peer for peer in peers if any(_further(regimes, peer) for regimes in sizes.values()))]
    rows = [
        [sized(size), regime, *(_cell(found.get(peer), found.get(OURS)) for peer in peers)]
        for size, regimes in sizes.items()
        for regime, found in regimes.items()
    ]
    return table(["", "", *peers], rows) if rows else []


def _further(regimes: Mapping[str, Peers], peer: str) -> bool:
    """Whether a peer was asked in more than the usual regime."""
    return peer != OURS and sum(peer in rows for rows in regimes.values()) > 1


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None or ours is None:
        return ""
    return "wrong" if "wrong" in row else against(row, ours)


def apart(results: Results, cases: Mapping[str, str]) -> list[tuple[str, Size, Worst]]:
    """Where bomkern's times lie further apart than the limit."""
    found = [
        (case, size, seen)
        for case in cases
        for size, seen in by_case(results, case, BOTH).items()
        if seen.spread and seen.spread > LIMIT
    ]
    return sorted(found, key=lambda one: -(one[2].spread or 0.0))


def section(results: Results, cases: Mapping[str, str]) -> Lines:
    """All regimes of every case, what each is, and whether bomkern keeps its limit."""
    tables = {case: made for case in cases if (made := of_all(results, case))}
    if not tables:
        return []
    seen = {regime for case in tables for regimes in results.regimes(case, BOTH).values() for regime in regimes}
    lines = ["## Kinds of data", ""]
    lines += text(
        "Time forward and backward of bomkern, and of each peer how many times that is, on every kind of data. A peer "
        "is wrong where its result is not the reference's to its tolerance (bench/harness.py); its time is not taken."
    )
    lines += table(["regime", ""], [[name, words] for name, words in WORDS.items() if name in seen])
    over = apart(results, cases)
    lines += text(
        f"Of single precision bomkern's slowest regime may take {LIMIT} times as long as its fastest. For this alone "
        "regimes are timed one after the other in turn, so that a busy neighbour meets all. "
        + ("It does not hold for:" if over else "It holds everywhere.")
    )
    if over:
        rows = [[case, sized(size), told(found.spread), found.widest or ""] for case, size, found in over]
        lines += table(["", "", "slowest / fastest", "slowest regime"], rows)
    for case, made in tables.items():
        lines += [f"{cases[case]}:", "", *made]
    return lines
