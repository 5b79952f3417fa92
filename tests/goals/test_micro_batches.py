"""Test steps of several calls: micro-batches are one step of the whole batch, and a closure is one step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    Calibrated,
    GoalSet,
    Group,
    Minimize,
    MinimizeHard,
    Policy,
    ShareGuard,
    Spill,
    StepGuard,
    Tracking,
    Upper,
)
from bomkern.goals.record import merge_records
from bomkern.reference import record_parts
from tests.support.goal_sets import EACH_RULE, RULES, every_policy
from tests.support.syncs import CountSyncs

SIZES = pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 11, 16), (32,)], ids=str)
ANCHORED: dict[str, dict[str, Any]] = {
    **RULES,
    "sum": {"reduction": "sum"},
    "smooth, each": {"temperature": 0.1, "reduction": "none"},
    "spill, each": {"spill": 0.5, "reduction": "none"},
}
PARTS = ("share", "level", "deficit", "raw", "highest", "ideal", "scale", "loss", "finite")


def anchored(**rule: Any) -> GoalSet:
    return GoalSet(
        a=Anchored(0.0, 1.0),
        b=MinimizeHard(2.0),
        c=Group(x=Upper(0.3, 0.5), y=Anchored(0.0, 3.0)),
        **rule,
    )


def raw_of(w: Tensor, x: Tensor) -> dict[str, Any]:
    y = x @ w
    return {"a": y[:, 0] ** 2, "b": y[:, 1].abs(), "c": {"x": y[:, 2], "y": y[:, 3] ** 2}}


def batches(count: int) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(32, 4, generator=source, dtype=torch.float64)


def weights() -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def assert_same(one: GoalSet, other: GoalSet, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Compare all buffers, and the histories."""
    for (name, a), b in zip(one.named_buffers(recurse=False), other.buffers(recurse=False), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=name)
    assert one.steps == other.steps == len(one.history) == len(other.history)
    for part in PARTS:
        torch.testing.assert_close(one.history[part], other.history[part], rtol=rtol, atol=atol, equal_nan=True)


def in_parts(goals: GoalSet, w: Tensor, x: Tensor, sizes: Sequence[int]) -> Any:
    """Take one step of micro-batches, up to the last backward; return the last output."""
    for i, part in enumerate(x.split(list(sizes))):
        with goals.accumulate(last=i == len(sizes) - 1):
            out = goals(raw_of(w, part))
            share = 1.0 if goals.reduction == "sum" else len(part) / len(x)
            (out.loss.mean() * share).backward()
    return out


@SIZES
@pytest.mark.parametrize("rule", ANCHORED)
def test_micro_batches_are_one_step(rule: str, sizes: tuple[int, ...]) -> None:
    """With fixed anchors, gradients, spill, guard and history are those of whole batches."""
    ours, whole = anchored(**ANCHORED[rule]), anchored(**ANCHORED[rule])
    for step, x in enumerate(batches(6)):
        w, v = weights(), weights()
        with torch.no_grad():  # another goal is the worst in later steps
            for values in (w, v):
                values[:, step % 4] *= 3
        out, expected = in_parts(ours, w, x, sizes), whole(raw_of(v, x))
        expected.loss.mean().backward()
        if rule != "global":
            torch.testing.assert_close(w.grad, v.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out.record, expected.record, rtol=1e-6, atol=1e-9)
    assert_same(ours, whole)
    if "spill" in rule:
        assert not ours.multipliers.allclose(torch.full((3,), 1 / 3))


class Last(Policy):
    """A policy that reads its whole batch and the step."""

    until = 3

    def __init__(self) -> None:
        super().__init__(Minimize(1.0))

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        state[0] += raw.numel()
        state[1] += raw.sum()
        return torch.zeros_like(state[0]), state[1] / state[0] + step


def learning(**rule: Any) -> GoalSet:
    goals = {"max": Calibrated(3), "quantile": Calibrated(4, statistic=0.9), "track": Tracking(halflife=3)}
    return GoalSet(**goals, own=Last(), fixed=Anchored(0.0, 1.0), **rule)


def learnt_from(x: Tensor) -> dict[str, Tensor]:
    return {
        "max": x[:, 0] ** 2,
        "quantile": x[:, 1].abs(),
        "track": x[:, 2] ** 2,
        "own": x[:, 3] ** 2,
        "fixed": x[:, 0],
    }


@SIZES
@pytest.mark.parametrize("rule", ["hard", "spill"])
def test_policies_learn_once(rule: str, sizes: tuple[int, ...]) -> None:
    """The state of every policy, to the last bit, and the step at which it ends are those of whole batches."""
    ours, whole = learning(**RULES[rule]), learning(**RULES[rule])
    for x in batches(6):
        for i, part in enumerate(x.split(list(sizes))):
            with ours.accumulate(last=i == len(sizes) - 1):
                ours(learnt_from(part))
        whole(learnt_from(x))
        assert torch.equal(ours.policy_state, whole.policy_state) and torch.equal(ours.params, whole.params)
        assert ours.steps == whole.steps
    for part in ("ideal", "scale", "raw", "highest"):
        torch.testing.assert_close(ours.history[part], whole.history[part])


@EACH_RULE
def test_a_rejected_step_is_taken_back_whole(rule: str) -> None:
    goals = every_policy(**RULES[rule])
    raw = torch.rand(4, 7, 8, generator=torch.Generator().manual_seed(0))

    def step(values: Tensor, ok: bool) -> None:
        for i, (a, b, c, d, e, f, g) in enumerate(values):
            with goals.accumulate(last=i == 3):
                goals({"max": a, "quantile": b, "hard": c, "tracking": d, "moving": e, "both": {"a": f, "b": g}})
        goals.accept(torch.tensor(ok))

    step(raw, True)
    before = {name: value.clone() for name, value in goals.named_buffers(recurse=False)}
    huge = raw.clone()
    huge[2] *= 1e11
    step(huge, False)
    for name, value in goals.named_buffers(recurse=False):
        if not name.endswith("_before"):
            assert torch.equal(value, before[name]), name
    step(raw, True)
    assert goals.history["finite"].tolist() == [1, 0, 1]
    assert float(goals.history["scale"][2].max()) < 1e3


def test_one_bad_micro_batch_marks_one_step() -> None:
    w = nn.Parameter(weights().detach().float())
    goals = anchored(spill=0.5)
    guard = StepGuard(torch.optim.SGD([w], 0.1, fused=True), goals=goals)
    start = w.detach().clone()
    for step in range(3):
        for i, x in enumerate(torch.randn(4, 8, 4)):
            if (step, i) == (1, 1):
                x[3] = torch.nan
            with goals.accumulate(last=i == 3):
                out = goals(raw_of(w, x))
                (out.loss / 4).backward()
        assert bool(out.finite) is (step != 1)  # of the step, not of its last micro-batch
        guard.step(out.finite)
        guard.zero_grad()
        if step == 0:
            start = w.detach().clone()
        elif step == 1:
            assert torch.equal(w, start)
    assert int(guard.rejected) == 1 and goals.steps == 3
    assert goals.history["finite"].tolist() == [1, 0, 1]


def call(goals: GoalSet, scale: float = 1.0) -> Any:
    return goals({"a": torch.full((4,), scale, requires_grad=True), "b": torch.full((4,), 2.0)})


def two(**rule: Any) -> GoalSet:
    return GoalSet(a=Calibrated(3), b=Anchored(0.0, 1.0), **rule)


def test_accept_ends_an_open_step() -> None:
    """An optimizer that stepped has ended the step, as at the end of an epoch."""
    for ok in (True, False):
        goals = two(spill=0.5)
        with goals.accumulate(last=False):
            call(goals, 5.0)
        assert goals.steps == 0
        goals.accept(torch.tensor(ok))
        assert goals.steps == 1 and goals.history["finite"].tolist() == [float(ok)]
        assert goals.anchors()["a"][1] == pytest.approx(5.0 if ok else 1.0)
        call(goals)  # a step of its own
        assert goals.steps == 2


def test_an_exception_discards_the_step() -> None:
    goals = two(spill=0.5)
    fresh = copy.deepcopy(goals.state_dict())
    with goals.accumulate(last=False):
        call(goals, 5.0)
    with pytest.raises(ZeroDivisionError), goals.accumulate(last=False):
        call(goals, 7.0)
        raise ZeroDivisionError
    assert torch.equal(goals.params, fresh["params"]) and torch.equal(goals.policy_state, fresh["policy_state"])
    assert goals.steps == 0
    call(goals, 2.0)
    assert goals.steps == 1 and goals.anchors()["a"][1] == pytest.approx(2.0)


def test_a_call_that_fails_is_no_part_of_the_step() -> None:
    goals = two()
    goals.begin_micro_batch(last=False)
    call(goals, 5.0)
    with pytest.raises(ValueError, match="samples"):
        goals({"a": torch.full((4,), 9.0), "b": torch.ones(3)})
    goals.begin_micro_batch(last=True)
    call(goals, 4.0)
    goals.end_micro_batch()
    assert goals.steps == 1 and goals.anchors()["a"][1] == pytest.approx(5.0)
    assert goals.history["raw"][0, 0] == pytest.approx(4.5)


def test_an_open_step_is_not_forgotten_in_silence() -> None:
    goals = two()
    with goals.accumulate(last=False):
        call(goals, 5.0)
    with pytest.raises(RuntimeError, match=r"a step of micro-batches is open.*accumulate\(last=True\).*discard\(\)"):
        call(goals)
    with pytest.raises(RuntimeError, match="another step is open"), goals.one_step():
        pass
    goals.eval()
    call(goals, 100.0)  # no part of it
    goals.train()
    goals.discard()
    goals.discard()
    assert goals.part is None
    call(goals)
    assert goals.steps == 1 and goals.anchors()["a"][1] == pytest.approx(1.0)
    with pytest.raises(TypeError, match="last must be True or False, got int"):
        goals.begin_micro_batch(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rest", ["last", "end", "discard"])
def test_a_checkpoint_in_the_middle_is_of_before_the_step(rest: str) -> None:
    """Saving changes nothing in the run; a loaded checkpoint begins with a new step."""
    goals, undisturbed = two(spill=0.5), two(spill=0.5)
    for one in (goals, undisturbed):
        call(one, 2.0)
        with one.accumulate(last=False):
            call(one, 5.0)
    saved = copy.deepcopy(goals.state_dict())
    other = two(spill=0.5)
    with other.accumulate(last=False):
        call(other, 100.0)
    other.load_state_dict(saved)
    assert other.part is None and other.steps == 1 and other.anchors()["a"][1] == pytest.approx(2.0)
    for one in (goals, undisturbed):
        if rest == "last":
            with one.accumulate(last=True):
                call(one, 3.0)
        elif rest == "end":
            one.end_step()
        else:
            one.discard()
    assert_same(goals, undisturbed, 0, 0)
    assert goals.anchors()["a"][1] == pytest.approx(2.0 if rest == "discard" else 5.0)
    call(other, 3.0)
    assert other.steps == 2


def test_a_copy_in_the_middle_goes_on_by_itself() -> None:
    goals = two(spill=0.5)
    with goals.accumulate(last=False):
        call(goals, 5.0)
    other = copy.deepcopy(goals)
    for one, scale in ((goals, 3.0), (other, 7.0)):
        with one.accumulate(last=True):
            call(one, scale)
    assert goals.steps == other.steps == 1
    assert [one.anchors()["a"][1] for one in (goals, other)] == pytest.approx([5.0, 7.0])
    assert [float(one.history["raw"][0, 0]) for one in (goals, other)] == pytest.approx([4.0, 6.0])


def test_a_constraint_that_is_replaced_in_the_middle_stays() -> None:
    goals = GoalSet(a=Calibrated(3), b=Minimize(1.0))
    with goals.accumulate(last=False):
        call(goals)
    goals["b"] = Minimize(4.0)
    with goals.accumulate(last=True):
        call(goals)
    assert goals.anchors()["b"][1] == pytest.approx(4.0)


def test_what_is_kept_is_not_the_caller_s_memory() -> None:
    goals, raw = two(), torch.full((4,), 5.0)
    for last in (False, True):
        with goals.accumulate(last=last):
            goals({"a": raw, "b": torch.ones(4)})
        raw.fill_(3.0)
    assert goals.anchors()["a"][1] == pytest.approx(5.0)


def test_a_batch_level_goal_is_a_mean_over_micro_batches() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0))
    for value, size, last in ((1.0, 6, False), (3.0, 2, True)):
        with goals.accumulate(last=last):
            out = goals({"a": torch.full((size,), 2.0), "b": torch.tensor(value)})
        assert out.bottleneck.tolist() == [0 if value == 1 else 1] * size
    assert goals.history["raw"].tolist() == [[2.0, 1.5]] and goals.history["share"].tolist() == [[0.75, 0.25]]


def test_no_host_sync_in_micro_batches() -> None:
    goals = learning(spill=0.5)
    values = [learnt_from(x) for x in torch.rand(4, 8, 4)]
    with CountSyncs() as counter:
        for i, raw in enumerate(values):
            with goals.accumulate(last=i == 3):
                goals(raw)
        goals.accept(torch.tensor(True))
    assert not counter.seen.keys() - {"_to_copy"} and goals.steps == 1


def test_merged_records_leave_out_goals_without_samples() -> None:
    """A NaN of a finite record has no weight; one of a bad record stays. Weights may differ between goals."""
    size = 3 * 2 + 4 * 2 + 2
    records = torch.arange(3.0)[:, None].expand(3, size).clone()
    parts = record_parts(records, 2, 2)
    parts["finite"].fill_(1)
    parts["level"][1, 0] = torch.nan
    parts["level"][:, 1] = torch.nan
    weights = torch.tensor([1.0, 1.0, 2.0])[:, None].expand(3, size).clone()
    record_parts(weights, 2, 2)["deficit"][0, 1] = 0
    merged, total = merge_records(records, weights, 2, 2, 1)
    found = record_parts(merged, 2, 2)
    assert found["level"].nan_to_num(-1).tolist() == pytest.approx([(0 + 4) / 3, -1])
    assert found["deficit"].tolist() == pytest.approx([5 / 4, 5 / 3]) and found["loss"] == 5 / 4
    assert found["highest"].tolist() == [2, 2] and record_parts(total, 2, 2)["level"].tolist() == [3, 0]
    parts["finite"][1] = 0
    found = record_parts(merge_records(records, weights, 2, 2, 2)[0], 2, 2)
    assert found["level"].isnan().all() and found["finite"] == 0 and found["loss"] == 3


# torch.compile.


class Model(nn.Module):
    def __init__(self, goals: GoalSet, raw: Any) -> None:
        super().__init__()
        self.goals, self.raw = goals, raw

    def forward(self, x: Tensor) -> Tensor:
        return self.goals(self.raw(x)).loss


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("rule", "inside"), [("spill", False), ("spill", True), pytest.param("guard", False, marks=pytest.mark.slow)]
)
def test_compiled_micro_batches_are_eager_ones(rule: str, inside: bool, fresh: None) -> None:
    """Any number of micro-batches, of any size, needs a few graphs: of the first, of those between, of the last."""
    goals = {"max": Calibrated(3), "track": Tracking(halflife=3), "fixed": Anchored(0.0, 1.0)}
    ours, theirs = (GoalSet(goals, **RULES[rule]) for _ in range(2))

    def raw(x: Tensor) -> dict[str, Tensor]:
        return {"max": x[:, 0] ** 2, "track": x[:, 1].abs(), "fixed": x[:, 2] ** 2}

    def step(goals: GoalSet, x: Tensor, last: bool) -> Tensor:
        with goals.accumulate(last=last):
            return goals(raw(x)).loss

    def compiled(model: Any, goals: GoalSet, x: Tensor, last: bool) -> Tensor:
        with goals.accumulate(last=last):
            return model(x)

    model = torch.compile(Model(ours, raw), fullgraph=True, dynamic=True, backend="aot_eager")
    graph = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    made = []
    for k, x in enumerate(batches(8)):
        sizes = ([8] * 4, [4] * 8, [12, 20], [10, 11, 11])[k % 4]
        for i, part in enumerate(x.float().split(sizes)):
            last = i == len(sizes) - 1
            got = graph(ours, part, last) if inside else compiled(model, ours, part, last)
            torch.testing.assert_close(got, step(theirs, part, last), rtol=1e-5, atol=1e-6)
        for goals in (ours, theirs):
            goals.accept(torch.tensor(k != 2))
        made.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert_same(ours, theirs, 1e-4, 1e-6)
    assert ours.steps == 8 and made[-1] == made[2] <= 6, made
    assert not torch._dynamo.utils.counters["graph_break"]


# Closures.


def fit(scope: bool) -> tuple[GoalSet, list[float], int]:
    """Fit a line to two targets, with L-BFGS and spill; return the goals, their final means, and all evaluations."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=source, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64) / 3)
    target = torch.stack([(x[:, 0] * x[:, 1]).tanh(), x[:, 2].sin()], 1)
    goals = GoalSet(a=Anchored(0.0, 0.5), b=Anchored(0.0, 0.5), spill=Spill(0.5, halflife=2)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", max_iter=20)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        errors = (net(x) - target) ** 2
        loss = goals({"a": errors[:, 0], "b": errors[:, 1]}).loss
        loss.backward()
        return loss

    for _ in range(5):
        if scope:
            with goals.one_step():
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    final = ((net(x) - target) ** 2).mean(0).tolist()
    return goals, final, evaluations


def test_a_closure_is_one_step() -> None:
    """Weights that move within a line search spoil it: the final losses are far better if they stand."""
    goals, held, evaluations = fit(True)
    assert goals.steps == len(goals.history) == 5 and evaluations > 50
    moving, free, counted = fit(False)
    assert moving.steps == counted > 50  # without the context each evaluation is a step
    assert max(held) < max(free) / 2 and min(held) < min(free) / 2


def test_evaluations_see_the_weights_of_the_first() -> None:
    """The first evaluation is the step; the others, and what they learn from, leave no trace."""
    goals = GoalSet(a=Calibrated(4), b=Anchored(0.0, 1.0), guard=ShareGuard(0.1, 0.3), spill=0.5)
    single = copy.deepcopy(goals)
    for k in range(5):
        losses = []
        with goals.one_step():
            for scale in (1.0 + k, 50.0, 1.0 + k):
                losses.append(float(call(goals, scale).loss.detach()))
            inside = goals.params.clone(), goals.multipliers.clone()
            call(goals, 70.0)
            assert torch.equal(goals.params, inside[0]) and torch.equal(goals.multipliers, inside[1])
            assert goals.steps == k
        call(single, 1.0 + k)
        assert losses[0] == losses[2] != losses[1]
        for one in (goals, single):
            one.accept(torch.tensor(k != 1))
    assert_same(goals, single, 0, 0)
    assert goals.history["finite"].tolist() == [1, 0, 1, 1, 1]


def test_a_closure_of_micro_batches_is_one_step() -> None:
    goals, single = two(spill=0.5), two(spill=0.5)
    for _ in range(3):
        with goals.one_step():
            for factor in (1.0, 9.0, 4.0):  # evaluations
                for scale, last in ((1.0, False), (2.0, False), (6.0, True)):
                    with goals.accumulate(last=last):
                        call(goals, factor * scale)
        for scale, last in ((1.0, False), (2.0, False), (6.0, True)):
            with single.accumulate(last=last):
                call(single, scale)
    assert_same(goals, single, 0, 0)


def test_a_closure_that_fails_or_is_saved_leaves_nothing() -> None:
    goals = two(spill=0.5)
    with pytest.raises(ZeroDivisionError), goals.one_step():
        call(goals, 5.0)
        raise ZeroDivisionError
    assert goals.steps == 0 and goals.anchors()["a"][1] == pytest.approx(1.0) and goals.part is None
    with goals.one_step():
        first = call(goals, 5.0).loss
        assert copy.deepcopy(goals.state_dict())["params"][0, 1] == 1.0
        assert torch.equal(call(goals, 5.0).loss, first)
    assert goals.steps == 1 and goals.anchors()["a"][1] == pytest.approx(5.0)
    with goals.one_step():
        pass  # no evaluation, no step
    assert goals.steps == 1
