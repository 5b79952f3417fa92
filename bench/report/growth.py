"""Fit the exponents at which time and memory grow with B and D."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.results import Results, Row, usual

CASES = ("total_correlation", "covariance_penalty")
LEAST = 3  # least points of a fitted line
LEAST_BYTES = 1e6  # below this, resident memory is mostly measurement error
Fit = tuple[float, float]


class Line(NamedTuple):
    """The exponents of one peer, as one letter of the size grows and the other is ``fixed``."""

    case: str
    letter: str
    fixed: str
    over: str
    peer: str
    time: Fit | None
    memory: Fit | None


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Return the exponent p of ``y ~ x^p`` and its standard error; None with too few points, or with all at one x."""
    x, y = ([math.log(point[i]) for point in points] for i in (0, 1))
    if len(points) < LEAST or len(set(x)) == 1:
        return None
    p, at_one = statistics.linear_regression(x, y)
    off = math.fsum((b - at_one - p * a) ** 2 for a, b in zip(x, y, strict=True))
    return p, math.sqrt(off / (len(x) - 2) / (len(x) - 1) / statistics.variance(x))


def exponents(results: Results) -> Iterator[Line]:
    """Yield the exponents of each peer of each case, in B and in D."""
    for case in CASES:
        rows = [row for row in results.rows if row["case"] == case and row["direction"] == "forward+backward"]
        rows = [row for row in rows if usual(row)]
        for letter, other in ("BD", "DB"):
            for peer in dict.fromkeys(row["peer"] for row in rows):
                line = _longest([row for row in rows if row["peer"] == peer], letter, other)
                if len(line) < LEAST:
                    continue
                x = [row["size"][letter] for row in line]
                spent = fit([(row["size"][letter], row["seconds"]) for row in line])
                large = [row for row in line if row.get("peak_bytes", 0) >= LEAST_BYTES]
                memory = fit([(row["size"][letter], row["peak_bytes"]) for row in large])
                fixed, over = f"{other} = {line[0]['size'][other]:,}", f"{x[0]:,} to {x[-1]:,}"
                yield Line(case, letter, fixed, over, peer, spent, memory)


def _longest(rows: Sequence[Row], letter: str, other: str) -> list[Row]:
    """Return the longest sequence of rows that differ in one letter alone, sorted by it."""
    lines: dict[int, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["size"][other], []).append(row)
    longest = max(lines.values(), key=len, default=[])
    return sorted(longest, key=lambda row: row["size"][letter])
