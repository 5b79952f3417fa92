"""Test the table of the install matrix, without installing anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import install_matrix

WORKS = {"outcome": "works", "as_expected": True, "serve": ["cpu"], "cuda": "", "seconds": 40, "torch": "2.13.0"}


def test_cells_are_every_combination_once() -> None:
    names = [cell.name for cell in install_matrix.cells(cuda=True)]
    assert len(names) == len(set(names)) == 2 * 2 * 3 * 3 + 1 + 4 + 6
    assert {name for name in names if install_matrix.Cell(*name.split("/")).error} == {
        *(f"none/g++/{what}/no-isolation" for what in install_matrix.WHATS),
        "none/none/editable/bare",
    }


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (WORKS, "| CPU build | g++ | wheel | cpu, 40 s |"),
        ({**WORKS, "as_expected": False}, "**unexpected** cpu, 40 s"),
        ({**WORKS, "cuda": "13.0"}, "cpu and CUDA 13.0, 40 s"),
        ({"outcome": "clear error", "as_expected": True, "said": "..."}, "| clear error |"),
        ({"outcome": "fails", "as_expected": False, "said": "..."}, "| **unexpected** fails |"),
    ],
)
def test_the_table_shows_every_outcome(result: dict[str, object], shown: str) -> None:
    found = {"cells": {"cpu/g++/wheel/pip": result, "cpu/g++/sdist/uv": WORKS}, "python": "3.11", "machine": "Linux"}
    text = install_matrix.table(found)
    assert (
        shown in text
        and text.count("not run") == 2
        and text.startswith("| torch before | compiler | from | pip | uv |")
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"packages": {"torch": "2.15.0", "bomkern": "0.1.0", "triton": "3.8.0"}, "torch": [1]}, ""),
        ({"packages": {"torch": "2.15.0", "bomkern": "0.1.0"}, "torch": [2]}, "torch was [1] and is [2]"),
        ({"packages": {"torch": "2.13.0", "bomkern": "0.1.0"}, "torch": [1]}, "torch 2.15.0 is 2.13.0"),
        ({"packages": {"bomkern": "0.1.0"}, "torch": [1]}, "torch 2.15.0 is gone"),
        ({"packages": {"torch": "2.15.0", "pykeops": "2.3"}, "torch": [1]}, "pykeops is new"),
    ],
)
def test_what_an_installation_changes_besides_is_seen(after: dict[str, object], said: str) -> None:
    assert install_matrix.changed({"packages": {"torch": "2.15.0"}, "torch": [1]}, after) == said
