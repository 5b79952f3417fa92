"""Test `probe`: robust anchors, bounds, runs that end by themselves, runs that fail, and the cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Anchored, GoalSet, Payoff, probe
from bomkern.goals.payoff_anchors import anchors_of

Goals = dict[str, Any]
PROBED = Anchored("probe", "probe")


class Toy:
    """A vector ``w`` of four numbers, which Adam trains on functions of it, with some noise."""

    def __init__(self, goals: Goals, policies: dict[str, Anchored] | None = None, rate: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 4)
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate, eps=1e-12)
        self.functions, self.steps = goals, 0
        self.goals = GoalSet(policies or dict.fromkeys(goals, PROBED))

    def step(self) -> None:
        self.steps += 1
        w = self.model(torch.ones(1))
        raw = {name: fn(w) * (1 + 0.01 * torch.randn(())) for name, fn in self.functions.items()}
        self.optimizer.zero_grad(set_to_none=False)
        self.goals(raw).loss.backward()
        self.optimizer.step()

    def probe(self, steps: int | str = "auto", **options: Any) -> Payoff:
        return probe(self.step, self.goals, steps, state=[self.model, self.optimizer], progress=False, **options)


def near(target: float) -> Any:
    return lambda w: 1e-3 + (w - target).square().mean()


# The anchors, from runs that are given.


def runs(*rows: tuple[list[float], list[float]], noise: float = 0.0, steps: int = 100) -> list[Tensor]:
    """Return runs from a first to a last row, exponentially, in a tenth of the steps."""
    made = []
    for k, (first, last) in enumerate(rows):
        a, b = (torch.tensor(x, dtype=torch.float64) for x in (first, last))
        course = b + (a - b) * torch.exp(-torch.arange(steps, dtype=torch.float64) / (steps / 10))[:, None]
        draws = torch.randn(course.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        made.append(course * (1 + noise * draws))
    return made


def found(rows: list[Tensor], low: list[float] | None = None) -> Any:
    count = len(rows)
    bounds = torch.tensor(low or [-torch.inf] * count, dtype=torch.float64)
    return anchors_of(rows, [True] * count, bounds, torch.full((count,), torch.nan, dtype=torch.float64))


def test_a_run_that_goes_astray_sets_no_nadir() -> None:
    """The third run is bad for its own goal, and lets the second goal explode, as a broken adversary does."""
    start = [2.0, 0.02, 0.8]
    rows = runs((start, [0.3, 100.0, 0.5]), (start, [2.0, 0.0, 0.9]), (start, [2.2, 3000.0, 0.95]), noise=0.01)
    result = found(rows)
    assert result.table[2, 1] > 2900 and 80 < result.nadir[1] < 110
    assert result.ideal[2] == pytest.approx(0.5, abs=0.02)  # another run has reached a better value
    assert not result.unmoved and (result.nadir > result.ideal).all()


def test_a_goal_that_others_leave_alone_is_measured_against_a_trivial_answer() -> None:
    start = [8.0, 5.0]
    rows = runs((start, [0.5, 5.0]), (start, [8.0, 0.1]))
    result = found(rows)
    for k in range(2):
        gap = float(result.start[k] - result.table[k, k])
        assert 0.25 <= float(result.nadir[k] - result.table[k, k]) / gap < 0.6


def test_the_ideal_of_a_falling_goal_is_extrapolated_within_its_bounds() -> None:
    step = torch.arange(1, 201, dtype=torch.float64)
    falling = (0.2 + 2 / step.sqrt())[:, None]  # halves its distance from 0.2 in four times as many steps
    free, bound = found([falling]), found([falling], [0.3])
    assert 0.15 < free.ideal[0] < 0.3 < free.table[0, 0] and bound.ideal[0] == 0.3
    faster = (4 - (step / 100).square())[:, None]
    assert found([faster]).ideal[0] == 0  # of values that were never negative
    assert found([faster - 4]).ideal[0] < -4


@pytest.mark.parametrize("seed", range(20))
def test_no_nadir_is_on_the_wrong_side_and_each_scales_with_its_goal(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    count = 2 + seed % 12
    start, ends = torch.rand(count, generator=draw).exp(), torch.rand(count, count, generator=draw).mul(6).sub(3).exp()
    rows = runs(*((start.tolist(), ends[k].tolist()) for k in range(count)), noise=0.05 * (seed % 2))
    result, factor = found(rows), torch.ones(count, dtype=torch.float64)
    assert (result.nadir > result.ideal).all() and result.nadir.isfinite().all()
    factor[seed % count] = 1000.0
    scaled = found([row * factor for row in rows])
    assert torch.allclose(scaled.ideal, result.ideal * factor) and torch.allclose(scaled.nadir, result.nadir * factor)
    assert scaled.unmoved == result.unmoved


# The runs.


def test_runs_end_when_they_have_settled_and_all_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy({"a": near(1.0), "b": near(-1.0)})
    before = [p.clone() for p in toy.model.parameters()]
    random = torch.get_rng_state()
    payoff = toy.probe(training=1000)
    assert payoff.updates == sum(payoff.lengths) == toy.steps < 400 and not payoff.unsettled and not caplog.messages
    assert all(torch.equal(a, b) for a, b in zip(before, toy.model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state()) and not toy.optimizer.state and toy.goals.steps == 0
    toy.goals.anchor(probe=payoff)
    assert toy.goals.anchors()["a"][0] < 0.01 and 2 < toy.goals.anchors()["a"][1] < 6
    assert f"{payoff.updates} updates" in str(payoff) and "% of 1000 training steps" in str(payoff)
    assert payoff.to_dict()["lengths"] == list(payoff.lengths) and payoff.seconds > 0


def test_a_slow_run_ends_at_the_limit_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    payoff = Toy({"slow": near(30.0), "b": near(-1.0)}).probe(longest=120)
    assert payoff.lengths[0] == 120 and payoff.unsettled == ("slow",)
    assert caplog.messages == [f"probe: {payoff.doubts()[0]}"] and "slow: not settled" in str(payoff)
    assert Toy({"slow": near(30.0)}).probe(training=90).lengths == (45,)


def test_a_goal_that_nothing_moves_is_tried_once_more_and_named() -> None:
    toy = Toy({"a": near(1.0), "still": lambda w: 5 + 0 * w.mean()})
    payoff = toy.probe(longest=200)
    assert payoff.unmoved == ("still",) and payoff.lengths[1] == 200
    assert payoff.updates == toy.steps > sum(payoff.lengths)
    assert payoff.anchors("nadir")["still"] > payoff.anchors("ideal")["still"] == pytest.approx(5, rel=0.02)
    named = Toy({"a": near(1.0), "still": lambda w: 5 + 0 * w.mean()}, {"a": PROBED, "still": Anchored(0.0, 9.0)})
    assert named.probe(longest=200).unmoved == () and named.goals.anchoring.waiting == ["a"]


def test_bounds_and_ideals_that_are_known_hold() -> None:
    goals = {"a": near(1.0), "b": near(-1.0)}
    payoff = Toy(goals).probe(60, bounds={"a": 0.7})
    assert payoff.anchors("ideal")["a"] == pytest.approx(0.7) and payoff.anchors("nadir")["a"] > 0.7
    known = Toy(goals, {"a": Anchored(0.5, "probe"), "b": PROBED})
    payoff = known.probe(60)
    assert payoff.anchors("ideal")["a"] == 0.5 and payoff.anchors("nadir")["a"] > 0.6
    up = Toy(
        {"a": lambda w: -near(1.0)(w), "b": near(-1.0)}, {"a": Anchored("probe", "probe", maximize=True), "b": PROBED}
    )
    payoff = up.probe(60, bounds={"a": -0.7})
    assert payoff.anchors("ideal")["a"] == pytest.approx(-0.7) and payoff.anchors("nadir")["a"] < -0.7


def test_a_goal_in_other_units_has_the_same_anchors_in_them() -> None:
    """Adam takes the same steps."""
    plain = Toy({"a": near(1.0), "b": near(-1.0)}).probe(60)
    scaled = Toy({"a": lambda w: 1000 * near(1.0)(w), "b": near(-1.0)}).probe(60)
    for which in ("ideal", "nadir"):
        a, b = plain.anchors(which), scaled.anchors(which)
        assert b["a"] == pytest.approx(1000 * a["a"], rel=1e-3) and b["b"] == pytest.approx(a["b"], rel=1e-3)


def test_a_run_without_a_finite_value_is_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(w: Tensor) -> Tensor:
        return (w - 9).square().mean() + torch.where(w.mean() > 2, torch.nan, 0.0)

    payoff = Toy({"a": near(1.0), "b": near(-1.0), "broken": breaks}).probe(150)
    assert payoff.left_out == ("broken",) and any("broken: not finite" in text for text in caplog.messages)
    assert payoff.lengths[2] < 150 and payoff.table[2].isnan().any() and payoff.table[:2].isfinite().all()
    values = [*payoff.ideals, *payoff.nadirs]
    assert all(map(math.isfinite, values)) and "broken" in str(payoff)
    with pytest.raises(ValueError, match=r"training on a or b alone .* a, b not finite"):
        Toy(dict.fromkeys("ab", lambda w: w.mean() * torch.nan)).probe(20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": "long"}, ValueError, r"steps must be .* or \"auto\", got 'long'"),
        ({"bounds": {"c": 1.0}}, KeyError, "no goal is called c"),
        ({"bounds": {"a": math.nan}}, ValueError, "bounds: a must be finite"),
        ({"longest": 0}, ValueError, "longest must be at least 1"),
        ({"training": 0}, ValueError, "training must be at least 1"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be finite and above 0"),
    ],
)
def test_bad_options_are_named(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Toy({"a": near(1.0)}).probe(**options)


def test_a_table_that_was_saved_before_has_its_old_anchors() -> None:
    old = Payoff(["a", "b"], torch.tensor([[1.0, 4.0], [3.0, 2.0]]), 9)
    assert old.anchors("ideal") == {"a": 1.0, "b": 2.0} and old.anchors("nadir") == {"a": 3.0, "b": 4.0}
    assert old.to_dict() == {"goals": ["a", "b"], "table": [[1.0, 4.0], [3.0, 2.0]], "updates": 9}
    assert str(old).endswith("9 updates")


def test_runs_that_end_by_themselves_need_a_group_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy({"a": near(1.0)})
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"GoalSet\(process_group=...\) in several processes"):
        toy.probe()
    assert toy.probe(20).lengths == (20,)
