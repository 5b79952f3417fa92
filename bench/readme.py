"""The parts of the main README that commands write, each between two marks."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
END = "<!-- end of what it writes -->"


def begin(command: str) -> str:
    """Return the mark before the part that a command writes."""
    return f"<!-- written by {command} -->"


def put(readme: str, command: str, part: str) -> str:
    """Return the README with the part of a command replaced.

    Raises:
        ValueError: the README lacks the marks.
    """
    before, mark, rest = readme.partition(begin(command))
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"{README} has no {begin(command)} ... {END}")
    return f"{before}{mark}\n\n{part.strip()}\n\n{END}{after}"
