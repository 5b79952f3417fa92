"""Test GoalSet: accepted and refused arguments, policies, history and checkpoint; and `probe`."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    Box,
    Calibrated,
    GoalSet,
    Group,
    History,
    Minimize,
    MinimizeHard,
    ShareGuard,
    Tracking,
    min_goal_loss,
    probe,
)
from bomkern.goals.history import CAPACITY
from bomkern.goals.monitor import ROWS
from bomkern.goals.record import Layout

THREE = {"a": Minimize(0.5), "b": Anchored(0.2, 1.0), "c": Box(-1, 1)}


def values(batch: int = 8, seed: int = 0, **more: Any) -> dict[str, Any]:
    source = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {name: torch.rand(batch, generator=source).requires_grad_() for name in THREE}
    return {**found, **more}


# The loss.


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "min"])
def test_is_min_goal_loss_by_name(reduction: str) -> None:
    goals, raw = GoalSet(THREE, reduction=reduction), values()
    out = goals(raw)
    loss, stats = min_goal_loss(
        list(raw.values()), [Minimize(0.5), Minimize(0.8, 0.2), Box(-1, 1)], reduction=reduction, return_stats=True
    )
    torch.testing.assert_close(out.loss, loss)
    assert torch.equal(out.bottleneck, stats.bottleneck) and bool(out.finite)
    torch.testing.assert_close(out.share, stats.share)
    torch.testing.assert_close(out.level, stats.level)
    ours, theirs = (torch.autograd.grad(x.sum(), list(raw.values()), materialize_grads=True) for x in (out.loss, loss))
    torch.testing.assert_close(ours, theirs)


def test_temperature_is_smooth_tchebycheff_and_lies_on_the_device() -> None:
    goals, raw = GoalSet(THREE, temperature=0.3), values()
    deficits = torch.stack([raw["a"] / 0.5, (raw["b"] - 0.2) / 0.8, -torch.log(1 - raw["c"])], 1)
    torch.testing.assert_close(goals(raw).loss, (0.3 * torch.logsumexp(deficits / 0.3, 1)).mean(), rtol=1e-4, atol=1e-5)
    goals.temperature.fill_(0.0)
    torch.testing.assert_close(goals(raw).loss, deficits.amax(1).mean(), rtol=1e-4, atol=1e-5)


def test_a_group_is_the_mean_deficit_of_its_members() -> None:
    goals = GoalSet(a=Minimize(1.0), pair=Group(p=Minimize(1.0), q=Minimize(2.0)))
    raw = values()
    out = goals({"a": raw["a"], "pair": {"p": raw["b"], "q": raw["c"]}})
    expected = torch.maximum(raw["a"], (raw["b"] + raw["c"] / 2) / 2).mean()
    torch.testing.assert_close(out.loss, expected)
    assert goals.layout.columns == ["a", "pair.p", "pair.q"] and out.share.shape == (2,)


def test_float64_goals_and_half_of_a_model() -> None:
    goals = GoalSet(THREE)
    raw = {name: x.double() for name, x in values().items()}
    assert goals(raw).loss.dtype == torch.float64
    model = nn.ModuleDict({"goals": goals}).half()
    assert goals.params.dtype == goals.monitor.ring.dtype == torch.float32 and goals(values()).loss.isfinite()
    model.double()
    assert goals.params.dtype == torch.float64 and goals(raw).loss.dtype == torch.float64


# Errors.


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({}, KeyError, "no raw value for a, b, c"),
        (values(x=torch.rand(8)), KeyError, "no goal is called x"),
        (values(b=torch.rand(3)), ValueError, "b has 3 samples, others have 8"),
        (values(b=torch.rand(8, 2)), ValueError, "the raw value of b must have shape"),
        (values(b=1.0), TypeError, "the raw value of b must be a tensor, got float"),
        (
            values(b=torch.ones(8, dtype=torch.int64)),
            TypeError,
            r"the raw value of b must be float16.*, got torch.int64: write \.float\(\)",
        ),
        ([1, 2], TypeError, "raw must be a mapping"),
    ],
)
def test_bad_raw_values_are_named(raw: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GoalSet(THREE)(raw)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GoalSet(), "1 to 64 goals, got 0"),
        (lambda: GoalSet(a=3.0), "a must be a constraint or a policy, got float"),  # type: ignore[arg-type]
        (lambda: GoalSet(THREE, reduction="max"), "reduction must be one of"),
        (lambda: GoalSet(THREE, temperature=-1), "temperature must be a number"),
        (lambda: GoalSet(THREE, guard=3), "guard must be a ShareGuard"),  # type: ignore[arg-type]
        (lambda: Anchored(1.0, 1.0), "ideal and nadir must differ, got 1 for both"),
        (lambda: Anchored("start", 1.0), "must be a number, a function or one of"),
        (lambda: Calibrated(0), "steps must be at least 1"),
        (lambda: Calibrated(5, "mean"), "statistic must be 'max' or a quantile"),
        (lambda: Tracking(0.0), "halflife must be finite and above 0"),
        (lambda: ShareGuard(0.5, 0.4), "low < high"),
        (lambda: Group(), "at least one member"),
    ],
)
def test_bad_goals_are_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# Policies.


def feed(goals: GoalSet, rows: list[float] | Tensor, name: str = "x") -> None:
    for row in rows:
        goals({name: torch.as_tensor(row, dtype=torch.float32)})


def test_calibrated() -> None:
    goals = GoalSet(x=Calibrated(3, margin=2.0))
    feed(goals, [1.0, math.nan, 4.0, 100.0])
    assert goals.anchors()["x"] == pytest.approx((0.0, 8.0))
    goals = GoalSet(x=Calibrated(2, 0.5))
    feed(goals, torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0], [70.0, 80.0, 90.0]]))
    assert goals.anchors()["x"] == pytest.approx((0.0, 3.0))


def test_tracking_follows_and_forgets() -> None:
    goals = GoalSet(x=Tracking(halflife=2.0))
    feed(goals, [4.0])
    assert goals.anchors()["x"][1] == pytest.approx(4.0)
    feed(goals, [1.0] * 40)
    assert goals.anchors()["x"][1] == pytest.approx(1.0, rel=1e-3)


def test_anchors_are_waited_for_and_named() -> None:
    goals = GoalSet(x=Anchored("floor", "baseline"), y=Anchored(0.0, lambda batch: batch.mean()))
    raw = {"x": torch.rand(4), "y": torch.rand(4)}
    with pytest.raises(RuntimeError, match="the ideal of x is not known yet"):
        goals(raw)
    goals.anchor(floor={"x": 0.5}, baseline={"x": torch.tensor([1.0, 2.0])})
    with pytest.raises(RuntimeError, match="the nadir of y is not known yet"):
        goals(raw)
    goals.anchor(torch.tensor([3.0, 5.0]))
    goals(raw)
    assert goals.anchors()["x"] == pytest.approx((0.5, 1.0)) and goals.anchors()["y"] == pytest.approx((0.0, 4.0))


def test_moving_anchors_follow_what_is_measured_only(caplog: pytest.LogCaptureFixture) -> None:
    goals = GoalSet(x=Anchored(0.5, 1.0, moving=True, halflife=1.0), y=Minimize(1.0))
    feed_raw = {"x": torch.tensor(9.0), "y": torch.tensor(0.0)}
    for _ in range(20):
        goals(feed_raw)
    assert goals.anchors()["x"] == pytest.approx((0.5, 0.5)) and not caplog.records
    goals.remeasure({"x": (torch.tensor([1.0, 1.0]), 3.0)})
    assert goals.anchors()["x"] == pytest.approx((0.75, 1.25))
    assert goals.drift() == {"x": pytest.approx(2.0)} and "drifted 2.00" in caplog.text
    goals.drift()
    assert len(caplog.records) == 1  # warned once
    with pytest.raises(ValueError, match="y is not a goal with"):
        goals.remeasure({"y": (0.0, 1.0)})


def test_the_guard_nudges_only_outside_its_band() -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), guard=ShareGuard(0.1, 0.9, rate=0.1, halflife=1.0))
    raw = {"a": torch.tensor([2.0, 2.0, 0.0, 0.0]), "b": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    goals(raw)
    assert [scale for _, scale in goals.anchors().values()] == [1.0, 1.0]
    for _ in range(10):
        goals({"a": torch.full((4,), 2.0), "b": torch.zeros(4)})
    (_, a), (_, b) = goals.anchors().values()
    assert a > 1.3 and b < 0.8 and goals.history["scale"][-1, 0] > 1


def test_a_rejected_step_is_taken_back() -> None:
    goals = GoalSet(x=Calibrated(10), y=MinimizeHard(1.0), guard=ShareGuard(0.1, 0.5, rate=0.1))
    raw = {"x": torch.tensor([1.0]), "y": torch.tensor([0.0])}
    goals(raw)
    goals.accept(torch.tensor(True))
    before = {name: x.clone() for name, x in goals.named_buffers(recurse=False)}
    goals({"x": torch.tensor([50.0]), "y": torch.tensor([0.0])})
    goals.accept(torch.tensor(False))
    assert all(torch.equal(x, before[name]) for name, x in goals.named_buffers(recurse=False))
    assert goals.history["finite"].tolist() == [1.0, 0.0]


def test_eval_leaves_everything_as_it_is() -> None:
    goals = GoalSet(x=Tracking()).eval()
    feed(goals, [5.0])
    assert goals.steps == len(goals.history) == 0 and goals.anchors()["x"] == (0.0, 1.0)


# History and checkpoint.


def test_history_holds_every_step_across_flushes() -> None:
    goals = GoalSet(x=Minimize(1.0))
    feed(goals, torch.arange(2 * ROWS + 7.0))
    assert goals.history["raw"][:, 0].tolist() == list(range(2 * ROWS + 7)) and goals.steps == 2 * ROWS + 7
    assert len(goals.monitor.take()) == 2 * ROWS + 7 and len(goals.monitor.take()) == 0


def test_history_is_bounded_and_joins_only_finite_steps() -> None:
    layout = Layout(["x"], ["x"], [0], ["Minimize(1)"])
    history, rows = History(layout), torch.zeros(2 * CAPACITY + 3, layout.size)
    rows[:, 3] = torch.arange(len(rows))  # raw values
    rows[:, -1] = 1
    rows[1, 3], rows[1, -1] = torch.nan, 0
    for part in rows.split(1000):
        history.append(part)
    assert len(history) < CAPACITY and history.stride == 4
    assert history["raw"][0, 0] == pytest.approx((0 + 2 + 3) / 3, abs=0.5)
    assert history["raw"][1:, 0].tolist() == pytest.approx([4 * i + 1.5 for i in range(1, len(history))])
    assert history["finite"][0] == 0.75 and history.steps[-1] == 4 * len(history)


def test_checkpoint_goes_on_to_the_bit() -> None:
    def make() -> GoalSet:
        return GoalSet(x=Calibrated(50), y=Tracking(5.0), z=Anchored("floor", 1.0), guard=ShareGuard())

    def run(goals: GoalSet, first: int, last: int) -> None:
        for seed in range(first, last):
            raw = values(seed=seed)
            goals(dict(zip("xyz", raw.values(), strict=True)))

    whole, half, rest = make(), make(), make()
    for goals in (whole, half):
        goals.anchor(floor={"z": 0.1})
    run(whole, 0, 40)
    run(half, 0, 25)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    rest.load_state_dict(torch.load(file, weights_only=True))
    run(rest, 25, 40)
    assert rest.steps == 40
    for part in ("raw", "share", "scale", "loss"):
        assert torch.equal(rest.history[part], whole.history[part]), part
    assert torch.equal(rest.params, whole.params)


def test_prints_as_a_table(tmp_path: Any) -> None:
    goals = GoalSet(THREE)
    assert "Anchored(ideal=0.2, nadir=1)" in str(goals) and "0 steps" in str(goals)
    goals(values())
    lines = str(goals).splitlines()
    assert len(lines) == 5 and lines[1].split()[-2:] == ["share", "level"] and "reduction=mean" in lines[0]
    goals.history.save(tmp_path / "history.pt")
    assert torch.equal(History.load(tmp_path / "history.pt")["raw"], goals.history["raw"])


# Probe.


def test_probe_makes_the_table_and_puts_everything_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    goals = GoalSet(a=Anchored("probe", "probe"), b=Anchored(0.0, "probe"))

    def step() -> None:
        y = model(torch.randn(16, 3))
        out = goals({"a": (y - 1).square().mean(1), "b": (y + 1).square().mean(1)})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    payoff = probe(step, goals, 60, state=[model, optimizer], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not optimizer.state
    assert torch.equal(random, torch.get_rng_state()) and goals.steps == 0 and payoff.updates == 120
    assert payoff.table[0, 0] < 0.5 < payoff.table[1, 0] and payoff.table[1, 1] < 0.5 < payoff.table[0, 1]
    assert "trained on" in str(payoff) and payoff.to_dict()["goals"] == ["a", "b"]
    goals.anchor(probe=payoff)
    step()
    ideal, scale = goals.anchors()["a"]
    assert 0 <= ideal <= payoff.table[0, 0].item() and ideal + scale == pytest.approx(payoff.anchors("nadir")["a"])


def test_probe_says_what_it_lacks() -> None:
    goals = GoalSet(a=Minimize(1.0))
    with pytest.raises(ValueError, match="steps must be a whole number"):
        probe(lambda: None, goals, 0, state=[])
    with pytest.raises(ValueError, match="state must name"):
        probe(lambda: None, goals, 1)
    with pytest.raises(ValueError, match="step never called"):
        probe(lambda: None, goals, 1, state=[], progress=False)
    with pytest.raises(ValueError, match=r"training on a alone .* a not finite"):
        probe(lambda: goals({"a": torch.tensor(math.nan)}), goals, 1, state=[], progress=False)
