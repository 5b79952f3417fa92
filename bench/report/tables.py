"""How the report writes figures and tables."""

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
    """Of resident memory less than a megabyte cannot be told from its own error."""
    held = row.get("peak_bytes")
    return "" if held is None else megabytes(held) if held >= 1e6 else "< 1 MB"


def ratio(x: float) -> str:
    return f"{x:.0f}x" if x >= 10 else f"{x:.1f}x"


def against(row: Row, ours: Row) -> str:
    """The time of one's own, and of a peer how many times that is."""
    return time(row["seconds"]) if row is ours else ratio(row["seconds"] / ours["seconds"])


def named(size: Size) -> str:
    """Without the number of goals, which is nine everywhere."""
    return ", ".join(f"{letter} = {n:,}" for letter, n in size if letter != "K")


def text(*paragraphs: str) -> Lines:
    """Paragraphs of the page, filled."""
    lines = []
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False), ""]
    return lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def by_size(sizes: dict[Size, dict[str, Row]], cell: Callable[[Row], str]) -> Lines:
    """A row for each peer, a column for each size; ``cell`` is given the peer's bench."""
    peers = list(dict.fromkeys(peer for found in sizes.values() for peer in found))
    rows = [[peer, *(cell(found[peer]) if peer in found else "" for found in sizes.values())] for peer in peers]
    return table(["", *map(named, sizes)], rows)
