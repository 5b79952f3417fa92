"""Test that tables and representations show the numbers in force."""

from __future__ import annotations

from bomkern import Anchored, Box, GoalSet, Lower, Minimize, Upper
from bomkern.nn import MinGoalLoss


def test_the_table_shows_the_numbers_in_force() -> None:
    goals = GoalSet(
        far=Anchored("floor", 1.0), x=Anchored(0.0, 1.0, moving=True, halflife=1.0), y=Upper(1.0, 0.5), z=Box(0.0, 2.0)
    )
    lines = str(goals).splitlines()
    assert lines[2].split()[-2:] == ["unknown", "unknown"] and "Anchored(ideal=0, nadir=1, moving=True)" in lines[3]
    goals.anchor(floor={"far": 0.5})
    goals.remeasure({"x": (0.0, 3.0)})
    goals["y"] = Upper(2.0, 0.25)
    goals["z"] = Box(1.0, 3.0)
    goals["far"] = Lower(4.0, 1.0)
    table = str(goals)
    for text in (
        "Lower(limit=4, margin=1)", "Anchored(ideal=0, nadir=2, moving=True)", "Upper(limit=2, margin=0.25)",
        "BoxAsymmetric(lower=1, healthy=2, upper=3, tail=0.05)",
    ):  # fmt: skip
        assert text in table
    goals["y"] = Minimize(3.0, 0.5)
    assert "Minimize(scale=3, ideal=0.5)" in str(goals)


def test_a_loss_prints_the_parameters_in_force() -> None:
    one, two = MinGoalLoss([Minimize(1.0), Upper(1.0, 0.5)]), MinGoalLoss([Minimize(2.0), Upper(1.0, 0.5)])
    two.load_state_dict(one.state_dict())
    assert "Minimize(scale=1, ideal=0), Upper(limit=1, margin=0.5)" in repr(two)
