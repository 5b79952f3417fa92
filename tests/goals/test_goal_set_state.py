"""Test the state of a `GoalSet` after errors, rejected steps, bad numbers, copies and checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, MinimizeHard, ShareGuard, Tracking, Upper
from bomkern.goals.history import CAPACITY, History
from bomkern.goals.monitor import ROWS
from bomkern.goals.record import Layout

NAN, INF = math.nan, math.inf


def everything(**how: Any) -> GoalSet:
    goals = {
        "max": Calibrated(40),
        "quantile": Calibrated(40, 0.9),
        "tracking": Tracking(3.0),
        "moving": Anchored(0.0, 1.0, moving=True),
    }
    return GoalSet(goals, both=Group(a=Minimize(1.0), b=Upper(1.0, 0.5)), **how)


def raw_of(goals: GoalSet, seed: int = 0, batch: int = 4) -> dict[str, Any]:
    """Return raw values that differ for every goal, sample and seed."""
    columns = torch.rand(6, batch, generator=torch.Generator().manual_seed(seed))
    named = dict(zip(["max", "quantile", "tracking", "moving"], columns, strict=False))
    return {**named, "both": {"a": columns[4], "b": columns[5]}}


def state(goals: GoalSet) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in goals.named_buffers(recurse=False) if not name.startswith("_")}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


RULES: dict[str, dict[str, Any]] = {"plain": {}, "spill": {"spill": 0.5}, "guard": {"guard": ShareGuard(0.1, 0.3)}}
EACH = pytest.mark.parametrize("how", RULES.values(), ids=RULES)


# Errors.


@EACH
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.rand(0), ValueError, "the raw value of b has 0 samples|B = 0|at least one sample"),
        (torch.rand(3), ValueError, r"the raw value of both\.b has 3 samples, others have 4"),
        (torch.rand(4, 2), ValueError, r"the raw value of both\.b must have shape"),
        ([0.5], TypeError, r"the raw value of both\.b must be a tensor, got list"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"the raw value of both\.b must be float16"),
    ],
)
def test_a_step_that_raises_teaches_nothing(how: dict[str, Any], bad: Any, error: type, message: str) -> None:
    goals = everything(**how)
    goals(raw_of(goals))
    before = state(goals)
    raw = raw_of(goals, 1)
    raw["both"]["b"] = bad
    if isinstance(bad, Tensor) and bad.numel() == 0:
        raw = {name: bad for name in raw} | {"both": {"a": bad, "b": bad}}
    with pytest.raises(error, match=message):
        goals(raw)
    assert same(state(goals), before) and goals.steps == 1
    goals(raw_of(goals, 2))
    assert goals.steps == len(goals.history) == 2


@EACH
@pytest.mark.parametrize("batch", [1, 2])
def test_small_batches(how: dict[str, Any], batch: int) -> None:
    goals = everything(**how)
    for seed in range(5):
        assert goals(raw_of(goals, seed, batch)).finite
    zero_dim = {name: torch.tensor(0.5) for name in raw_of(goals)} | {"both": {k: torch.tensor(0.5) for k in "ab"}}
    assert goals(zero_dim).finite and all(x.isfinite().all() for x in state(goals).values())


@EACH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_numbers_that_are_not_finite_are_not_remembered(how: dict[str, Any], bad: float) -> None:
    goals = everything(**how)
    worst = {name: torch.full((4,), bad) for name in raw_of(goals)} | {"both": {k: torch.full((4,), bad) for k in "ab"}}
    for _ in range(3):
        assert not goals(worst).finite
    assert all(x.isfinite().all() for x in state(goals).values())
    assert goals(raw_of(goals)).finite and goals.history["finite"].tolist() == [0, 0, 0, 1]


# Rejected steps.


@EACH
@pytest.mark.parametrize("look", [lambda goals: goals.history, str, lambda goals: goals.state_dict(), lambda _: None])
def test_a_step_is_rejected_also_after_a_look_at_the_history(how: dict[str, Any], look: Callable[..., Any]) -> None:
    goals = everything(**how)
    goals(raw_of(goals))
    goals.accept(torch.tensor(True))
    before = state(goals)
    goals(raw_of(goals, 1))
    look(goals)
    goals.accept(torch.tensor(False))
    assert same(state(goals), before)
    taken = goals.layout.parts(goals.monitor.take())
    assert goals.history["finite"].tolist() == taken["finite"].tolist() == [1, 0]
    goals(raw_of(goals, 2))
    look(goals)
    goals.accept(torch.tensor(True))
    assert goals.history["finite"].tolist() == [1, 0, 1]


def test_a_rejection_leaves_what_was_saved_or_taken_before_it_alone() -> None:
    goals = everything()
    goals(raw_of(goals))
    saved, rows = goals.state_dict(), goals.monitor.take()
    goals.accept(torch.tensor(False))
    kept = saved["monitor._extra_state"]
    assert kept["rows"][-1, -1] == kept["fresh"][-1, -1] == rows[-1, -1] == 1 and goals.history["finite"][-1] == 0


@pytest.mark.parametrize("rest", [0, 1])
def test_the_last_step_of_a_joined_row_can_be_rejected(rest: int) -> None:
    layout = Layout(["x"], ["x"], [0], ["Minimize(1)"])
    history = History(layout)
    history.append(torch.ones(CAPACITY + rest, layout.size))
    assert history.stride == 2
    history.reject_last()
    if rest:
        history.append(torch.ones(1, layout.size))
    assert history["finite"][-1] == 0.5 and (history["finite"][:-1] == 1).all()


# Anchors.


def test_anchors_do_not_move_to_what_is_not_finite() -> None:
    goals = GoalSet(x=Anchored(0.5, 1.0, moving=True, halflife=1.0))
    goals.remeasure({"x": (torch.tensor([1.0, NAN]), 3.0)})
    assert goals.anchors()["x"] == pytest.approx((0.5, 1.5))  # the nadir went halfway to 3
    goals.remeasure({"x": (INF, NAN)})
    assert goals.anchors()["x"] == pytest.approx((0.5, 1.5))


def test_anchors_that_cannot_be_are_named(caplog: pytest.LogCaptureFixture) -> None:
    goals = GoalSet(x=Anchored("floor", 1.0), y=Anchored(0.0, "baseline"))
    with pytest.raises(ValueError, match="the ideal of x must be finite, got nan"):
        goals.anchor(floor={"x": torch.tensor([NAN, 1.0])})
    goals.anchor(floor={"x": 1.5}, baseline={"y": 2.0})
    assert "the nadir of x, 1, is not above its ideal, 1.5" in caplog.text and len(caplog.records) == 1


def test_a_checkpoint_from_before_the_anchors_waits_for_them_again() -> None:
    early, goals = (GoalSet(x=Anchored("floor", "baseline")) for _ in range(2))
    early.anchor(baseline={"x": 1.0})
    stored = copy.deepcopy(early.state_dict())
    goals.anchor(floor={"x": 0.5}, baseline={"x": 2.0})
    goals.load_state_dict(stored)
    with pytest.raises(RuntimeError, match="the ideal of x is not known yet"):
        goals({"x": torch.rand(3)})
    goals.anchor(floor={"x": 0.25})
    assert goals.anchors()["x"] == pytest.approx((0.25, 0.75))


def test_a_goal_that_is_given_another_constraint_has_its_scale() -> None:
    goals = GoalSet(x=Anchored(0.0, 1.0, moving=True, halflife=1.0), y=Minimize(1.0), guard=ShareGuard(0.1, 0.3))
    for _ in range(30):
        goals({"x": torch.full((2,), 5.0), "y": torch.zeros(2)})
    assert goals.anchors()["x"][1] != 1
    goals["x"] = Minimize(2.0, 0.5)
    assert goals.anchors()["x"] == (0.5, 2.0)
    goals.remeasure({"x": (0.5, 2.5)})  # the current anchors
    assert goals.anchors()["x"] == pytest.approx((0.5, 2.0))
    with pytest.raises(KeyError, match=r"no goal is called z \(there are x, y\)"):
        goals["z"] = Minimize(1.0)
    with pytest.raises(TypeError, match="y must be a constraint, got Tracking"):
        goals["y"] = Tracking()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="its curve is fixed"):
        goals["y"] = MinimizeHard(1.0)


def test_a_goal_that_never_gets_a_share_is_not_nudged_to_infinity() -> None:
    goals = GoalSet(calm=Upper(1.0, 0.5), x=Minimize(1.0), guard=ShareGuard(0.1, 0.9, rate=1.0))
    for _ in range(100):
        goals({"calm": torch.zeros(2), "x": torch.ones(2)})
    assert -7 <= float(goals.log_nudge[0]) < -6 and float(goals.log_nudge[1]) == 7
    out = goals({"calm": torch.full((2,), 1.5), "x": torch.zeros(2)})
    assert out.loss.item() == pytest.approx(math.exp(7), rel=1e-3)


# Copies and precision.


@EACH
@pytest.mark.parametrize("steps", [3, ROWS + 5, 2 * ROWS])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda goals: pickle.loads(pickle.dumps(goals))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_by_itself(duplicate: Callable[[GoalSet], GoalSet], steps: int, how: dict[str, Any]) -> None:
    goals = everything(**how)
    for seed in range(steps):
        goals(raw_of(goals, seed))
    if goals.monitor._copy is not None:
        goals.monitor._copy[0]._event = Event()  # type: ignore[assignment]
    again = duplicate(goals)
    for one in (goals, again):
        for seed in range(steps, steps + 5):
            one(raw_of(one, seed))
            one.accept(torch.tensor(seed % 2 == 0))
    assert same(state(goals), state(again)) and again.steps == goals.steps == steps + 5
    for part in ("raw", "share", "scale", "finite"):
        assert torch.equal(goals.history[part], again.history[part])
    goals(raw_of(goals))
    assert again.steps == len(again.history) == steps + 5 and not same(state(goals), state(again))


@EACH
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda goals: pickle.loads(pickle.dumps(goals))], ids=["deepcopy", "pickle"]
)
def test_a_copy_takes_back_its_own_step(duplicate: Callable[[GoalSet], GoalSet], how: dict[str, Any]) -> None:
    goals = everything(**how)
    goals(raw_of(goals, 0))
    goals.accept(torch.tensor(True))
    before = state(goals)
    goals(raw_of(goals, 1))
    after, again = state(goals), duplicate(goals)
    again.accept(torch.tensor(False))
    assert same(state(again), before) and same(state(goals), after) and not same(before, after)
    goals.accept(torch.tensor(False))
    assert same(state(goals), before)


class Event:
    """An event that, as a CUDA event, can be waited for but not copied."""

    def synchronize(self) -> None: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle an event")


@EACH
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_any_precision_of_values_and_of_the_set(dtype: torch.dtype, wide: bool, how: dict[str, Any]) -> None:
    goals = everything(**how)
    goals = goals.double() if wide else goals
    for seed in range(3):
        raw = raw_of(goals, seed)
        raw = {name: x.to(dtype) for name, x in raw.items() if name != "both"} | {"both": raw["both"]}
        out = goals(raw)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.loss.dtype == out.record.dtype == expected and out.finite
    assert all(
        x.dtype == (torch.float64 if wide else torch.float32) for x in state(goals).values() if x.is_floating_point()
    )
    assert goals.history["raw"].dtype == torch.float32 and len(goals.history) == 3
    with goals.only("max"):
        assert goals(raw).loss.dtype == expected
