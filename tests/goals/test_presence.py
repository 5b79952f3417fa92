"""Test steps in which goals are absent, or masked for some samples, for `GoalSet`."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, ShareGuard, Tracking, lazy
from bomkern.dispatch import select
from tests.support.goal_sets import EACH_RULE, RULES, every_policy
from tests.support.servers import PAIRS, why_skipped
from tests.support.syncs import CountSyncs

IMPLS = [impl for impl, device in PAIRS if device == "cpu" and why_skipped("goal_set", impl, device) is None]
NAN = math.nan


def two(**options: Any) -> GoalSet:
    return GoalSet(a=Minimize(1.0), b=Minimize(2.0), **options)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, requires_grad=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_leaves_samples_out(impl: str) -> None:
    a, b = values(1.0, NAN, 3.0, NAN), values(4.0, 4.0, NAN, NAN)
    known = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, True, False, False])}
    out = two(impl=impl)({"a": a, "b": b}, mask=known)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((2 + 2 + 3) / 3) and bool(out.finite)
    assert out.bottleneck.tolist() == [1, 1, 0, -1]
    assert a.grad.tolist() == pytest.approx([0, 0, 1 / 3, 0]) and b.grad.tolist() == pytest.approx([1 / 6, 1 / 6, 0, 0])
    assert out.share.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert out["deficit"].tolist() == pytest.approx([2, 2]) and out["raw"].tolist() == pytest.approx([2, 4])
    assert out.level.tolist() == pytest.approx([(math.exp(-1) + math.exp(-3)) / 2, math.exp(-2)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"spill": 0.5}])
def test_an_absent_goal_is_as_if_it_were_not_there(impl: str, options: dict[str, Any]) -> None:
    alone = GoalSet(b=Minimize(2.0), impl=impl, **options)
    for given in ({"a": None}, {}):
        goals = two(impl=impl, optional=["a"], **options)
        first, second = values(4.0, 2.0), values(4.0, 2.0)
        out, want = goals({"b": first, **given}), alone({"b": second})
        out.loss.backward()
        want.loss.backward()
        assert out.loss.item() == pytest.approx(want.loss.item()) and torch.allclose(first.grad, second.grad)
        assert out.share.tolist() == [0, 1] and out.level[0].isnan() and out["raw"][0].isnan()
        assert out["deficit"][0].isnan() and out["highest"][0] == -math.inf and bool(out.finite)
        assert out.bottleneck.tolist() == [1, 1]


def test_nothing_at_all_is_a_loss_of_0_with_a_graph() -> None:
    for options in ({}, {"temperature": 0.3}, {"spill": 0.5}, {"reduction": "min"}, {"reduction": "none"}):
        goals = two(optional=["a", "b"], **options)
        out = goals({})
        out.loss.sum().backward()
        assert not out.loss.any() and bool(out.finite) and out.bottleneck.tolist() == [-1]
        x = values(NAN, NAN)
        out = goals({"a": x, "b": None}, mask={"a": torch.tensor([False, False])})
        out.loss.sum().backward()
        assert not out.loss.any() and (x.grad is None or not x.grad.any())  # routing leaves it undefined
        assert goals({"a": x, "b": 2 * x}, mask={"a": torch.tensor(False), "b": False}).loss.sum() == 0
        assert not goals.history["share"].any() and bool(goals.history["level"].isnan().all())


@pytest.mark.parametrize("impl", IMPLS)
def test_spill_weighs_each_goals_mean_over_its_own_samples(impl: str) -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), c=Minimize(1.0), spill=0.5, impl=impl)
    a, b = values(1.0, 3.0, NAN, NAN), values(5.0, 6.0, 7.0, NAN)
    known = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, True, True, False])}
    raw = {"a": a, "b": b, "c": None}
    first = goals(raw, mask=known)
    assert first.loss.item() == pytest.approx((2 + 6) / 2) and torch.allclose(first.share, torch.tensor([0.5, 0.5, 0]))
    second = goals(raw, mask=known)
    second.loss.backward()
    weight = {"b": 4 / 6, "a": 2 / 6}  # the averages are 2, 6 and 0, of c, whose weight goes to the others
    assert second.loss.item() == pytest.approx(weight["a"] * 2 + weight["b"] * 6)
    assert a.grad.tolist() == pytest.approx([weight["a"] / 2] * 2 + [0, 0])
    assert b.grad.tolist() == pytest.approx([weight["b"] / 3] * 3 + [0])
    average = goals.average.clone()
    goals({"a": None, "b": b, "c": None}, mask={"b": known["b"]})
    assert goals.average[0] == average[0] and goals.average[1] != average[1] and goals.average[2] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_goals_of_different_lengths_under_spill(impl: str) -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), c=Minimize(1.0), spill=0.5, impl=impl)
    a, b, c = values(*[2.0] * 50), values(1.0, 3.0, 8.0), torch.tensor(5.0, requires_grad=True)
    out = goals({"a": a, "b": b, "c": c})
    out.loss.backward()
    assert out.loss.item() == pytest.approx((2 + 4 + 5) / 3)
    assert torch.allclose(a.grad, torch.full((50,), 1 / 150)) and torch.allclose(b.grad, torch.full((3,), 1 / 9))
    assert c.grad.item() == pytest.approx(1 / 3) and out["raw"].tolist() == pytest.approx([2, 4, 5])
    known = torch.tensor([True, True, False])
    out = goals({"a": a, "b": b, "c": c}, mask={"b": known})
    assert out["raw"].tolist() == pytest.approx([2, 2, 5])
    sliced = torch.tensor([[2.0] * 50, [0.0] * 50])  # rows of different lengths need not be contiguous
    assert goals({"a": sliced.t()[:, 0], "b": b, "c": c}).loss.isfinite()


def test_a_group_of_another_length_under_spill() -> None:
    goals = GoalSet(g=Group(x=Minimize(1.0), y=Minimize(1.0)), b=Minimize(1.0), spill=0.5)
    raw: dict[str, Any] = {"g": {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(4.5)}, "b": torch.ones(7)}
    out = goals(raw)
    assert out["deficit"].tolist() == pytest.approx([3, 1]) and out["raw"].tolist() == pytest.approx([1.5, 4.5, 1])
    assert goals({**raw, "b": torch.ones(0)})["deficit"][0] == 3  # no sample has the other goal
    with pytest.raises(ValueError, match=r"g\.y has 3 samples, others have 2: the members of a Group need the same"):
        goals({"g": {"x": torch.rand(2), "y": torch.rand(3)}, "b": torch.ones(7)})


def test_different_lengths_say_what_to_do() -> None:
    raw = {"a": torch.rand(50), "b": torch.rand(3)}
    for options in ({}, {"temperature": 0.1}, {"spill": 0.5, "reduction": "none"}, {"spill": 0.5, "reduction": "min"}):
        with pytest.raises(
            ValueError, match=r"b has 3 samples, .* a has 50: take \.mean\(\) of each, or use GoalSet\(\.\.\., spill"
        ):
            two(**options)(raw)
        with pytest.raises(
            ValueError, match=r"b has 3 samples, .* a has 50: take \.mean\(\) of each, or use GoalSet\(\.\.\., spill"
        ):
            two(**options)(raw, mask={"a": torch.ones(50, dtype=torch.bool)})


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_is_the_mean_of_the_members_that_are_there(impl: str) -> None:
    goals = GoalSet(
        g=Group(x=Minimize(1.0), y=Minimize(1.0)), b=Minimize(1.0), impl=impl, optional=["g.y"], reduction="none"
    )
    x, y, b = torch.tensor([2.0, 2.0, NAN]), torch.tensor([4.0, NAN, NAN]), torch.tensor([0.0, 0.0, 1.0])
    mask_x, mask_y = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    raw = {"g": {"x": x, "y": y}, "b": b}
    for mask in ({"g": {"x": mask_x, "y": mask_y}}, {"g.x": mask_x, "g.y": mask_y}):
        out = goals(raw, mask=mask)
        assert out.loss.tolist() == [3, 2, 1] and out.bottleneck.tolist() == [0, 0, 1]
    assert goals({"g": {"x": x}, "b": b}, mask={"g": mask_x}).loss.tolist() == [2, 2, 1]
    out = goals({"g": None, "b": b})
    assert out.loss.tolist() == [0, 0, 1] and out.level[0].isnan()


def test_policies_never_see_what_is_absent() -> None:
    def make(policy: Any) -> GoalSet:
        return GoalSet(a=policy(), b=Minimize(1.0), optional=["a"])

    for policy in (
        lambda: Calibrated(4, 0.5),
        lambda: Calibrated(4),
        lambda: Tracking(3.0),
        lambda: Anchored(0.0, 2.0),
    ):
        masked, short, b = make(policy), make(policy), torch.tensor([0.1, 0.1])
        before = masked.anchors()["a"]
        masked({"b": b})
        assert masked.anchors()["a"] == before and not masked.policy_state.any()  # nothing was seen yet
        for step in range(1, 3):
            known = torch.tensor([5.0 * step, 7.0])
            masked(
                {"a": torch.tensor([5.0 * step, 7.0, NAN]), "b": torch.rand(3)},
                mask={"a": torch.tensor([True] * 2 + [False])},
            )
            state, anchors = masked.policy_state.clone(), masked.anchors()
            masked({"b": b})
            assert torch.equal(masked.policy_state, state) and masked.anchors() == anchors
            short({"a": known, "b": b})
        assert masked.anchors()["a"] == pytest.approx(short.anchors()["a"])


def test_a_guard_leaves_an_absent_goal_alone() -> None:
    goals = two(guard=ShareGuard(halflife=1.0), optional=["a"])
    goals({"a": torch.tensor([1.0]), "b": torch.tensor([0.0])})
    share, anchors = goals.guard_share.clone(), goals.anchors()
    for _ in range(5):
        goals({"b": torch.tensor([1.0])})
    assert goals.guard_share[0] == share[0] and goals.anchors()["a"] == anchors["a"]
    assert goals.guard_share[1] > share[1] and goals.anchors()["b"] != anchors["b"]


def test_a_rejected_masked_step_is_taken_back() -> None:
    goals = GoalSet(a=Tracking(3.0), b=Minimize(1.0), spill=0.5, guard=ShareGuard())
    mask = {"a": torch.tensor([True, False])}
    raw = {"a": torch.tensor([3.0, NAN]), "b": torch.tensor([1.0, 2.0])}
    goals(raw, mask=mask)
    before = copy.deepcopy(dict(goals.named_buffers()))
    goals(raw, mask=mask)
    goals.accept(torch.tensor(False))
    for name, value in goals.named_buffers():
        if name.split(".")[-1] not in ("ring", "ring_rows", "place", "_average_before", "_multipliers_before"):
            assert torch.equal(value, before[name]), name


def test_only_and_evaluation() -> None:
    goals = two()
    x = values(1.0, NAN, 5.0)
    with goals.only("a"):
        loss = goals({"a": x, "b": torch.rand(3)}, mask={"a": torch.tensor([True, False, True])}).loss
    loss.backward()
    assert loss.item() == 3 and x.grad.tolist() == [0.5, 0, 0.5]
    steps = goals.steps
    goals.eval()({"a": None, "b": torch.rand(3)})
    assert goals.steps == steps


def test_lazy_goals_may_be_masked_and_absent() -> None:
    calls = []

    def error(x: Tensor) -> Tensor:
        calls.append(len(x))
        return (x * weight).square()

    weight = torch.tensor(2.0, requires_grad=True)
    inputs, other, mask = (
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([9.0, 0.0, 0.0]),
        torch.tensor([True, True, False]),
    )
    plain = two()({"a": error(inputs), "b": other}, mask={"a": mask}).loss
    want = torch.autograd.grad(plain, weight)[0]
    for route in ("auto", "always", "never"):
        loss = two(route=route)({"a": lazy(error, inputs), "b": other}, mask={"a": mask}).loss
        assert loss.item() == plain.item() and torch.allclose(torch.autograd.grad(loss, weight)[0], want)
    calls.clear()
    assert two()({"a": None, "b": other}).loss.isfinite() and not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    goals = two().double() if dtype == torch.float64 else two()
    a = torch.tensor([1.0, NAN], dtype=dtype, requires_grad=True)
    out = goals({"a": a, "b": None}, mask={"a": torch.tensor([True, False])})
    out.loss.backward()
    assert out.loss.item() == 1 and a.grad.tolist() == [1, 0] and a.grad.dtype == dtype


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"a": torch.ones(3)}, TypeError, "the mask of a must be torch.bool, got torch.float32"),
        ({"a": [True] * 3}, TypeError, r"the mask of a must be a bool tensor, \[B\] or \[\], got list"),
        ({"a": torch.ones(2, dtype=torch.bool)}, ValueError, "the mask of a has 2 samples, the goals have 3"),
        ({"a": torch.ones(3, 1, dtype=torch.bool)}, ValueError, r"the mask of a must have shape \[B\] or \[\]"),
        ({"a": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "the mask of a is on meta"),
        ({"z": torch.ones(3, dtype=torch.bool)}, KeyError, "mask: no goal is called z"),
        ({"a": {"m": torch.tensor(True)}}, KeyError, "mask: no member of a is called m"),
        (torch.ones(3, dtype=torch.bool), TypeError, "mask must be a mapping"),
    ],
)
def test_invalid_masks_are_named(mask: Any, error: type[Exception], message: str) -> None:
    goals = two()
    with pytest.raises(error, match=message):
        goals({"a": torch.rand(3), "b": torch.rand(3)}, mask=mask)
    assert goals.steps == 0


def test_missing_goals_must_be_declared() -> None:
    with pytest.raises(KeyError, match="no raw value for a"):
        two(optional=["b"])({"b": torch.rand(3)})
    with pytest.raises(ValueError, match=r"optional must name goals \(a, b\), got 'c'"):
        two(optional=["c"])


@pytest.mark.skipif(select.extension is None, reason="not compiled")
def test_no_op_is_added_where_nothing_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask nothing of `Presence.of` runs."""
    goals = two(optional=["a"], spill=0.5)
    monkeypatch.setattr(type(goals.presence), "of", lambda *_: pytest.fail("a step without a mask built one"))
    goals({"a": torch.rand(3), "b": torch.rand(3)})


def masked_steps(goals: GoalSet, device: str) -> None:
    """Take steps with masks and absent goals, with every policy, and the options that change state."""
    for step in range(6):
        raw: dict[str, Any] = {
            n: torch.rand(8, device=device, requires_grad=True)
            for n in ("max", "quantile", "hard", "tracking", "moving")
        }
        raw["both"] = {"a": torch.rand(8, device=device, requires_grad=True), "b": None}
        mask = {n: torch.ones(8, dtype=torch.bool, device=device) for n in ("max", "quantile", "tracking", "both")}
        if step % 2:
            raw["tracking"] = None
        out = goals(raw, mask=mask)
        out.loss.sum().backward()
        goals.accept(torch.ones((), dtype=torch.bool, device=device) & out.finite)


@EACH_RULE
def test_no_host_sync_in_a_masked_step(rule: str) -> None:
    goals = every_policy(**RULES[rule])
    masked_steps(goals, "cpu")
    with CountSyncs() as counter:
        masked_steps(goals, "cpu")
    assert not counter.seen.keys() - {"_to_copy"}
    masked_steps(every_policy(**{**RULES[rule], "impl": "reference"}).to("meta"), "meta")  # reading a value raises


def test_compiled_steps_agree() -> None:
    eager = GoalSet(a=Tracking(3.0), b=Minimize(1.0), spill=0.5, optional=["a"], route="never")
    compiled = copy.deepcopy(eager)
    step = torch.compile(lambda raw, mask: compiled(raw, mask=mask).loss, backend="aot_eager", fullgraph=True)
    for k in range(3):
        a, b = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
        mask = {"a": torch.arange(4) > k}
        one, other = eager({"a": a, "b": b}, mask=mask).loss, step({"a": a, "b": b}, mask)
        assert torch.allclose(one, other)
        for x, y in zip(torch.autograd.grad(one, [a, b]), torch.autograd.grad(other, [a, b]), strict=True):
            assert torch.allclose(x, y)
    assert torch.allclose(eager.policy_state, compiled.policy_state)
    assert torch.allclose(eager({"b": b}).loss, step({"b": b}, None))
    # Goals of different lengths, in one graph too.
    raw = {"a": torch.rand(7), "b": torch.rand(4)}
    assert torch.allclose(eager(raw).loss, step(raw, None))


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_alone_have_samples(impl: str) -> None:
    """Every goal is of the whole batch, and the masks say which samples have it."""
    a, b = (torch.tensor(x, requires_grad=True) for x in (2.0, 1.0))
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), impl=impl, reduction="sum")
    out = goals({"a": a, "b": b}, mask={"a": torch.tensor([True, False, False, True])})
    out.loss.backward()
    assert out.bottleneck.tolist() == [0, 1, 1, 0] and out.loss == 6 and (a.grad, b.grad) == (2, 2)
