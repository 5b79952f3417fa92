"""Test goals that are only watched: `GoalSet(monitor=)`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Calibrated, GoalSet, Group, Payoff, StepGuard, lazy
from bomkern.integrations import log_goals

RULES = pytest.mark.parametrize("rule", [{}, {"spill": 0.5}, {"temperature": 0.1}, {"reduction": "min"}], ids=str)
WATCHED: dict[str, Any] = {
    "accuracy": Anchored(0.0, 2.0),
    "both": Group(x=Calibrated(2), y=Anchored("baseline", 2.0)),
}


def make(monitor: Any = WATCHED, **rule: Any) -> GoalSet:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), monitor=monitor, **rule)
    goals.anchor(baseline={"both.y": 0.0})
    return goals


def raw(w: Tensor) -> dict[str, Any]:
    return {"a": w * 1.0, "b": w.square()}


def watched(w: Tensor) -> dict[str, Any]:
    """Values with a graph, and without one; they are far worse than those of the goals that are trained."""
    return {"accuracy": torch.tensor([True, False, True, True]), "both": {"x": w * 90, "y": lazy(lambda w: w * 80, w)}}


def weights() -> Tensor:
    return torch.rand(4, generator=torch.Generator().manual_seed(0)).requires_grad_()


@RULES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_changes_for_the_others(rule: dict[str, Any], compiled: bool) -> None:
    torch._dynamo.reset()  # it compiles a function for eight objects at most
    ours, plain = make(**rule), make(None, **rule)
    for step in range(3):
        w, v = weights(), weights()
        other = watched(w)
        if compiled:
            other["both"]["y"] = other["both"]["y"].value
        call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
        out, expected = call({**other, **raw(w)}), plain(raw(v))
        out.loss.backward(), expected.loss.backward()
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.record, expected.record)
        assert torch.equal(out.bottleneck, expected.bottleneck)
        assert w.grad is not None and v.grad is not None and torch.equal(w.grad, v.grad)
        assert ours.steps == ours.watched.steps == step + 1  # type: ignore[union-attr]
    assert out["level"].shape == (2,) and torch.equal(ours.history["level"], plain.history["level"])


def test_levels_and_deficits_by_hand() -> None:
    goals, w = make(), weights()
    out = goals({**raw(w), **watched(w)})
    assert out.watched is not None and goals.watched is not None
    hits = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.allclose(out.watched["level"][0], torch.exp(-hits / 2).mean())
    assert torch.allclose(out.watched["deficit"][0], hits.mean() / 2)
    assert torch.allclose(out.watched["raw"], torch.stack([hits.mean(), 90 * w.mean(), 80 * w.mean()]).detach())
    assert out.watched["share"].tolist() == [0, 0] and not out.watched.loss.requires_grad
    assert goals.watched.history["share"].tolist() == [[0, 0]]
    assert goals.watched.names == ["accuracy", "both"] and goals.names == ["a", "b"]


def test_table_and_logs() -> None:
    goals, w = make(), weights()
    for _ in range(2):
        goals({**raw(w), **watched(w)})
    lines = repr(goals).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["a", "b", "accuracy", "both.x", "both.y"]
    assert ["watched" in line for line in lines[2:]] == [False, False, True, True, True]

    class Keep:
        def log(self, values: Mapping[str, float], step: int) -> None: ...

    values = log_goals(goals, Keep(), 1)
    names = {f"goals/{part}/{name}" for part in ("level", "deficit") for name in ("accuracy", "both")}
    assert names | {"goals/raw/both.x"} <= values.keys() and "goals/share/accuracy" not in values
    assert values["goals/raw/accuracy"] == 0.75
    assert set(log_goals(goals, Keep(), 2)) == set()


def test_a_rejected_step_is_taken_back() -> None:
    goals, w = make(), torch.nn.Parameter(weights().detach())
    guard = StepGuard(torch.optim.SGD([w], lr=0.1, fused=True), goals=goals)
    goals({**raw(w), **watched(w)}).loss.backward()
    scale = goals.watched.anchors()["both.x"]  # type: ignore[union-attr]
    goals({**raw(w * torch.nan), **watched(w * 1e9)}).loss.backward()
    guard.step()
    assert goals.watched.history["finite"].tolist() == [1, 0]  # type: ignore[union-attr]
    assert goals.watched.anchors()["both.x"] == scale  # type: ignore[union-attr]


def test_eval_and_only_watch_nothing() -> None:
    goals, w = make(), weights()
    with goals.only("a"):
        goals({**raw(w), **watched(w)})
    goals.eval()
    out = goals({**raw(w), **watched(w)})
    assert out.watched is not None and goals.watched.steps == 0  # type: ignore[union-attr]


def test_state() -> None:
    goals, w = make(), weights()
    for _ in range(2):
        goals({**raw(w), **watched(w)})
    again = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), monitor=WATCHED)
    again.load_state_dict(copy.deepcopy(goals.state_dict()))
    assert again.watched.steps == 2  # type: ignore[union-attr]
    assert again.watched.anchors() == goals.watched.anchors()  # type: ignore[union-attr]
    assert copy.deepcopy(goals).watched.steps == 2  # type: ignore[union-attr]


def test_states_with_and_without_watched_goals(caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint loads, whether or not it was saved with the same watched goals."""
    goals, plain, w = make(), make(None), weights()
    goals({**raw(w), **watched(w)})
    plain.load_state_dict(goals.state_dict())
    assert plain.steps == 1 and "has goals that were only watched" in caplog.text
    fresh = torch.nn.ModuleDict({"goals": make()})
    fresh.load_state_dict(torch.nn.ModuleDict({"goals": plain}).state_dict())
    assert fresh["goals"].steps == 1 and fresh["goals"].watched.steps == 0


def test_probe_anchors_reach_them() -> None:
    payoff = Payoff(["a", "both.y"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
    goals = GoalSet(a=Anchored(0.0, 1.0), monitor={"both": Group(y=Anchored("probe", 5.0))})
    goals.anchor(probe=payoff)
    assert goals.watched.anchors() == {"both.y": (4.0, 1.0)}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("monitor", "error", "message"),
    [
        (Anchored(0.0, 1.0), TypeError, r"a goal that is called monitor must be in a mapping"),
        ({"a": Anchored(0.0, 1.0)}, ValueError, "monitor: a is trained too"),
        ({}, ValueError, "monitor must have 1 to 64 goals, got 0"),
    ],
)
def test_bad_input_is_named(monitor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(monitor)


def test_a_watched_goal_need_not_be_there_in_every_step() -> None:
    goals, w = make(), weights()
    assert goals({**raw(w), "both": watched(w)["both"]}).watched["level"].isnan().tolist() == [
        name == "accuracy" for name in goals.watched.names
    ]
    masked = torch.tensor([True, False, True, False])
    values = {**raw(w), **watched(w), "accuracy": torch.tensor([0.5, torch.nan, 1.0, torch.nan])}
    assert goals(values, mask={"accuracy": masked}).watched["raw"][0] == 0.75
    assert goals.steps == goals.watched.steps == 2


def test_bad_values_are_named() -> None:
    goals, w = make(), weights()
    with pytest.raises(ValueError, match="accuracy"):
        goals({**raw(w), **watched(w), "accuracy": torch.rand(4, 2)})
    with pytest.raises(KeyError, match="no goal is called c"):
        goals({**raw(w), **watched(w), "c": w})
    with pytest.raises(TypeError, match="raw must be a mapping"):
        goals(3)  # type: ignore[arg-type]
    assert goals.steps == 0
