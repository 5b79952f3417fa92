"""Test `Spill(budget=)` with lazy goals, a resumed run, and compiled steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import GoalSet, Group, Minimize, Spill, lazy
from bomkern.goals.row_budget import RowBudget, draw
from tests.support.row_budget import EACH, WEIGHTS, four, rows_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode, self.judge = nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 1)
        self.double()
        self.rows: list[tuple[str, int]] = []

    def decoded(self, z: Tensor) -> Tensor:
        self.rows.append(("decode", len(z)))
        return torch.tanh(self.decode(z))

    def judged(self, y: Tensor) -> Tensor:
        self.rows.append(("judge", len(y)))
        return self.judge(y)[:, 0].square()

    def values(self, x: Tensor, wrap: Any) -> dict[str, Any]:
        z = self.encode(x)
        y = wrap(self.decoded, z)
        return {"a": wrap(_error, y, x), "b": wrap(self.judged, y), "c": wrap(_size, y), "d": z.square().mean(1)}

    def grads(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.parameters()), materialize_grads=True))


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def _size(a: Tensor) -> Tensor:
    return a.abs().mean(1)


def plain(fn: Any, *args: Any) -> Any:
    return fn(*args)


MASKS: list[dict[str, Tensor] | None] = [
    None,
    {"a": torch.arange(40) % 3 > 0, "c": torch.arange(40) > 25},
    {"b": torch.zeros(40, dtype=torch.bool), "d": torch.arange(40) < 3},
]


@EACH
@pytest.mark.parametrize("mask", MASKS, ids=["all", "some", "none"])
@pytest.mark.parametrize("route", ["auto", "always", "never"])
def test_lazy_goals_are_as_plain_ones(impl: str, mask: dict[str, Tensor] | None, route: str) -> None:
    lazily, plainly = four(0.8, impl=impl, route=route), four(0.8, impl=impl, route=route)
    net = Net()
    for step in range(4):
        x = torch.randn(40, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        one = lazily(net.values(x, lazy), mask=mask)
        other = plainly(net.values(x, plain), mask=mask)
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(net.grads(one.loss), net.grads(other.loss))
        torch.testing.assert_close(one.record, other.record, equal_nan=True)
    for (name, x), y in zip(lazily.named_buffers(), plainly.buffers(), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_lazy_goals_are_evaluated_once_for_their_rows() -> None:
    net, goals = Net(), four(0.5)
    x = torch.randn(60, 5, dtype=torch.float64)
    goals(net.values(x, lazy))  # the first use checks the functions
    for order, decoded, judged in (((0, 1, 2, 3), 16, 8), ((3, 0, 1, 2), 8, 4), ((2, 3, 1, 0), 16, 4)):
        weights = WEIGHTS[torch.tensor(order).argsort()]  # of a goal's position in the order
        goals.multipliers.copy_(weights)
        net.rows.clear()
        out = goals(net.values(x, lazy))
        counts = [max(1, math.ceil(float(30 * w) - 1e-5)) for w in weights]
        assert net.rows == [("decode", max(counts[:3])), ("judge", counts[1])]
        assert (decoded, judged) == (max(counts[:3]), counts[1])
        assert out.walked is not None and 0 < out.walked < 0.5
        torch.autograd.grad(out.loss, list(net.parameters()))  # every parameter has a graph
    with goals.only("a"):
        net.rows.clear()
        goals(net.values(x, lazy)).loss.backward()
        assert ("decode", 60) in net.rows


def test_rows_by_weights_that_the_host_knew_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host has a copy of the weights. Whatever it holds, it evaluates the rows that count."""
    net, goals = Net(), four(0.5)
    x = torch.randn(60, 5, dtype=torch.float64)
    goals(net.values(x, lazy))
    goals.multipliers.copy_(WEIGHTS)
    monkeypatch.setattr(RowBudget, "_on_host", lambda self, multipliers: multipliers.flip(0))
    net.rows.clear()
    out = goals(net.values(x, lazy))
    assert net.rows == [("decode", 8), ("judge", 4)]  # of WEIGHTS 16 and 8
    values = net.values(x, plain)
    keys = draw(goals.row_budget._key, torch.tensor([1]), 60).argsort()
    parts = zip(values.values(), (2, 4, 8, 16), (1.0, 2.0, 3.0, 4.0), WEIGHTS, strict=True)
    expected = sum(w * v[keys[:n]].mean() / scale for v, n, scale, w in parts)
    torch.testing.assert_close(out.loss, expected)


def test_lazy_goals_of_different_lengths_and_a_group() -> None:
    x, y = torch.rand(50, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    w = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def out(wrap: Any, budget: float | None) -> tuple[Any, Tensor]:
        spill = Spill(0.5, budget=budget)
        goals = GoalSet(a=Minimize(1.0), g=Group(x=Minimize(1.0), y=Minimize(2.0)), b=Minimize(3.0), spill=spill)
        for _ in range(3):
            first, second = wrap(_product, x, w.expand(50, 3)), wrap(_product, y, w.expand(7, 3))
            given = {"a": second, "g": {"x": first, "y": first}, "b": (w * w).sum()}
            result = goals(given)
        return result, torch.autograd.grad(result.loss, w)[0]

    for budget in (0.3, 50.0):
        (one, grad), (other, wanted) = out(lazy, budget), out(plain, budget)
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(grad, wanted)
    exact, whole = out(plain, None)
    torch.testing.assert_close(other.loss, exact.loss)
    torch.testing.assert_close(wanted, whole)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).square().sum(1)


def test_values_that_were_read_before_stay() -> None:
    torch.manual_seed(0)
    x = torch.rand(30, 4, dtype=torch.float64, requires_grad=True)
    noisy = lazy(_noisy, x)
    seen = noisy.value
    goals = four(0.5)
    out = goals({"a": noisy, "b": noisy, "c": x.mean(1), "d": x.mean(1)})
    out.loss.backward()
    rows = rows_of(four(0.5), 30)[0]
    assert float(out["raw"][0]) == pytest.approx(float(seen[rows].mean()))


def _noisy(x: Tensor) -> Tensor:
    return (x * torch.rand_like(x)).mean(1)


def test_rows_that_depend_on_one_another_are_refused() -> None:
    norm = nn.BatchNorm1d(4, affine=False).double()

    def normed(x: Tensor) -> Tensor:
        return norm(x).square().mean(1) * x[:, 0]

    x = torch.rand(30, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rows of .*normed depend on one another"):
        four(0.5)({"a": lazy(normed, x), **{name: x.mean(1) for name in "bcd"}})


def test_a_lazy_goal_that_returns_no_column_is_refused() -> None:
    x = torch.rand(30, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"is a goal: it must return \[n\] for n rows"):
        four(0.5)({"a": lazy(torch.square, x), **{name: x.mean(1) for name in "bcd"}})


# Resume, compile.


@pytest.mark.parametrize("wrap", [lazy, plain], ids=["lazy", "plain"])
def test_a_resumed_run_draws_the_same_to_the_bit(wrap: Any) -> None:
    x = torch.rand(30, 4, dtype=torch.float64)
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def step(goals: GoalSet) -> Tensor:
        def noisy(x: Tensor) -> Tensor:  # a function of this process, which has not been checked yet
            return _noisy(x * w)

        raw = {"a": wrap(noisy, x), "b": (x * w).mean(1), "c": wrap(noisy, x + 1), "d": (x * w).square().mean(1)}
        out = goals(raw)
        return torch.cat([out.record, torch.autograd.grad(out.loss, w)[0]])

    goals = four(0.5)
    torch.manual_seed(3)
    for _ in range(5):
        step(goals)
    state, random = copy.deepcopy(goals.state_dict()), torch.get_rng_state()
    went_on = [step(goals) for _ in range(5)]
    resumed = four(0.5)
    resumed.load_state_dict(state)
    torch.set_rng_state(random)

    def fresh(x: Tensor) -> Tensor:
        return _noisy(x * w)

    def first(goals: GoalSet) -> Tensor:  # a function that this process checks only now
        raw = {"a": wrap(fresh, x), "b": (x * w).mean(1), "c": wrap(fresh, x + 1), "d": (x * w).square().mean(1)}
        out = goals(raw)
        return torch.cat([out.record, torch.autograd.grad(out.loss, w)[0]])

    again = [first(resumed), *(step(resumed) for _ in range(4))]
    for one, other in zip(went_on, again, strict=True):
        assert torch.equal(one, other)
    for (name, a), b in zip(goals.named_buffers(), resumed.buffers(), strict=True):
        assert torch.equal(a, b) or "before" in name or "ring" in name, name


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_steps_are_eager_ones_and_are_compiled_once(masked: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, ours = four(0.5), four(0.5)

    def loss(goals: GoalSet, x: Tensor, mask: Tensor) -> Tensor:
        raw = {"a": x[:, 0], "b": lazy(_size, x), "c": x[:, 1:2].mean(1), "d": x[:, 2].square()}
        return goals(raw, mask={"b": mask} if masked else None).loss

    fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(24, 3, generator=generator, dtype=torch.float64).requires_grad_()
        mask = torch.rand(24, generator=generator) < 0.5
        one, other = loss(eager, x, mask), fast(ours, x, mask)
        torch.testing.assert_close(other, one)
        grads = [torch.autograd.grad(y, x)[0] for y in (one, other)]
        torch.testing.assert_close(grads[1], grads[0])
        if step == 1:  # the first step has nothing to take back, the second has
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made <= 2
    torch._dynamo.reset()
