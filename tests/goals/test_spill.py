"""Test `GoalSet(spill=...)`: goals weighted by the order of their deficits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bomkern import Anchored, GoalSet, Group, Minimize, Spill


def feed(goals: GoalSet, values: dict[str, Any], steps: int = 1) -> Any:
    for _ in range(steps):
        out = goals(values)
    return out


def test_the_first_step_weighs_all_alike_and_the_next_by_order() -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), c=Minimize(1.0), spill=0.5)
    raw = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0, 7.0]), "c": torch.tensor([0.0, 0.0])}
    raw = {name: x.requires_grad_() for name, x in raw.items()}
    first = goals(raw)
    assert torch.allclose(first.share, torch.full((3,), 1 / 3))
    assert first.loss.item() == pytest.approx((2 + 6 + 0) / 3)
    second = goals(raw)
    assert torch.allclose(second.share, torch.tensor([2 / 7, 4 / 7, 1 / 7]))
    assert second.loss.item() == pytest.approx((2 * 2 + 4 * 6) / 7)
    second.loss.backward()
    assert torch.allclose(raw["b"].grad, torch.full((2,), 4 / 7 / 2))  # every sample gets the goal's weight


@given(
    deficits=st.lists(st.integers(-30, 500), min_size=2, max_size=9, unique=True),
    ratio=st.floats(0.05, 0.95),
)
def test_weights_are_a_fixed_list_in_the_order_of_the_deficits(deficits: list[float], ratio: float) -> None:
    goals = GoalSet({f"g{k}": Minimize(1.0) for k in range(len(deficits))}, spill=ratio)
    share = feed(goals, {f"g{k}": torch.tensor([d / 10]) for k, d in enumerate(deficits)}, 2).share
    assert float(share.sum()) == pytest.approx(1, abs=1e-5)
    order = sorted(range(len(deficits)), key=lambda k: -deficits[k])
    assert torch.allclose(share[order][1:] / share[order][:-1], torch.tensor(ratio), rtol=1e-4)


def test_a_goal_that_cannot_be_satisfied_does_not_change_what_the_others_get() -> None:
    """The other goals keep their weights relative to each other, however bad the stuck goal is."""
    calm = {"a": torch.tensor([0.4]), "b": torch.tensor([0.3]), "c": torch.tensor([0.1])}
    alone = feed(GoalSet({n: Minimize(1.0) for n in calm}, spill=0.5), calm, 2).share
    for floor in (0.8, 1e6):
        stuck = {"stuck": torch.tensor([floor]), **calm}
        share = feed(GoalSet({n: Minimize(1.0) for n in stuck}, spill=0.5), stuck, 2).share[1:]
        assert torch.allclose(share / share.sum(), alone)
        hard = feed(GoalSet({n: Minimize(1.0) for n in stuck}), stuck).share
        assert hard.tolist() == [1, 0, 0, 0]


def test_ranks_follow_a_moving_average() -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=Spill(0.5, halflife=1.0))
    feed(goals, {"a": torch.tensor([1.0]), "b": torch.tensor([0.0])}, 20)
    turned = {"a": torch.tensor([0.0]), "b": torch.tensor([0.9])}
    assert feed(goals, turned).share[0] > 0.5  # the weights are known before the step
    assert feed(goals, turned).share[0] > 0.5  # the averages are 0.5 and 0.45
    assert feed(goals, turned).share[0] < 0.5


def test_what_is_not_finite_is_left_out_of_the_average() -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=0.5)
    feed(goals, {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    before = goals.average.clone()
    out = feed(goals, {"a": torch.tensor([torch.nan]), "b": torch.tensor([2.0])})
    assert not out.finite
    assert goals.average[0] == pytest.approx(float(before[0])) and goals.multipliers.isfinite().all()


def test_state_is_taken_back_kept_in_evaluation_and_checkpointed() -> None:
    def make() -> GoalSet:
        return GoalSet(a=Anchored(0.0, 2.0), g=Group(b=Minimize(1.0), c=Minimize(1.0)), spill=0.5)

    def raw(seed: int) -> dict[str, Any]:
        x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        return {"a": x[0], "g": {"b": x[1], "c": x[2]}}

    goals = make()
    feed(goals, raw(0), 3)
    state = copy.deepcopy(goals.state_dict())
    goals(raw(1))
    goals.accept(torch.tensor(False))
    assert torch.equal(goals.average, state["average"]) and torch.equal(goals.multipliers, state["multipliers"])
    goals.eval()
    goals(raw(2))
    assert torch.equal(goals.average, state["average"])
    again = make()
    again.load_state_dict(state)
    assert torch.equal(again(raw(3)).loss, goals.train()(raw(3)).loss)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"spill": 1.0}, ValueError, "Spill: ratio must be below 1, got 1.0"),
        ({"spill": -0.5}, ValueError, "Spill: ratio must be finite and above 0, got -0.5"),
        ({"spill": "much"}, TypeError, "Spill: ratio must be a number, got str"),
        ({"spill": 0.5, "temperature": 0.1}, ValueError, "temperature must be 0 with spill"),
    ],
)
def test_bad_spills_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GoalSet(a=Minimize(1.0), **given)


def test_prints_its_rule() -> None:
    assert "spill=0.5" in repr(GoalSet(a=Minimize(1.0), spill=0.5))
