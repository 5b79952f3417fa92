"""Test the warning of goals that can own samples but have no graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, GoalSet, Group, Minimize, lazy, min_goal_loss
from bomkern.goals import monitor
from bomkern.ops import without_graph
from tests.support.syncs import CountSyncs

IMPLS = pytest.mark.parametrize("impl", ["reference", None])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`min_goal_loss` warns once per process; torch compiles a function for eight objects at most."""
    torch._dynamo.reset()
    monkeypatch.setattr(without_graph, "_looks", {})
    monkeypatch.setattr(without_graph, "_waiting", [])
    monkeypatch.setattr(without_graph, "_told", [False])


def goal_set(**options: Any) -> GoalSet:
    return GoalSet(recon=Anchored(0.0, 1.0), accuracy=Anchored(0.0, 1.0), kl=Anchored(0.0, 1.0), **options)


def raw(accuracy: float | Tensor = 0.9) -> dict[str, Any]:
    w = torch.full((4,), 0.5, requires_grad=True)
    value = accuracy if isinstance(accuracy, Tensor) else torch.full((4,), accuracy)
    return {"recon": w * 1.0, "accuracy": value, "kl": w * torch.tensor([2.0, 0.1, 0.1, 0.1])}


def train(goals: GoalSet, steps: int, call: Any = None, **values: Any) -> None:
    for _ in range(steps):
        (goals if call is None else call)({**raw(), **values}).loss.sum().backward()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "bomkern"]


@IMPLS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_warning_names_the_goal_and_its_share(
    impl: str | None, compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    goals = goal_set(impl=impl)
    train(goals, 6, torch.compile(goals, backend="aot_eager", fullgraph=True) if compiled else None)
    (message,) = messages(caplog)
    assert message.startswith("no gradient flows back from accuracy (share 0.75 so far): samples that it owns move no")
    assert "GoalSet(..., monitor={...})" in message


def test_two_goals(caplog: pytest.LogCaptureFixture) -> None:
    train(goal_set(), 3, kl=torch.zeros(4))
    (message,) = messages(caplog)
    assert "from accuracy (share 1.00 so far) and kl (share 0.00 so far): samples that they own move" in message


def test_a_history_that_is_read_after_one_step_tells(caplog: pytest.LogCaptureFixture) -> None:
    goals = goal_set()
    train(goals, 1)
    assert not messages(caplog)
    _ = goals.history
    assert len(messages(caplog)) == 1


def test_a_goal_that_loses_its_graph_later(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(monitor, "ROWS", 8)
    goals = goal_set()
    train(goals, 6, accuracy=torch.full((4,), 0.4, requires_grad=True))
    train(goals, 20)
    assert len(messages(caplog)) == 1


def frozen() -> dict[str, Any]:
    return {name: value.detach() for name, value in raw().items()}


def test_what_is_meant_so_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    goals = goal_set()
    for _ in range(2):
        goals(frozen())  # everything is frozen
        with torch.no_grad():
            goals(raw())
        with goals.only("recon"):
            goals(raw()).loss.backward()
    goals.eval()
    train(goals, 3)
    train(goal_set(), 5, accuracy=torch.rand(4, requires_grad=True))
    x = torch.rand(4, 2, requires_grad=True)
    for route in ("always", "never"):
        train(goal_set(route=route), 5, accuracy=lazy(lambda x: x.sum(1), x))
    group = GoalSet(a=Anchored(0.0, 1.0), both=Group(x=Anchored(0.0, 1.0), y=Anchored(0.0, 1.0)))
    for _ in range(5):
        group({"a": x[:, 0] * 1, "both": {"x": x[:, 1] * 1, "y": torch.rand(4)}}).loss.backward()
    assert not messages(caplog)


def test_no_host_sync(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The warning comes when the copy of the share has arrived, and no step waits for it."""
    arrived = [False]
    monkeypatch.setattr("bomkern.common.host_copy.HostCopy.ready", lambda self: arrived[0])
    goals = goal_set()
    with CountSyncs() as counter:
        train(goals, 5)
    assert not messages(caplog) and not counter.seen
    arrived[0] = True
    train(goals, 1)
    assert len(messages(caplog)) == 1


def test_only_the_first_steps_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    real = without_graph.columns_without
    monkeypatch.setattr(
        "bomkern.goals.without_graph.columns_without", lambda goals: checked.append(len(goals)) or real(goals)
    )
    train(goal_set(), 10, accuracy=torch.rand(4, requires_grad=True))
    assert checked == [3] * without_graph.LOOKS


@IMPLS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_min_goal_loss_warns_once(impl: str | None, compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    constraints = (Minimize(1.0),) * 3

    def loss(values: list[Tensor]) -> Tensor:
        return min_goal_loss(values, constraints, impl=impl)

    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    for _ in range(5):
        call(list(raw().values())).backward()
    (message,) = messages(caplog)
    share = "" if compiled else " (share 0.75 so far)"
    assert message.startswith(f"no gradient flows back from goals[1]{share}: samples that it owns move no parameter")


def test_min_goal_loss_says_nothing_where_nothing_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.rand(4, requires_grad=True)
    for goals in (list(frozen().values()), [x, x * 2], [x, lazy(lambda x: x, x)], torch.rand(4, 2, requires_grad=True)):
        min_goal_loss(goals, Minimize(1.0))
    with torch.no_grad():
        min_goal_loss([x, torch.rand(4)], Minimize(1.0))
    torch.func.grad(lambda x: min_goal_loss([x, torch.rand(4)], Minimize(1.0), impl="reference"))(torch.rand(4))
    assert not messages(caplog)


def test_min_goal_loss_checks_each_place_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, requires_grad=True)
    for k in range(2 * without_graph.SITES):
        constraint = Minimize(1.0 + k)
        for _ in range(5):
            min_goal_loss([x, x * 2], constraint)
    assert len(without_graph._looks) <= without_graph.SITES
    assert max(without_graph._looks.values()) == without_graph.LOOKS
