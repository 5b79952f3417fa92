"""Test that a diagnosis notices what the rows of `Spill(budget=)` show, about as early as from all rows."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from bomkern import Anchored, GoalSet, History, Spill, diagnose

STEPS, BEGIN = 600, 150  # the last goal gets worse from step BEGIN on
LEVELS = torch.tensor([2.0, 1.6, 1.3, 1.0, 0.8, 0.4])  # the raw values of six goals, of weights 32/63 to 1/63


def history(seed: int, budget: float | None) -> History:
    """Return the history of six noisy goals, of which the best one drifts up to the worst."""
    generator = torch.Generator().manual_seed(seed)
    goals = GoalSet({f"g{k}": Anchored(0.0, 1.0) for k in range(6)}, spill=Spill(0.5, budget=budget, seed=seed))
    for step in range(STEPS):
        values = LEVELS.clone()
        values[5] += max(0, step - BEGIN) * 0.006
        rows = values[:, None] * torch.empty(6, 64).exponential_(generator=generator)
        out = goals({f"g{k}": row for k, row in enumerate(rows.requires_grad_())})
        if step == BEGIN:
            assert out.rows.tolist()[5] == (64 if budget is None else 2)
    return goals.history


def noticed(history: History) -> int:
    """Return the steps from the begin of the drift to the first history with a finding about this goal."""

    def found(steps: int) -> bool:
        findings = diagnose(history.first_rows(steps))
        return any("g5" in finding.goals for finding in findings if finding.kind != "crowded")

    assert not found(BEGIN) and found(STEPS)
    low, high = BEGIN, STEPS
    while high - low > 4:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high - BEGIN


@pytest.mark.slow
def test_a_goal_of_small_weight_that_gets_worse_is_diagnosed_about_as_early() -> None:
    """Two of 64 rows report it within 20% of the steps that all rows need, for each of four seeds."""
    exact, ours = ([noticed(history(seed, budget)) for seed in range(4)] for budget in (None, 1.0))
    assert 200 < median(exact) < 350
    assert all(one <= 1.2 * all_rows for one, all_rows in zip(ours, exact, strict=True))
