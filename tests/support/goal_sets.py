"""A `GoalSet` of every policy, and the rules that a set can have."""

from __future__ import annotations

from typing import Any

import pytest

from bomkern import (
    Anchored,
    Calibrated,
    Fixed,
    GoalSet,
    Group,
    MinimizeHard,
    Policy,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
)

RULES: dict[str, dict[str, Any]] = {
    "hard": {},
    "global": {"reduction": "min"},
    "smooth": {"temperature": 0.1},
    "spill": {"spill": Spill(0.5)},
    "budget": {"spill": Spill(0.5, budget=0.7)},
    "guard": {"guard": ShareGuard(0.1, 0.3)},
    "guarded": {"guard": ShareGuard(0.1, 0.3), "temperature": 0.1, "reduction": "none"},
    "spilling, guarded": {"guard": ShareGuard(0.1, 0.3), "spill": 0.5, "reduction": "sum"},
}
EACH_RULE = pytest.mark.parametrize("rule", RULES)


def every_policy(**rule: Any) -> GoalSet:
    """Return a GoalSet with every policy and a group, whose values would differ between processes."""
    goals: dict[str, Policy | Group] = {
        "max": Calibrated(4),
        "quantile": Calibrated(4, statistic=0.9),
        "hard": Fixed(MinimizeHard(1.0)),
        "tracking": Tracking(halflife=3),
        "moving": Anchored(0.5, 1.0, moving=True),
        "both": Group(a=Anchored(0.0, 2.0), b=Fixed(Upper(1.0, 0.5))),
    }
    return GoalSet(goals, **rule)
