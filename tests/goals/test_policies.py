"""Test every policy in a GoalSet: it trains, resumes bitwise, is saved and diagnosed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Calibrated, Fixed, GoalSet, History, Minimize, Policy, Tracking, diagnose

STEPS = 40
EXAMPLES: dict[str, Callable[[], Policy]] = {
    "Anchored": lambda: Anchored(0.1, 0.9),
    "Calibrated": lambda: Calibrated(4),
    "Fixed": lambda: Fixed(Minimize(0.5)),
    "Tracking": lambda: Tracking(halflife=3.0),
}
EVERY = pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES)


def trained(goals: GoalSet, first: int, last: int) -> list[Tensor]:
    """Return the losses of some steps on reproducible raw values."""
    found = []
    for step in range(first, last):
        source = torch.Generator().manual_seed(step)
        raw = {name: torch.rand(8, generator=source).requires_grad_() for name in ("own", "other")}
        out = goals(raw)
        out.loss.backward()
        found.append(out.loss.detach())
    return found


def test_every_policy_has_an_example_here() -> None:
    own = {kind.__name__ for kind in Policy.__subclasses__() if kind.__module__.partition(".")[0] == "bomkern"}
    assert own == set(EXAMPLES)


@EVERY
def test_resumes_to_the_bit(make: Callable[[], Policy]) -> None:
    whole, first, second = (GoalSet(own=make(), other=Minimize(1.0), spill=0.5) for _ in range(3))
    losses = trained(whole, 0, STEPS)
    trained(first, 0, STEPS // 2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(losses[STEPS // 2 :]), torch.stack(trained(second, STEPS // 2, STEPS)))


@EVERY
def test_is_recorded_and_diagnosed(make: Callable[[], Policy], tmp_path: Path) -> None:
    goals = GoalSet(own=make(), other=Minimize(1.0))
    trained(goals, 0, STEPS)
    _, scale = goals.anchors()["own"]
    moves = make().until != 0
    assert (scale != pytest.approx(1 / make().constraint.ramp[1])) == moves
    goals.history.save(tmp_path / "history")
    told = [str(diagnose(history)) for history in (goals.history, History.load(tmp_path / "history"))]
    assert "own" in told[0] and told[0] == told[1]
