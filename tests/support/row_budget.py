"""A `GoalSet` of four goals with a budget of rows, and the rows that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bomkern import GoalSet, Minimize, Spill

from .servers import PAIRS, why_skipped

IMPLS = [impl for impl, device in PAIRS if device == "cpu" and why_skipped("goal_set", impl, device) is None]
EACH = pytest.mark.parametrize("impl", IMPLS)
NAMES = ("a", "b", "c", "d")
WEIGHTS = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64) / 15  # of Spill(0.5) for goals in order


def four(budget: float | None, **options: Any) -> GoalSet:
    spill = Spill(0.5, budget=budget, seed=options.pop("seed", 0))
    goals = GoalSet({name: Minimize(1.0 + k) for k, name in enumerate(NAMES)}, spill=spill, **options).double()
    goals.multipliers.copy_(WEIGHTS)
    return goals


def rows_of(goals: GoalSet, batch: int, **given: Any) -> list[list[int]]:
    """Return the rows from which each goal gets gradient in one step."""
    raw = {name: torch.rand(batch, dtype=torch.float64, requires_grad=True) for name in NAMES}
    goals(raw, **given).loss.backward()
    return [raw[name].grad.nonzero()[:, 0].tolist() for name in NAMES]
