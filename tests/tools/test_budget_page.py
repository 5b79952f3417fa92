"""Test that what docs/ops/goal_set.md says of a budget of rows is what bench/results/budget.md has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "ops" / "goal_set.md").read_text().split())
RESULTS = (ROOT / "bench" / "results" / "budget.md").read_text()


def rows(heading: str, key: int = 1) -> dict[str, list[str]]:
    """Return the rows of the first table below a heading, by their first ``key`` cells."""
    table = re.search(r"(^\|.*\n)+", RESULTS.partition(f"\n{heading}\n")[2], re.MULTILINE)
    assert table, heading
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]
    return {" ".join(row[:key]): row for row in cells}


def gains(data: str, arm: str) -> tuple[float, float]:
    """Return the gain in PSNR over all rows, after as many steps and after as much time."""
    row = rows(f"## {data}")[arm]
    equal_steps, equal_time = (float(row[column].split(", ")[1].split()[0]) for column in (1, 3))
    return equal_steps, equal_time


def test_photographs() -> None:
    (behind, ahead), (behind3, ahead3) = gains("Photographs", "budget 2"), gains("Photographs", "budget 3")
    assert f"a budget of 2 is {-behind:.2f} dB behind after as many steps, and {ahead:.2f} dB ahead after as" in PAGE
    assert f"A budget of 3 is {-behind3:.2f} dB behind and {ahead3:.2f} dB ahead" in PAGE


def test_digits() -> None:
    (behind, late), (level, late3) = gains("Digits", "budget 2"), gains("Digits", "budget 3")
    assert f"a budget of 2 is {-behind:.2f} dB behind after as many steps, a budget of 3 level" in PAGE
    assert abs(level) < 0.01
    assert f"both are {-late3:.1f} to {-late:.1f} dB behind" in PAGE


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("2", "the drawn rows add {} (digits) and {} (photographs) to the variance"),
        ("1", "With a budget of 1 they add {} and {},"),
        ("3", "with 3 they add {} and {} (`python -m bench.budget --variance`"),
    ],
)
def test_the_variance_of_the_gradient(budget: str, says: str) -> None:
    added = [rows(f"### {data}", 2)[f"0.5 {budget}"][5] for data in ("Digits", "Photographs")]
    assert says.format(*(f"{float(cell.rstrip('%')):.0f}%" for cell in added)) in PAGE
