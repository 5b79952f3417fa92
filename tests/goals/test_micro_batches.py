"""Test that micro-batches are one step of the whole batch."""

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
    Minimize,
    StepGuard,
)
from tests.support.goal_sets import EACH_RULE, RULES, every_policy
from tests.support.micro_batches import (
    ANCHORED,
    SIZES,
    anchored,
    assert_same,
    batches,
    call,
    in_parts,
    learning,
    learnt_from,
    raw_of,
    two,
    weights,
)
from tests.support.syncs import CountSyncs


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


def test_a_transform_is_refused() -> None:
    goals = GoalSet(b=Minimize(1.0))
    refused = pytest.raises(RuntimeError, match=r"a step of several calls cannot be taken inside torch\.func")
    with refused, goals.accumulate(last=False):
        torch.func.grad(lambda x: goals({"b": x}).loss)(torch.ones(4))
    assert goals.part is None and goals.steps == 0


def test_a_goal_set_inside_of_another_takes_the_same_steps() -> None:
    goals = two()
    goals.inner = two()
    for last in (False, True):
        with goals.accumulate(last=last):
            call(goals), call(goals.inner)
    with goals.one_step():
        call(goals), call(goals.inner), call(goals), call(goals.inner)
    assert goals.steps == goals.inner.steps == 2 and goals.inner.part is None


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
    ("rule", "inside"),
    [("spill", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("spill", True), ("guard", False)))],
)
def test_compiled_micro_batches_are_eager_ones(rule: str, inside: bool, fresh: None) -> None:
    """Any number of micro-batches, of any size, needs a few graphs: of the first, of those between, of the last."""
    goals = {"max": Calibrated(3), "fixed": Anchored(0.0, 1.0)}
    ours, theirs = (GoalSet(goals, **RULES[rule]) for _ in range(2))

    def raw(x: Tensor) -> dict[str, Tensor]:
        return {"max": x[:, 0] ** 2, "fixed": x[:, 2] ** 2}

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
