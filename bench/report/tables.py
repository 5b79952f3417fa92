"""Format the report's figures and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

from bench.results import Row, Size

WIDTH = 120
Lines = list[str]


def time(seconds: float) -> str:
    for unit, worth in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= worth:
            return f"{seconds / worth:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.3g} MB" if count < 1e9 else f"{count / 1e6:,.0f} MB"


def memory(row: Row) -> str:
    """Format the peak memory; below a megabyte the measurement error of resident memory is as large."""
    peak = row.get("peak_bytes")
    return "" if peak is None else megabytes(peak) if peak >= 1e6 else "< 1 MB"


def ratio(x: float) -> str:
    return f"{x:.0f}x" if x >= 10 else f"{x:.1f}x"


def against(row: Row, ours: Row) -> str:
    """Return the time of our row, and for a peer the ratio of its time to ours."""
    return time(row["seconds"]) if row is ours else ratio(row["seconds"] / ours["seconds"])


def named(size: Size) -> str:
    """Format a size without the number of goals, which is always nine."""
    return ", ".join(f"{letter} = {n:,}" for letter, n in size if letter != "K")


def text(*paragraphs: str) -> Lines:
    """Return paragraphs of the page, wrapped to `WIDTH`."""
    lines = []
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False), ""]
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def by_size(sizes: dict[Size, dict[str, Row]], cell: Callable[[Row], str]) -> Lines:
    """Return a table with a row for each peer and a column for each size; ``cell`` formats a row of the results."""
    peers = list(dict.fromkeys(peer for by_peer in sizes.values() for peer in by_peer))
    rows = [[peer, *(cell(by_peer[peer]) if peer in by_peer else "" for by_peer in sizes.values())] for peer in peers]
    return table(["", *map(named, sizes)], rows)
