"""Test that a `GoalSet` in training mode learns nothing where gradient is disabled, and misses nothing elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bomkern import Anchored, Calibrated, GoalSet, Minimize, ShareGuard, Tracking, lazy

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "spill": {"spill": 0.5},
    "guard": {"guard": ShareGuard(0.1, 0.3)},
    "all ranks' way": {"impl": "reference", "spill": 0.5},
}
EACH = pytest.mark.parametrize("how", RULES.values(), ids=RULES)


@contextmanager
def gradient_in_inference_mode() -> Iterator[None]:
    with torch.inference_mode(), torch.enable_grad():
        yield


QUIET = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "enable_grad in inference_mode": gradient_in_inference_mode,
}
EACH_QUIET = pytest.mark.parametrize("quiet", QUIET.values(), ids=QUIET)


def goal_set(**how: Any) -> GoalSet:
    goals = {"a": Calibrated(6), "b": Tracking(3.0), "c": Anchored(0.0, 1.0, moving=True), "d": Minimize(0.5)}
    return GoalSet(goals, **how)


def raw_of(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)) * scale
    return dict(zip("abcd", values.requires_grad_().unbind(), strict=True))


def state(goals: GoalSet) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in (*goals.named_buffers(), *goals.state_dict().items())}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


@EACH
@EACH_QUIET
def test_nothing_is_learned_where_gradient_is_disabled(quiet: Callable[[], Any], how: dict[str, Any]) -> None:
    goals, judge = goal_set(**how), goal_set(**how)
    for seed in range(3):
        goals(raw_of(seed))
        judge.load_state_dict(goals.state_dict())
        before = state(goals)
        for scale in (100.0, math.nan):
            with quiet():
                out = goals(raw_of(seed + 10, scale))
            want = judge.eval()(raw_of(seed + 10, scale)).loss.detach()
            assert goals.training and torch.equal(out.loss.nan_to_num(-1), want.nan_to_num(-1))
        assert_same(state(goals), before)
    assert goals.steps == len(goals.history) == len(goals.monitor.take()) == 3
    assert goals.history["raw"].max() < 1


@EACH
@EACH_QUIET
def test_the_step_before_a_validation_can_still_be_taken_back(quiet: Callable[[], Any], how: dict[str, Any]) -> None:
    goals, want = goal_set(**how), goal_set(**how)
    for each in (goals, want):
        each(raw_of(0))
        each.accept(torch.tensor(True))
        each(raw_of(1))
    with quiet():
        goals(raw_of(2))
        with pytest.raises(ValueError, match="the raw value of b must have shape"):
            goals(raw_of(3) | {"b": torch.rand(4, 3)})
    for each in (goals, want):
        each.accept(torch.tensor(False))
        each(raw_of(4))
    assert_same(state(goals), state(want))
    assert goals.history["finite"].tolist() == [1, 0, 1]


@EACH
def test_a_compiled_step_learns_only_with_gradient(how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    goals, eager = goal_set(**how), goal_set(**how)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(lambda raw: goals(raw).loss, fullgraph=True, backend=backend)
    for seed in range(4):
        with torch.no_grad():
            step(raw_of(seed + 10, 100.0))
        assert torch.allclose(step(raw_of(seed)), eager(raw_of(seed)).loss)
        with torch.inference_mode():
            step(raw_of(seed + 20, 100.0))
    assert goals.steps == 4 and torch.equal(goals.history["raw"], eager.history["raw"])
    for name in ("params", "policy_state", "average", "multipliers", "guard_share"):
        torch.testing.assert_close(goals.get_buffer(name), eager.get_buffer(name))
    assert len(graphs) <= 5


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_lazy_goals_are_evaluated_and_teach_nothing(quiet: Callable[[], Any]) -> None:
    net, goals = nn.Linear(3, 1), GoalSet(a=Calibrated(5), b=Minimize(1.0), route="always")

    def size(x: Tensor) -> Tensor:
        return net(x).square()[:, 0]

    x = torch.rand(6, 3)
    with quiet():
        out = goals({"a": lazy(size, x), "b": torch.zeros(6)})
    assert goals.steps == 0 and goals.anchors()["a"] == (0.0, 1.0)
    assert float(out["raw"][0]) == pytest.approx(size(x).mean().item())


def test_anchors_are_measured_where_gradient_is_disabled() -> None:
    goals = goal_set()
    with torch.no_grad():
        goals.remeasure({"c": (torch.tensor([0.5]), torch.tensor([2.0]))})
    assert goals.anchors()["c"][0] > 0 and goals.steps == 0


def test_a_checkpointed_forward_is_one_step() -> None:
    """A reentrant checkpoint runs its function under no_grad first, and again in backward."""
    goals, x = goal_set(), torch.rand(4, 5, requires_grad=True)
    loss = checkpoint(lambda x: goals(dict(zip("abcd", x.unbind(), strict=True))).loss, x, use_reentrant=True)
    assert goals.steps == 0
    loss.backward()
    assert goals.steps == 1 and x.grad is not None and x.grad.any()
