"""Test `Spill(budget=, look=)`: every few steps the record rests on all rows, and the loss never does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Calibrated, GoalSet, Group, Minimize, ShareGuard, Spill, lazy
from tests.support.row_budget import EACH, NAMES, WEIGHTS
from tests.support.syncs import CountSyncs


def make(look: int | None, budget: float | None = 0.5, **options: Any) -> GoalSet:
    spill = Spill(0.5, budget=budget, look=look)
    goals = GoalSet({name: Minimize(1.0 + k) for k, name in enumerate(NAMES)}, spill=spill, **options).double()
    goals.multipliers.copy_(WEIGHTS)
    return goals


class Net(nn.Module):
    """A decoder that several goals read, with noise, and the number of rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decode = nn.Linear(4, 5).double()
        self.rows: list[int] = []
        self.graphs: list[bool] = []

    def decoded(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        self.graphs.append(torch.is_grad_enabled())
        y = self.decode(x)
        return y * (1 + 0.1 * torch.rand_like(y))

    def values(self, x: Tensor, wrap: Any) -> dict[str, Any]:
        y = wrap(self.decoded, x)
        return {"a": wrap(_size, y), "b": wrap(_square, y), "c": wrap(_size, y), "d": x.square().mean(1)}


def _size(y: Tensor) -> Tensor:
    return y.abs().mean(1)


def _square(y: Tensor) -> Tensor:
    return y.square().mean(1)


def plain(fn: Any, *args: Any) -> Any:
    return fn(*args)


def batch_of(step: int, size: int = 40) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


MASKS: list[Any] = [None, {"a": torch.arange(40) % 3 > 0, "d": torch.arange(40) < 3, "c": False}]


@EACH
@pytest.mark.parametrize("mask", MASKS, ids=["all", "some"])
@pytest.mark.parametrize("wrap", [lazy, plain], ids=["lazy", "plain"])
def test_the_loss_and_the_generator_are_as_without_looks(impl: str, mask: Any, wrap: Any) -> None:
    net = Net()

    def run(look: int | None) -> list[Tensor]:
        goals, found = make(look, impl=impl), []
        torch.manual_seed(5)
        for step in range(5):
            goals.multipliers.copy_(WEIGHTS)  # the order alone learns from a look
            out = goals(net.values(batch_of(step), wrap), mask=mask)
            found += [out.loss.detach(), out["share"], out["loss"], out.bottleneck, torch.rand(1)]
            found += torch.autograd.grad(out.loss, list(net.parameters()))
        return found

    run(None)  # the check on first use
    for one, other in zip(run(None), run(2), strict=True):
        assert torch.equal(one, other)


@EACH
@pytest.mark.parametrize("wrap", [lazy, plain], ids=["lazy", "plain"])
def test_every_few_steps_the_record_is_that_of_all_rows(impl: str, wrap: Any) -> None:
    ours, exact = make(3, impl=impl), make(None, None, impl=impl)
    for step in range(8):
        x = batch_of(step).abs()
        raw = {name: wrap(_scaled, x, torch.full((40,), 1.0 + k)) for k, name in enumerate(NAMES)}
        mask = {"b": torch.arange(40) < 30} if step > 4 else None
        for goals in (ours, exact):
            goals.multipliers.copy_(WEIGHTS)
        one, other = ours(raw, mask=mask), exact(raw, mask=mask)
        for part in ("level", "deficit", "raw"):
            assert torch.allclose(one[part], other[part]) == (step % 3 == 0), part
        assert step % 3 or torch.equal(one["highest"], other["highest"])
        assert torch.equal(one.rows, other.rows) == (step % 3 == 0)
        if step == 0:
            torch.testing.assert_close(ours.average, exact.average)
    assert torch.equal(ours.history["rows"][::3], exact.history["rows"][::3])


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    return x.mean(1) * by


def test_a_look_evaluates_once_more_without_a_graph() -> None:
    net, goals = Net(), make(3)
    goals(net.values(batch_of(0), lazy))  # with the check on first use
    for step in range(1, 7):
        goals.multipliers.copy_(WEIGHTS)
        net.rows.clear(), net.graphs.clear()
        goals(net.values(batch_of(step), lazy)).loss.backward()
        want = ([40, 11], [False, True]) if step % 3 == 0 else ([11], [True])
        assert (net.rows, net.graphs) == want


def test_policies_and_guard_learn_from_a_look() -> None:
    goals = GoalSet(
        a=Calibrated(9), g=Group(x=Calibrated(9), y=Minimize(1.0)), guard=ShareGuard(), spill=Spill(budget=0.2, look=1)
    )
    a, x = torch.rand(50, requires_grad=True), torch.rand(50, requires_grad=True)
    out = goals({"a": lazy(torch.exp, a), "g": {"x": x, "y": 2 * x}})
    values = a.detach().exp(), x.detach(), 2 * x.detach()
    assert out["scale"].tolist() == pytest.approx([float(values[0].max()), float(values[1].max()), 1.0], rel=1e-5)
    assert out["raw"].tolist() == pytest.approx([float(value.mean()) for value in values])
    out.loss.backward()
    assert 0 < int((a.grad != 0).sum()) < 10


def test_goals_of_different_lengths_and_of_the_whole_batch() -> None:
    goals = make(1)
    x, y = batch_of(0, 50).abs(), batch_of(1, 7).abs()
    raw = {"a": lazy(_size, x), "b": lazy(_size, y), "c": y.mean(1), "d": x.mean()}
    out = goals(raw)
    want = [x.mean(), y.mean(), y.mean(), x.mean()]
    assert out["raw"].tolist() == pytest.approx([float(value) for value in want])
    assert out.rows.tolist() == [50, 7, 7, 50]


def test_a_value_that_only_a_look_reads_spoils_nothing() -> None:
    goals = make(1, budget=0.1)
    raw = {name: torch.ones(64, dtype=torch.float64, requires_grad=True) for name in NAMES}
    goals(raw).loss.backward()
    goals = make(1, budget=0.1)
    bad = {name: x.detach().masked_fill(x.grad == 0, math.inf) for name, x in raw.items() if x.grad is not None}
    out = goals(bad)
    assert bool(out.finite) and out["raw"].tolist() == [1, 1, 1, 1]
    assert out.rows.tolist() == [int((x.grad != 0).sum()) for x in raw.values() if x.grad is not None]
    assert bool(goals.average.isfinite().all())


def test_micro_batches_look_together_and_repeated_evaluations_do_not() -> None:
    net, goals = Net(), make(2)
    goals(net.values(batch_of(0), lazy))
    for step in range(1, 4):
        total = []
        for last in (False, True):
            x = batch_of(10 * step + last)
            total.append(x.square().mean())
            with goals.accumulate(last=last):
                out = goals(net.values(x, lazy))
        assert (out.rows.tolist() == [80] * 4) == (step % 2 == 0)
        assert (float(out["raw"][3]) == pytest.approx(float(sum(total)) / 2)) == (step % 2 == 0)
    with goals.one_step():
        net.graphs.clear()
        for _ in range(3):
            goals(net.values(batch_of(9), lazy))
    assert net.graphs == [False, True, True, True] and goals.steps == 5


def test_a_resumed_run_looks_at_the_same_steps() -> None:
    net, goals = Net(), make(3)

    def looks(goals: GoalSet, first: int) -> list[int]:
        return [step for step in range(first, first + 5) if int(goals(net.values(batch_of(step), lazy)).rows[3]) == 40]

    assert looks(goals, 0) == [0, 3]
    other = make(3)
    other.load_state_dict(copy.deepcopy(goals.state_dict()))
    assert looks(goals, 5) == looks(other, 5) == [6, 9]
    other.accept(False)
    assert looks(other, 10) == [12]


def test_no_host_sync_in_a_look() -> None:
    goals = make(1)
    raw = {name: torch.rand(32, dtype=torch.float64, requires_grad=True) for name in NAMES}
    with CountSyncs() as counter:
        for mask in (None, {"b": torch.rand(32) < 0.5}):
            goals(raw, mask=mask).loss.backward()
    assert not counter.seen.keys() - {"_to_copy"}


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_steps_look_at_the_same_steps(masked: bool) -> None:
    """A graph holds both records and chooses on the device, so it is compiled once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, ours = make(3), make(3)

    def loss(goals: GoalSet, x: Tensor, mask: Tensor) -> Tensor:
        raw = {"a": x[:, 0], "b": lazy(_size, x), "c": x[:, 1:2].mean(1), "d": x[:, 2].square()}
        return goals(raw, mask={"b": mask} if masked else None).loss

    fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in range(7):
        x = batch_of(step, 24).requires_grad_()
        mask = torch.arange(24) % 5 > step % 3
        one, other = loss(eager, x, mask), fast(ours, x, mask)
        torch.testing.assert_close(other, one)
        grads = [torch.autograd.grad(y, x)[0] for y in (one, other)]
        torch.testing.assert_close(grads[1], grads[0])
        if step == 1:  # the first step has nothing to take back, the second has
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made <= 2
    for part in ("rows", "raw", "level", "deficit", "highest", "share"):
        torch.testing.assert_close(ours.history[part], eager.history[part])
    assert (ours.history["rows"][:, 0] == 24).tolist() == [step % 3 == 0 for step in range(7)]
    torch._dynamo.reset()


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"look": 0}, ValueError, "Spill: look must be at least 1, got 0"),
        ({"look": 2.5}, TypeError, "Spill: look must be a whole number"),
        ({"look": 5, "budget": None}, ValueError, "Spill: look needs a budget, got look=5 without one"),
    ],
)
def test_invalid_looks_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spill(0.5, **{"budget": 2.0, **options})


def test_a_wrong_raw_value_is_named() -> None:
    goals = make(1)
    good = {name: torch.rand(8, dtype=torch.float64) for name in NAMES}
    for bad in (torch.rand(8, 2), torch.ones(8, dtype=torch.int64), "x"):
        with pytest.raises((TypeError, ValueError), match="the raw value of b"):
            goals({**good, "b": bad})
    assert repr(goals.spill) == "Spill(0.5, budget=0.5, look=1)"
