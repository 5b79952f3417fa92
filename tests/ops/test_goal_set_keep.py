"""Test the state that a step of `goal_set` stores: the ring of records, and the goals' weights under spill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bomkern import Anchored, GoalSet, Minimize
from bomkern.dispatch import select
from bomkern.dispatch.select import keeper
from bomkern.goals import monitor
from bomkern.reference import goal_set_keep
from tests.support.servers import COMPILED, servers
from tests.support.syncs import CountSyncs

IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
RATE = 0.25


class State:
    """The buffers of a monitor and of spill, and one step into them."""

    def __init__(
        self, goals: int, size: int = 7, rows: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ):
        self.ring = torch.full((rows, size), torch.nan, dtype=dtype, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.by_order = (0.5 ** torch.arange(goals, dtype=dtype, device=device)) if goals else None
        self.spill = [torch.zeros(goals, dtype=dtype, device=device) for _ in range(4)] if goals else []

    def keep(self, impl: str | None, record: Tensor, deficit: Tensor | None) -> None:
        serve = keeper(self.ring.device.type, impl)
        serve(record, self.ring, self.place, deficit, self.by_order, RATE, self.spill)

    def everything(self) -> list[Tensor]:
        return [self.ring, self.place, *self.spill]


def steps_of(count: int, goals: int, dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    source = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        deficit = torch.randn(goals, generator=source, dtype=torch.float64)
        deficit[1::3] = 0.5  # a tie
        if goals > 4:
            deficit[4], deficit[3] = torch.nan, torch.inf
        record = torch.randn(7, generator=source, dtype=torch.float64)
        made.append((record.to(dtype), deficit.to(dtype) if goals else None))
    return made


@IMPLS
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
@pytest.mark.parametrize("goals", [0, 1, 2, 9, 64])
def test_like_the_reference(server: tuple[str, str], goals: int, given: torch.dtype, kept: torch.dtype) -> None:
    impl, device = server
    ours, theirs = State(goals, dtype=kept, device=device), State(goals, dtype=kept)
    for record, deficit in steps_of(8, goals, given):
        ours.keep(impl, record.to(device), None if deficit is None else deficit.to(device))
        theirs.keep("reference", record, deficit)
        for a, b in zip(ours.everything(), theirs.everything(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert int(ours.place) == 8 and ours.ring.isfinite().all()


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=1, max_size=20))
def test_weights_follow_the_ranks_and_the_first_of_equals_is_worse(deficits: list[float]) -> None:
    state = State(len(deficits))
    state.keep(None, torch.zeros(7), torch.tensor(deficits))
    order = sorted(range(len(deficits)), key=lambda g: (-deficits[g], g))
    assert state.spill[1][order].tolist() == state.by_order.tolist()  # type: ignore[union-attr]


@IMPLS
def test_no_host_sync(server: tuple[str, str]) -> None:
    impl, device = server
    state = State(5, device=device)
    with CountSyncs() as counter:
        state.keep(impl, torch.rand(7, device=device), torch.rand(5, device=device))
    assert not counter.seen.keys() - {"_to_copy"}


@COMPILED
@pytest.mark.parametrize("goals", [0, 3])
def test_opcheck(goals: int) -> None:
    state = State(goals)
    deficit = torch.rand(goals) if goals else None
    given = (torch.rand(7), state.ring.zero_(), state.place, deficit, state.by_order, RATE, state.spill)
    torch.library.opcheck(torch.ops.bomkern.goal_set_keep.default, given)


@COMPILED
def test_a_change_is_noticed_by_autograd() -> None:
    state = State(3)
    weights = torch.rand(3, requires_grad=True)
    product = weights * state.spill[1]
    state.keep("cpu", torch.rand(7), torch.rand(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "record's dtype": ({"record": torch.ones(7, dtype=torch.float16)}, TypeError, "record must be float32 or float64"),
    "record's shape": ({"record": torch.ones(1, 7)}, ValueError, "record must be contiguous with one dimension"),
    "ring's width": ({"record": torch.ones(6)}, ValueError, r"ring must have shape \[rows, 6\], got \[3, 7\]"),
    "ring's dtype": ({"ring": torch.ones(3, 7, dtype=torch.int64)}, TypeError, "ring must be float32 or float64"),
    "place": ({"place": torch.zeros(1)}, TypeError, "place must be int64"),
    "two places": ({"place": torch.zeros(2, dtype=torch.int64)}, ValueError, "place must be one number"),
    "no deficit": ({"deficit": None}, ValueError, "deficit and by_order must be given with spill"),
    "one buffer": ({"spill": [torch.zeros(3)]}, ValueError, "spill must hold no tensor or four, got 1"),
    "deficit's dtype": ({"deficit": torch.ones(3, dtype=torch.float64)}, TypeError, "deficit must be .* as the record"),
    "weights": ({"by_order": torch.ones(2)}, ValueError, r"by_order must have shape \[3\], got \[2\]"),
    "a buffer's size": ({"spill": [torch.zeros(3)] * 3 + [torch.zeros(4)]}, ValueError, "multipliers_before must have"),
    "too many": ({"deficit": torch.ones(65)}, ValueError, "deficit must have at most 64 goals, got 65"),
}


@COMPILED
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    changed, error, message = BAD[what]
    state = State(3)
    usual = {"record": torch.ones(7), "ring": state.ring, "place": state.place, "deficit": torch.ones(3)}
    usual |= {"by_order": state.by_order, "rate": RATE, "spill": state.spill}
    with pytest.raises(error, match=message):
        torch.ops.bomkern.goal_set_keep(*{**usual, **changed}.values())
    assert state.ring.isnan().all() and int(state.place) == 0


@COMPILED
def test_a_place_that_nobody_set_stays_in_the_ring() -> None:
    """A position in uninitialised memory, as after `to_empty`, does not lead to writes outside of the ring."""
    state = State(0)
    for anything in (-1, -(2**63), 2**63 - 1):
        state.place.fill_(anything)
        state.keep("cpu", torch.ones(7), None)
    assert state.ring.nan_to_num(0.0).sum() > 0


# The monitor that uses the op.


def values(seed: float) -> dict[str, Tensor]:
    return {"a": torch.full((4,), seed), "b": torch.full((4,), 0.5)}


def test_steps_that_the_host_did_not_see_are_in_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps counted only by the device, as after the replay of a CUDA graph, appear in the history."""
    monkeypatch.setattr(monitor, "ROWS", 8)
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0))
    goals(values(1.0))
    kept = goals.monitor
    seen = goals(values(0.0))
    for k in range(3):
        seen.record[0] = k  # the first goal's share
        goal_set_keep(seen.record, kept.ring, kept.place, None, None, 0.0, ())
    assert goals.steps == 2  # the host has not read the device's count yet
    assert goals.history["share"][:, 0].tolist() == [1, 0, 0, 1, 2] and goals.steps == 5
    goals(values(1.0))
    assert len(goals.history) == goals.steps == 6
    for _ in range(20):  # the ring keeps the last of more records than it holds
        goal_set_keep(seen.record, kept.ring, kept.place, None, None, 0.0, ())
    assert len(goals.history) == 6 + 8 and goals.steps == 26
    assert len(goals.monitor.take()) == 14


def test_what_is_captured_has_not_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a capture, the host counts no step and asks no device whether a step was rejected."""
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=0.5)
    goals(values(1.0))
    ring, place = goals.monitor.ring.clone(), goals.monitor.place.clone()
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "capturing", lambda device: True)
        for _ in range(3):
            goals(values(2.0))
            with CountSyncs() as counter:
                goals.accept(torch.tensor(False))
            assert not counter.seen
    goals.monitor.ring.copy_(ring), goals.monitor.place.copy_(place)  # a capture leaves them unchanged
    assert goals.steps == 1 and goals.history["raw"][:, 0].tolist() == [1]
    goals(values(3.0))
    assert goals.history["raw"][:, 0].tolist() == [1, 3]


def test_a_compiled_step_that_is_captured_has_not_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled graph's stand-in for the host checks for a capture, as `Monitor.add` does."""
    monkeypatch.setattr(monitor, "ROWS", 2)
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0))
    step = torch.compile(lambda raw: goals(raw).loss, backend="aot_eager")
    step(values(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "capturing", lambda device: True)
        patch.setattr(monitor, "HostCopy", None)  # nothing is copied to the host
        for _ in range(5):
            step(values(2.0))
    assert goals.monitor._count.known == 1


@pytest.mark.parametrize("read_at", [(), (1, 7), (8,), (3, 8, 9, 17)])
def test_every_step_is_in_the_history_once(read_at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "ROWS", 8)
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0))
    for step in range(1, 30):
        goals(values(float(step)))
        if step in read_at:
            assert len(goals.history) == step
    assert goals.history["raw"][:, 0].tolist() == list(range(1, 30)) and goals.steps == 29


def test_spill_is_taken_back_once() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), spill=0.5)
    goals(values(1.0))
    kept = goals.average.clone()
    goals(values(5.0))
    moved = goals.average.clone()
    goals.accept(torch.tensor(True))
    goals.accept(torch.tensor(False))  # rejects no step, because the last one was accepted
    assert torch.equal(goals.average, moved) and not torch.equal(moved, kept)
    goals(values(9.0))
    goals.accept(torch.tensor(False))
    assert torch.equal(goals.average, moved)


def test_what_serves_it() -> None:
    assert keeper("cpu", "reference") is goal_set_keep and keeper("meta", None) is goal_set_keep
    if select.extension is not None:
        assert keeper("cpu", None) is keeper("cpu", "cpu") is torch.ops.bomkern.goal_set_keep.default
