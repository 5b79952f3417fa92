"""Test `Spill(budget=)`: each goal takes rows in proportion to its weight, drawn at random."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, ShareGuard, Spill, Tracking
from bomkern.goals.row_budget import draw
from tests.support.goals import grad_of
from tests.support.row_budget import EACH, NAMES, WEIGHTS, four, rows_of
from tests.support.syncs import CountSyncs

# The rows.


def test_rows_are_drawn_evenly_and_apart_for_each_step_seed_and_rank() -> None:
    batch, steps = 24, 6000
    step = torch.zeros(1, dtype=torch.int64)
    first, pairs = torch.zeros(batch, batch), torch.zeros(batch, batch)
    for _ in range(steps):
        order = draw(12345, step, batch).argsort()
        first[order, torch.arange(batch)] += 1
        chosen = torch.zeros(batch).index_fill(0, order[:6], 1.0)
        pairs += chosen[:, None] * chosen
        step += 1
    free = (batch - 1) ** 2
    chi = ((first - steps / batch) ** 2).sum() / (steps / batch)  # of every row at every place of the order
    assert abs(float(chi) - free) < 5 * math.sqrt(2 * free)
    together = 6 * 5 / (batch * (batch - 1))
    apart = pairs[~torch.eye(batch, dtype=torch.bool)] / steps - together
    assert apart.abs().max() < 5 * math.sqrt(together / steps) and apart.std() < 1.3 * math.sqrt(together / steps)
    drawn = [rows_of(four(0.5, seed=seed), 64)[0] for seed in (0, 1, 2**40, 2**40 + 1)]
    goals = four(0.5)
    drawn += [rows_of(goals, 64)[0] for _ in range(3)][1:]
    assert len({tuple(rows) for rows in drawn}) == 6


@pytest.mark.parametrize("batch", [1, 2, 7, 1000, 4099])
def test_every_row_has_its_own_number(batch: int) -> None:
    keys = draw(2**32 - 1, torch.tensor([2**40 + 3]), batch)
    assert len(keys.unique()) == batch and int(keys.min()) >= 0 and int(keys.max()) < 2**32


@EACH
@pytest.mark.parametrize(("budget", "batch"), [(1.0, 64), (2.0, 64), (0.1, 64), (1.5, 5), (1.0, 1), (1.0, 960)])
def test_each_goal_takes_its_part_nested(impl: str, budget: float, batch: int) -> None:
    rows = rows_of(four(budget, impl=impl), batch)
    exact = [budget * batch * k / 15 for k in (8, 4, 2, 1)]
    assert [len(x) for x in rows] == [min(batch, max(1, math.ceil(n - 1e-5))) for n in exact]
    for larger, smaller in itertools.pairwise(rows):
        assert set(smaller) <= set(larger)


def test_the_weights_decide_whoever_is_worst() -> None:
    goals = four(1.0)
    goals.multipliers.copy_(WEIGHTS.flip(0))
    assert [len(x) for x in rows_of(goals, 60)] == [4, 8, 16, 32]


def test_a_goal_without_weight_is_still_seen() -> None:
    """A weight below the smallest number of float32, as the ninth of a small ratio, is 0."""
    goals = four(1.0)
    goals.multipliers.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    out = goals({name: torch.rand(16, dtype=torch.float64, requires_grad=True) for name in NAMES})
    assert bool(out["deficit"].isfinite().all()) and out.share.tolist() == [1, 0, 0, 0]


def test_a_mask_leaves_every_goal_its_rows() -> None:
    """A goal with few samples takes as many of these as it would take of all."""
    few = torch.zeros(64, dtype=torch.bool)
    few[[3, 40]] = True
    half = torch.arange(64) % 2 == 0
    goals = four(1.0)
    for _ in range(20):
        goals.multipliers.copy_(WEIGHTS)
        a, b, c, d = rows_of(goals, 64, mask={"b": half, "c": few, "d": few})
        assert len(a) == 35 and len(b) == 18 and c == [3, 40] and d == [3, 40]
        assert all(row % 2 == 0 for row in b)
    goals = four(0.1)
    seen: set[int] = set()
    for _ in range(20):
        goals.multipliers.copy_(WEIGHTS)
        (row,) = rows_of(goals, 64, mask={"d": few})[3]
        seen.add(row)
    assert seen == {3, 40}


# The loss.


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_all_rows_in_expectation(reduction: str, masked: bool) -> None:
    """Over 2,000 draws each number is within 5 standard errors; a bias of 5% of loss or gradient would be seen."""
    generator = torch.Generator().manual_seed(1)
    batch, size = 16, 6
    scales = torch.tensor([0.3, 1.0, 2.0, 0.5], dtype=torch.float64)
    x = torch.randn(4, batch, size, generator=generator, dtype=torch.float64) * scales[:, None, None]
    w = torch.rand(size, generator=generator, dtype=torch.float64).add(0.5).requires_grad_()
    mask = {"b": torch.arange(batch) < 11, "d": torch.arange(batch) % 3 > 0} if masked else None

    def step(goals: GoalSet) -> Tensor:
        goals.multipliers.copy_(WEIGHTS)
        raw = {name: (x[k] * w).square().mean(1) for k, name in enumerate(NAMES)}
        loss = goals(raw, mask=mask).loss
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, w)[0]])

    exact = step(four(None, reduction=reduction))
    goals = four(0.7, reduction=reduction)
    draws = torch.stack([step(goals) for _ in range(2000)])
    mean, error = mean_and_error(draws)
    assert ((mean - exact).abs() < 5 * error).all()
    along = draws[:, 1:] @ exact[1:] / exact[1:].square().sum()  # 1 for the exact gradient
    for samples in (along, draws[:, 0] / exact[0]):
        middle, deviation = mean_and_error(samples)
        assert abs(middle - 1) < 3.5 * deviation
        assert 0.05 > (3.5 + 3) * deviation > 0  # a bias of 5% would fail the line above, with probability 0.999


def problem(rule: dict[str, Any], impl: str) -> GoalSet:
    return GoalSet(
        a=Calibrated(3),
        g=Group(x=Tracking(halflife=2.0), y=Minimize(0.7)),
        b=Anchored(0.0, 0.5),
        optional=["b"],
        impl=impl,
        **rule,
    ).double()


def feed(goals: GoalSet, step: int, masked: bool) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    raw = {
        name: torch.rand(12, generator=generator, dtype=torch.float64).add(0.1).requires_grad_()
        for name in ("a", "x", "y", "b")
    }
    known = {n: torch.rand(12, generator=generator) < 0.7 for n in ("x", "b")}
    given: dict[str, Any] = {"a": raw["a"], "g": {"x": raw["x"], "y": raw["y"]}}
    if step % 4:
        given["b"] = raw["b"]
    out = goals(given, mask={"g.x": known["x"], **({"b": known["b"]} if step % 4 else {})} if masked else None)
    out.loss.backward()
    return out, [grad_of(x) for x in raw.values()]


@EACH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"guard": ShareGuard(halflife=1.0)}])
def test_a_large_budget_is_no_budget(impl: str, masked: bool, options: dict[str, Any]) -> None:
    ours = problem({"spill": Spill(0.5, budget=1e3), **options}, impl)
    exact = problem({"spill": Spill(0.5), **options}, impl)
    for step in range(8):
        (one, grads), (other, wanted) = feed(ours, step, masked), feed(exact, step, masked)
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(grads, wanted)
        assert torch.equal(one.bottleneck, other.bottleneck)
        torch.testing.assert_close(one.record, other.record, equal_nan=True)
    for (name, x), y in zip(ours.named_buffers(), exact.buffers(), strict=True):
        if "ring_rows" not in name:  # which steps without a budget leave to the host
            torch.testing.assert_close(x, y, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(ours.history["rows"], exact.history["rows"])


@EACH
def test_record_and_policies_see_the_rows_that_were_taken(impl: str) -> None:
    goals = GoalSet(a=Calibrated(4), b=Minimize(1.0), spill=Spill(0.5, budget=0.5), impl=impl)
    a, b = torch.rand(20, requires_grad=True), torch.rand(20, requires_grad=True)
    out = goals({"a": a, "b": b})
    out.loss.backward()
    rows = a.grad != 0
    assert int(rows.sum()) == 5 and torch.equal(rows, b.grad != 0)  # all alike before the first step
    assert out["raw"].tolist() == pytest.approx([x[rows].mean().item() for x in (a, b)])
    assert float(out["highest"][0]) == pytest.approx(a[rows].max().item())
    assert float(out["scale"][0]) == pytest.approx(a[rows].max().item(), rel=1e-3)
    assert out.bottleneck[~rows].tolist() == [-1] * 15 and (out.bottleneck[rows] >= 0).all()


def test_values_of_rows_that_are_not_taken_are_not_read() -> None:
    goals = four(1.0)
    rows = rows_of(copy.deepcopy(goals), 64)
    raw = {name: torch.full((64,), math.nan, dtype=torch.float64) for name in NAMES}
    for name, own in zip(NAMES, rows, strict=True):
        raw[name][own] = 1.0
    assert bool(goals(raw).finite)


def test_a_goal_of_the_whole_batch_counts_whole() -> None:
    goals, exact = four(0.5), four(None)
    for each in (goals, exact):
        each.multipliers.copy_(WEIGHTS)
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    one, other = (each(dict.fromkeys(NAMES, x)).loss for each in (goals, exact))
    torch.testing.assert_close(one, other)
    rows = torch.rand(32, dtype=torch.float64)
    x.grad = None
    goals.multipliers.copy_(WEIGHTS)
    goals({"a": rows, "b": rows, "c": x, "d": rows}).loss.backward()
    assert float(x.grad) == pytest.approx(2 / 15 / 3)


# When rows are left out.


def test_all_rows_count_outside_of_training_and_for_one_goal_alone() -> None:
    goals, exact = four(0.5), four(None)
    raw = {name: torch.rand(32, dtype=torch.float64, requires_grad=True) for name in NAMES}
    with goals.only("c"):
        assert goals(raw).loss.item() == pytest.approx(raw["c"].mean().item())
    goals.multipliers.copy_(WEIGHTS)
    with torch.no_grad():
        torch.testing.assert_close(goals(raw).record, exact(raw).record)
    goals.eval(), exact.eval()
    torch.testing.assert_close(goals(raw).loss, exact(raw).loss)


def test_evaluations_of_one_step_and_its_micro_batches_see_one_set_of_rows() -> None:
    goals = four(0.5)
    with goals.one_step():
        seen = [rows_of(goals, 32) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2] and goals.steps == 1
    assert rows_of(goals, 32) != seen[0]
    goals, total, count = four(0.5), 0.0, 0
    for size, taken in ((32, [9, 5, 3, 2]), (32, [9, 5, 3, 2]), (5, [2, 1, 1, 1])):
        raw = {name: torch.rand(size, dtype=torch.float64, requires_grad=True) for name in NAMES}
        with goals.accumulate(last=size == 5):
            out = goals(raw)
        rows = [torch.autograd.grad(out.loss, x, retain_graph=True)[0] != 0 for x in raw.values()]
        assert [int(x.sum()) for x in rows] == taken
        total, count = total + raw["b"][rows[1]].sum().item(), count + taken[1]
    assert goals.steps == 1 and float(out["raw"][1]) == pytest.approx(total / count)


def test_a_step_that_is_taken_back_leaves_no_trace() -> None:
    goals = four(0.5)
    rows_of(goals, 32)
    before = {name: x.clone() for name, x in goals.named_buffers() if "before" not in name and "monitor" not in name}
    rows_of(goals, 32)
    goals.accept(False)
    for name, x in goals.named_buffers():
        assert name not in before or torch.equal(x, before[name]), name


def test_no_host_sync_in_a_step() -> None:
    goals = four(0.5)
    raw = {name: torch.rand(32, dtype=torch.float64, requires_grad=True) for name in NAMES}
    with CountSyncs() as counter:
        for mask in (None, {"b": torch.rand(32) < 0.5}):
            goals(raw, mask=mask).loss.backward()
    assert not counter.seen.keys() - {"_to_copy"}


# What is noticed, and errors.


def test_a_goal_of_small_weight_that_gets_worse_is_noticed_about_as_early() -> None:
    """The order follows a drift of the best goal within 20% and a step of all rows, in the median of 15 runs."""

    def noticed(budget: float | None, seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        spill = Spill(0.5, budget=budget, seed=seed)
        goals = GoalSet({f"g{k}": Minimize(1.0) for k in range(6)}, spill=spill)
        for step in range(400):
            worse = max(0, step - 60) * 0.02
            level = [2.0, 1.6, 1.3, 1.0, 0.8, 0.4 + worse]
            spread = torch.rand(6, 32, generator=generator) + 0.5
            goals({f"g{k}": (level[k] * spread[k]).requires_grad_() for k in range(6)})
            if step > 60 and int(goals.multipliers.argmax()) == 5:
                return step - 60
        return 400

    exact, ours = (sorted(noticed(budget, seed) for seed in range(15))[7] for budget in (None, 1.0))
    assert 50 < exact < 200 and ours <= 1.2 * exact + 1


@pytest.mark.parametrize("reduction", ["none", "min"])
def test_reductions_of_samples_are_refused(reduction: str) -> None:
    with pytest.raises(ValueError, match=rf"Spill\(budget=\) needs reduction='mean' or 'sum', got '{reduction}'"):
        GoalSet(a=Minimize(1.0), spill=Spill(0.5, budget=1.0), reduction=reduction)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "Spill: budget must be finite and above 0, got 0"),
        ({"budget": math.inf}, ValueError, "Spill: budget must be finite"),
        ({"budget": "2"}, TypeError, "Spill: budget"),
        ({"budget": 1.0, "seed": -1}, ValueError, "Spill: seed must be at least 0, got -1"),
        ({"budget": 1.0, "seed": 1.5}, TypeError, "Spill: seed must be a whole number, got 1.5"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spill(0.5, **options)


def test_a_wrong_raw_value_is_named() -> None:
    goals = four(1.0)
    good = {name: torch.rand(8, dtype=torch.float64) for name in NAMES}
    for bad in (torch.rand(8, 2), torch.ones(8, dtype=torch.int64), "x"):
        with pytest.raises((TypeError, ValueError), match="the raw value of b"):
            goals({**good, "b": bad})


def test_the_rule_prints_its_budget_and_is_copied() -> None:
    goals = four(1.5)
    assert repr(goals.spill) == "Spill(0.5, budget=1.5)" and repr(Spill()) == "Spill(0.5)"
    assert rows_of(copy.deepcopy(goals), 32) == rows_of(goals, 32)
