"""Test random training loops against a plain model of the rule: step by step, in value, gradient, shares and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.support.processes import on_two_ranks

from ..support import random_loops

HAPPENED = ("accumulated", "closure", "masked", "absent", "rejected", "not finite", "resumed", "validated")


def check(did: dict[str, int], loops: int) -> None:
    """Check that the loops were what they are for, and that few ended because rounding would have decided."""
    assert did.get("tied", 0) <= loops / 20, did
    assert not set(HAPPENED) - {name for name, count in did.items() if count}, did


def test_a_hundred_loops() -> None:
    check(random_loops.run(range(100)), 100)


@pytest.mark.slow
def test_seven_hundred_loops() -> None:
    check(random_loops.run(range(100, 800)), 700)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_a_compiled_loop(seed: int) -> None:
    torch._dynamo.reset()
    did = random_loops.run(range(seed, seed + 1), compiled=True, steps=4)
    assert did.keys() <= {*HAPPENED, "tied"}


def _loops(group: Any, rank: int, loops: int) -> dict[str, int]:
    return random_loops.run(range(10_000, 10_000 + loops), group=group)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("loops", [30, pytest.param(190, marks=pytest.mark.slow)])
def test_loops_on_two_ranks(tmp_path: Path, loops: int) -> None:
    did = on_two_ranks(_loops, tmp_path, loops)
    assert len(did) == 2 and did[0] == did[1]
    check(did[0], loops)
