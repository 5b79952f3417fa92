"""Test a training step under torch.compile: model, `GoalSet` with its policies and history, loss; and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    Calibrated,
    GoalSet,
    Group,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
    covariance_penalty,
    gaussian_kl,
    total_correlation,
)
from bomkern.dispatch import select
from bomkern.goals.monitor import ROWS

RULES: dict[str, dict[str, Any]] = {
    "hard": {},
    "global": {"reduction": "min"},
    "smooth": {"temperature": 0.1},
    "spill": {"spill": 0.5},
    "budget": {"spill": Spill(0.5, budget=0.8)},
    "guard": {"guard": ShareGuard(0.1, 0.6)},
}
EACH = pytest.mark.parametrize("rule", RULES)
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
PARTS = ("share", "level", "deficit", "raw", "ideal", "scale", "loss", "finite")


class Model(nn.Module):
    """A model that computes five raw values of a batch and their loss."""

    def __init__(self, policies: bool, **rule: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        first = Calibrated(5) if policies else Anchored(0.0, 1.0)
        second = Tracking() if policies else Anchored(0.0, 2.0)
        self.goals = GoalSet(
            a=first, b=second, c=Upper(0.3, 0.2), d=Group(x=Upper(0.1, 1.0), y=Upper(0.0, 1.0)), **rule
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        raw = {"a": y[:, 0] ** 2, "b": y[:, 1].abs(), "c": y[:, 2], "d": {"x": y[:, 3], "y": y[:, 4].mean()}}
        return self.goals(raw).loss


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def batches(count: int) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(1)
    for k in range(count):
        yield torch.randn([16, 24, 40][k % 3], 4, generator=source)


def step(model: Any, owner: Model, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = model(x)
    return loss, torch.autograd.grad(loss, list(owner.net.parameters()))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@EACH
@BACKENDS
@pytest.mark.parametrize("policies", [False, True], ids=["anchored", "policies"])
def test_a_compiled_step_is_the_eager_one(policies: bool, backend: str, rule: str) -> None:
    """Losses, gradients, buffers and history match eager steps.

    The run has more steps than the ring holds, and batches of three sizes.
    """
    ours, theirs = Model(policies, **RULES[rule]), Model(policies, **RULES[rule])
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for x in batches(ROWS + 12):
        got, want = step(compiled, ours, x), step(theirs, theirs, x)
        torch.testing.assert_close(got[0], want[0])
        for a, b in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(ours.goals.named_buffers(), theirs.goals.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    mine, other = ours.goals.history, theirs.goals.history
    assert len(mine) == len(other) == ours.goals.steps == ROWS + 12
    for part in PARTS:
        torch.testing.assert_close(mine[part], other[part], rtol=1e-4, atol=1e-6)
    # One graph, and one more if the previous step left something to take back.
    assert graphs() <= 2 and not torch._dynamo.utils.counters["graph_break"]


@BACKENDS
def test_static_sizes_become_dynamic_by_themselves(backend: str) -> None:
    model = Model(False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for x in batches(12):
        step(compiled, model, x)
    assert graphs() == 2  # one graph for the first size, one for all others


@EACH
@pytest.mark.parametrize("policies", [False, True], ids=["anchored", "policies"])
def test_a_compiled_step_is_taken_back(policies: bool, rule: str) -> None:
    ours, theirs = Model(policies, **RULES[rule]), Model(policies, **RULES[rule])
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for k, x in enumerate(batches(9)):
        for model, owner in ((compiled, ours), (theirs, theirs)):
            step(model, owner, x)
            owner.goals.accept(torch.tensor(k % 3 != 1))
    for name, a in ours.goals.named_buffers(recurse=False):
        torch.testing.assert_close(a, getattr(theirs.goals, name), rtol=1e-4, atol=1e-6, msg=name)
    assert ours.goals.history["finite"].tolist() == theirs.goals.history["finite"].tolist() == [1, 0, 1] * 3


def test_a_copy_of_a_compiled_set_has_its_own_history() -> None:
    model = Model(True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in batches(3):
        step(compiled, model, x)
    again = copy.deepcopy(model)
    other = torch.compile(again, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in batches(4):
        step(other, again, x)
    assert model.goals.steps == len(model.goals.history) == 3 and again.goals.steps == len(again.goals.history) == 7


def test_the_first_use_of_ops_may_be_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "_servers", {})
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def both(z: Tensor, impl: str | None = None) -> Tensor:
        return gaussian_kl(z, z).sum() + covariance_penalty(z, impl=impl).sum() + total_correlation(z, z, z).sum()

    found = torch.compile(both, fullgraph=True, backend="eager")(z, "reference")
    torch.testing.assert_close(found, both(z, "reference"))


def test_evaluation_compiles_and_keeps_nothing() -> None:
    model = Model(False, spill=0.5).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in batches(3):
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs() == 1 and model.goals.steps == 0


@EACH
@pytest.mark.parametrize("strict", [False, True])
def test_export(rule: str, strict: bool) -> None:
    """Export a module in evaluation mode, with a dynamic batch size."""
    model = Model(False, **RULES[rule]).eval()
    batch = torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(model, (torch.randn(16, 4),), dynamic_shapes=({0: batch},), strict=strict)
    for x in batches(3):
        torch.testing.assert_close(exported.module()(x), model(x))
