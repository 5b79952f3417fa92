"""Test `GoalSet.check`: which anchors look wrong for the first batch, and that the call leaves no trace."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

import bomkern
from bomkern import (
    Anchored,
    AnchorFinding,
    Box,
    Calibrated,
    GoalSet,
    Group,
    Maximize,
    Minimize,
    MinimizeHard,
    Spill,
    Upper,
    lazy,
)
from tests.support.goal_sets import RULES, every_policy
from tests.support.processes import on_two_ranks

FIELD = pytest.mark.parametrize("of", ["rows", "batch"])


def one(goal: Any, value: float | Tensor, beside: float = 1.0, of: str = "rows") -> AnchorFinding | None:
    """Return the finding of a goal beside another one that is well anchored."""
    value = torch.as_tensor(value, dtype=torch.float32)
    raw = {"it": value.expand(4) if of == "rows" else value, "beside": torch.full((4,), beside)}
    findings = GoalSet(it=goal, beside=Anchored(0.0, 1.0)).check(raw)
    assert len(findings) <= 1 and all(f.goal == "it" for f in findings)
    return findings[0] if findings else None


def paste(code: str) -> Any:
    return eval(code.partition(", unless")[0], vars(bomkern))


@pytest.mark.parametrize(
    ("goal", "value"),
    [
        (Anchored(0.0, 2.0), 2.1),
        (Anchored(0.0, 2.0), 60.0),  # thirty nadirs: untrained networks do that
        (Anchored(0.0, 2.0), 0.3),
        (Anchored(0.5, 1.0), 0.48),  # at its ideal, but for chance
        (Anchored(0.5, 1.0), 0.51),
        (Anchored(0.05, 7.0), 0.08),
        (Anchored(0.0, 1.0), 0.0),
        (Anchored(1.0, 0.0), 0.02),
        (Upper(3.0, 1.0), 0.1),  # kept, which is what a limit is for
        (Upper(3.0, 1.0), 3.001),
        (Box(-1.0, 1.0), 0.0),
        (Calibrated(), 1e6),  # measures its scale
        (Minimize(1.0), 1.0),
        (Maximize(1.0), -1.0),
    ],
)
@FIELD
def test_an_anchor_that_fits(goal: Any, value: float, of: str) -> None:
    assert one(goal, value, of=of) is None


@pytest.mark.parametrize(
    ("kind", "goal", "value", "deficit", "use"),
    [
        ("far beyond its nadir", Anchored(0.0, 0.001), 0.31, 310.0, "Anchored(0, 0.31)"),
        ("far beyond its nadir", Anchored(1.0, 0.99), -1.0, 200.0, "Anchored(1, -1)"),
        ("far beyond its nadir", Anchored(0.5, 0.501, moving=True), 0.9, 400.0, "Anchored(0.5, 0.9, moving=True)"),
        ("far beyond its nadir", Minimize(0.01, ideal=100.0), 101.5, 150.0, "Anchored(100, 101.5)"),
        ("far beyond its nadir", Upper(3.0, 0.01), 5.0, 200.0, "Upper(3, margin=2)"),
        ("far beyond its nadir", Box(-1.0, 1.0), 50.0, 982.9957, "a Box that holds 50"),
        ("far from its nadir", Anchored(0.0, 126.0), 2.0, 2 / 126, "Anchored(0, 2)"),
        ("far from its nadir", Anchored(0.0, 1e5), 1.0, 1e-5, "Anchored(0, 1)"),
        ("far from its nadir", Anchored(1.0, -1000.0), -2.0, 3 / 1001, "Anchored(1, -2)"),
        ("far from its nadir", MinimizeHard(100.0), 1.0, math.log1p(1e-4), "MinimizeHard(1)"),
        ("better than its ideal", Anchored(0.5, 1.0), 0.2, -0.6, "Anchored(0.2, 1)"),
        ("better than its ideal", Anchored(0.5, 0.0), 0.7, -0.4, "Anchored(0.7, 0)"),
        ("better than its ideal", Anchored(0.0, 1.0), -80.0, -80.0, "Anchored(-80, 1)"),
    ],
)
@FIELD
def test_an_anchor_that_does_not(kind: str, goal: Any, value: float, deficit: float, use: str, of: str) -> None:
    finding = one(goal, value, of=of)
    assert finding is not None and finding.kind == kind and finding.raw == pytest.approx(value)
    assert finding.deficit == pytest.approx(deficit, rel=2e-3)  # params are float32
    assert finding.use.partition(", unless")[0] == use
    assert ("unless training makes it worse" in finding.use) == (
        kind in ("far from its nadir", "better than its ideal")
    )
    assert "\n" not in str(finding) and str(finding).startswith("it: it starts at ")
    if "a Box" not in use:  # what it says to use fits
        assert one(paste(finding.use), value) is None or kind == "better than its ideal"


def test_a_sign_that_is_wrong_gets_the_anchors_of_the_other() -> None:
    finding = one(Anchored(0.0, 1.0), -80.0)
    assert finding is not None and "if larger values are better, it is Anchored(0, -80)" in finding.seen
    finding = one(Anchored(1.0, 0.0), 5.0)
    assert finding is not None and "if smaller values are better, it is Anchored(1, 5)" in finding.seen


@pytest.mark.parametrize(
    ("deficits", "wrong"),
    [
        ((1.0, 0.5, 40.0), {}),
        ((80.0, 0.5), {"a": 0.5}),
        ((0.005, 1.2), {"b": None}),  # the goal that is near its nadir is right
        ((1.0, 300.0, 0.9, 500.0), {"b": 0.9, "d": 0.9}),
        ((200.0, 1.0, 0.005), {"a": 1.0}),
    ],
)
def test_of_two_that_are_apart_the_one_further_from_its_nadir_is_named(
    deficits: tuple[float, ...], wrong: dict[str, float | None]
) -> None:
    names = "abcd"[: len(deficits)]
    goals = GoalSet({name: Anchored(0.0, 1.0) for name in names})
    check = goals.check({name: torch.tensor(d) for name, d in zip(names, deficits, strict=True)})
    beyond = {f.goal for f in check if f.kind == "far beyond its nadir"}
    assert beyond == {name for name, other in wrong.items() if other is not None}
    assert all(f"is at {wrong[f.goal]:.2g}" in f.seen for f in check if f.goal in beyond)
    assert check.deficits == pytest.approx(dict(zip(names, deficits, strict=True)))


def test_values_that_are_not_finite() -> None:
    finding = one(Anchored(0.0, 1.0), torch.tensor([1.0, math.nan, math.inf, 2.0]))
    assert finding is not None and finding.kind == "not finite" and finding.raw == 1.5
    assert finding.seen == "2 of 4 raw values are not finite" and "mask={'it': values.isfinite()}" in finding.use
    finding = one(Anchored(0.0, 1.0), math.nan)
    assert finding is not None and math.isnan(finding.deficit)


@pytest.mark.parametrize(
    ("goal", "use"),
    [
        (Anchored("floor", "baseline"), "goals.anchor(floor={'it': ...}, baseline={'it': ...}) or Anchored(0, 0.3)"),
        (Anchored("probe", "probe"), "goals.anchor(probe={'it': ...}) or Anchored(0, 0.3)"),
        (Anchored(0.1, len), "goals.anchor(batch) or Anchored(0.1, 0.3)"),
        (Anchored(1.0, "baseline", maximize=True), "goals.anchor(baseline={'it': ...}) or Anchored(1, 0.3)"),
        (Anchored(0.7, "baseline"), "goals.anchor(baseline={'it': ...})"),  # 0.3 is better than the ideal
    ],
)
def test_anchors_that_are_not_known(goal: Anchored, use: str) -> None:
    finding = one(goal, 0.3)
    assert finding is not None and finding.kind == "unknown" and finding.use == use
    assert "known yet; it starts at 0.3" in finding.seen and math.isnan(finding.deficit)


def test_anchors_that_were_supplied_are_judged() -> None:
    goals = GoalSet(a=Anchored("floor", "baseline"))
    goals.anchor(floor={"a": 1.0})
    assert "its nadir is not known yet" in goals.check({"a": torch.tensor(3.0)})[0].seen
    goals.anchor(baseline={"a": 3.0})
    assert goals.check({"a": torch.tensor(3.0)}).deficits == {"a": pytest.approx(1.0)}
    assert goals.check({"a": torch.tensor(-5.0)})[0].kind == "better than its ideal"


def test_it_prints_a_line_for_each_finding() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0))
    fine, wrong = ({"a": torch.tensor(1.0), "b": torch.tensor(b)} for b in (1.0, 1e4))
    assert not goals.check(fine) and str(goals.check(fine)) == "every anchor fits"
    check = goals.check(wrong)
    assert str(check) == repr(check) == "\n".join(map(str, check))
    assert check[:1] == (check[0],) and len(check) == 1
    assert str(check[0]) == (
        "b: it starts at 1e+04, which is 1e+04 times as bad as its nadir, 1, while a is at 1; use Anchored(0, 1e+04)"
    )


# What a step takes, it takes.


def test_groups_masks_absent_goals_and_different_lengths() -> None:
    goals = GoalSet(
        a=Anchored(0.0, 1.0),
        g=Group(x=Anchored(0.0, 1.0), y=Anchored(0.0, 1e4)),
        gone=Anchored(0.0, 1.0),
        some=Anchored(0.0, 1.0),
        spill=0.5,
        optional=["gone"],
    )
    raw = {
        "a": torch.ones(6),
        "g": {"x": torch.tensor([1.0, math.nan, 3.0]), "y": torch.ones(3)},
        "some": torch.full((6,), math.nan),
    }
    mask = {"g": {"x": torch.tensor([True, False, True])}, "some": False}
    check = goals.check(raw, mask)
    assert [f.goal for f in check] == ["g.y"] and check[0].use.startswith("Anchored(0, 1)")
    assert check.deficits == pytest.approx(
        {"a": 1, "g.x": 2, "g.y": 1e-4, "gone": math.nan, "some": math.nan}, nan_ok=True
    )


def test_watched_goals_are_judged_alone() -> None:
    goals = GoalSet(
        a=Anchored(0.0, 1.0),
        monitor={"hit": Anchored(1.0, 0.0), "psnr": Anchored(40.0, 10.0), "far": Anchored(0.0, 1e-4)},
    )
    hit, psnr = torch.tensor([True, False] * 2), torch.tensor(45.0)
    check = goals.check({"a": torch.ones(4), "hit": hit, "psnr": psnr, "far": torch.ones(4)})
    assert [(f.goal, f.kind) for f in check] == [("psnr", "better than its ideal")]
    assert check.deficits["hit"] == pytest.approx(0.5)


def test_bad_input_gets_the_errors_of_a_step() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0))
    for raw, kind, match in (
        ({"a": torch.ones(2)}, KeyError, "no raw value for b"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, ValueError, "the raw value of"),
        ({"a": torch.ones(2), "b": torch.ones(2, 2)}, ValueError, "the raw value of b must have shape"),
        ({"a": torch.ones(2), "b": 1.0}, TypeError, "the raw value of b must be a tensor"),
        ([torch.ones(2)], TypeError, "raw must be a mapping"),
    ):
        with pytest.raises(kind, match=match):  # type: ignore[call-overload]
            goals.check(raw)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="mask: no goal is called c"):
        goals.check({"a": torch.ones(2), "b": torch.ones(2)}, {"c": torch.ones(2, dtype=torch.bool)})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(rule: str, training: bool) -> None:
    """The next steps are those of a run without a check, to the bit, with lazies that draw random numbers."""
    noise = nn.Dropout(0.5)
    runs = []
    for checks in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        goals = every_policy(**RULES[rule]).train(training)
        losses = []
        for _ in range(3):
            w = torch.rand(6, requires_grad=True)
            raw = {name: w + k for k, name in enumerate(goals.names) if name != "both"}
            raw["max"] = lazy(lambda w: noise(w) + w, w)
            raw["both"] = {"a": w.square(), "b": lazy(lambda w: noise(w).exp(), w)}
            if checks:
                before = copy.deepcopy(goals.state_dict()), torch.get_rng_state(), random.getstate()
                assert goals.check(raw).deficits
                after = goals.state_dict(), torch.get_rng_state(), random.getstate()
                assert goals.steps == len(goals.history) and w.grad is None
                for part, same in zip(before, after, strict=True):
                    torch.testing.assert_close(part, same, rtol=0, atol=0, equal_nan=True)
            losses.append(goals(raw).loss.detach())
            goals.accept(len(losses) != 2)
        runs.append((losses, goals.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0, equal_nan=True)


def test_a_step_of_micro_batches_goes_on() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Calibrated(5), spill=Spill(0.5))
    with goals.accumulate(last=False):
        goals({"a": torch.ones(2), "b": torch.ones(2)})
        goals.check({"a": torch.ones(2), "b": torch.full((2,), 9.0)})
    with goals.accumulate(last=True):
        goals({"a": torch.ones(2), "b": torch.ones(2)})
    assert goals.steps == 1 and goals.anchors()["b"][1] == pytest.approx(1.0)


def _on_ranks(group: Any, rank: int) -> Any:
    values = torch.arange(8.0).view(2, 4)[rank]
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1e3), optional=["a"], process_group=group)
    check = goals.check({"a": values if rank else None, "b": values})
    return str(check), check.deficits


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_all_ranks_get_the_answer_for_the_whole_batch(tmp_path: Path) -> None:
    first, second = on_two_ranks(_on_ranks, tmp_path)
    assert first == second
    assert first[1] == pytest.approx({"a": 5.5, "b": 3.5e-3})
