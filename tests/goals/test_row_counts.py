"""Test that a `GoalSet` says on how many samples each number of a step rests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import GoalSet, Group, History, Minimize, Spill
from bomkern.goals import monitor
from bomkern.goals.history import CAPACITY
from bomkern.goals.record import Layout
from bomkern.goals.row_counts import RowCounts
from bomkern.goals.saved import ROOM, names_of, pack, unpack_history
from bomkern.integrations import log_goals
from tests.support.goals import grad_of
from tests.support.graphs import Graphs
from tests.support.row_budget import NAMES, four, rows_of

KNOWN = torch.arange(6) < 2


def three(**options: Any) -> GoalSet:
    return GoalSet(a=Minimize(1.0), g=Group(x=Minimize(2.0), y=Minimize(1.0)), optional=["a"], **options)


def raw_of(batch: int = 6) -> dict[str, Any]:
    return {"a": torch.rand(batch), "g": {"x": torch.rand(batch), "y": torch.tensor(0.5)}}


def test_all_samples_count_without_mask_and_budget() -> None:
    goals = three()
    for batch in (6, 6, 1, 9):
        out = goals(raw_of(batch))
        assert out.rows.dtype == torch.int64 and out.rows.tolist() == out["rows"].tolist() == [batch] * 3
    assert goals.history["rows"].tolist() == [[6.0] * 3, [6.0] * 3, [1.0] * 3, [9.0] * 3]
    with torch.no_grad():
        assert goals(raw_of(4)).rows.tolist() == [4, 4, 4] and len(goals.history) == 4


def test_masked_and_absent_goals_count_what_is_there() -> None:
    goals = three()
    want = []
    for mask, count in ((None, [6, 6, 6]), ({"g.x": KNOWN}, [6, 2, 6]), ({"a": KNOWN, "g": KNOWN}, [2, 2, 2])):
        assert goals(raw_of(), mask=mask).rows.tolist() == count
        want.append(count)
    raw = raw_of()
    del raw["a"]
    assert goals(raw).rows.tolist() == [0, 6, 6]
    assert goals.history["rows"].tolist() == [*want, [0, 6, 6]]


def test_a_budget_counts_the_rows_that_were_taken() -> None:
    goals = four(0.5)
    for mask in (None, {"a": torch.arange(64) < 5, "c": torch.zeros(64, dtype=torch.bool)}):
        goals.multipliers.copy_(torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15)
        raw = {name: torch.rand(64, dtype=torch.float64, requires_grad=True) for name in NAMES}
        out = goals(raw, mask=mask)
        out.loss.backward()
        assert out.rows.tolist() == [int((grad_of(x) != 0).sum()) for x in raw.values()]
    assert goals.history["rows"].tolist() == [[18, 9, 5, 3], [5, 9, 0, 3]]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_counts_of_many_steps_are_in_order(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring is sent to the host before a step overwrites its oldest row."""
    torch._dynamo.reset()
    monkeypatch.setattr(monitor, "ROWS", 8)
    goals, counts = three(), []

    def loss(mask: Tensor) -> Tensor:
        return goals({"a": mask.float(), "g": {"x": mask.float(), "y": mask.float()}}, mask={"a": mask}).loss

    step = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    for k in range(21):
        step(torch.arange(7) < k % 7)
        counts.append([k % 7, 7, 7])
    assert goals.history["rows"].tolist() == counts
    torch._dynamo.reset()


def test_micro_batches_count_together() -> None:
    goals = three()
    for last, mask, count in ((False, None, [6, 6, 6]), (False, {"a": KNOWN}, [8, 12, 12]), (True, None, [14, 18, 18])):
        with goals.accumulate(last=last):
            assert goals(raw_of(), mask=mask).rows.tolist() == count
    with goals.one_step():
        assert [goals(raw_of(5)).rows.tolist() for _ in range(2)] == [[5] * 3] * 2
    assert goals.history["rows"].tolist() == [[14, 18, 18], [5, 5, 5]]


# The history.


def test_rows_of_several_steps_hold_the_mean(tmp_path: Path) -> None:
    layout = Layout(["x", "y"], ["x", "y"], [0, 1], ["Minimize(1)"] * 2)
    records = torch.ones(2 * CAPACITY, layout.size)
    counts = torch.arange(4.0 * CAPACITY).view(-1, 2)
    history = History(layout)
    history.append(layout.counted(records, counts))
    assert history.stride == 4
    assert torch.equal(history["rows"], counts.view(-1, 4, 2).mean(1))
    history.append(layout.counted(records[:1], counts[:1]))
    history.save(tmp_path / "history.pt")
    again = History.load(tmp_path / "history.pt")
    assert torch.equal(again["rows"], history["rows"]) and torch.equal(again._open, history._open)


def test_an_older_history_has_no_counts(tmp_path: Path) -> None:
    goals = three()
    for _ in range(3):
        goals(raw_of())
    goals.history.save(tmp_path / "history.pt")
    state = torch.load(tmp_path / "history.pt", weights_only=True)
    del state["counts"], state["open_counts"]
    torch.save(state, tmp_path / "history.pt")
    again = History.load(tmp_path / "history.pt")
    assert again["rows"].shape == (3, 3) and bool(again["rows"].isnan().all())
    assert torch.equal(again["raw"], goals.history["raw"])


def test_a_state_keeps_the_counts_and_its_size() -> None:
    goals, again = three(), three()
    for k in range(5):
        goals(raw_of(), mask={"a": KNOWN} if k % 2 else None)
    goals.monitor.take()
    goals(raw_of(7))
    state = goals.state_dict()
    again.load_state_dict(state)
    assert again.history["rows"].tolist() == goals.history["rows"].tolist()
    assert again.monitor.take_mean().mean["rows"].tolist() == [7, 7, 7]
    again(raw_of(8))
    assert again.history["rows"][-1].tolist() == [8, 8, 8]

    # The state of an older bomkern, which has no counts, has the same size.
    saved, layout = unpack_history(state["monitor._extra_state"]), goals.layout
    whole = torch.zeros(CAPACITY + ROOM, layout.size)
    whole[: len(saved["rows"])] = saved["rows"]
    head = {"steps": 6, "first": 0, "stride": 1, "rows": 6, "open": [1, 0], "fresh": 1, "tail": True}
    old = pack(names_of(layout), head, 256, whole)
    assert old.shape == state["monitor._extra_state"].shape
    again.load_state_dict({**state, "monitor._extra_state": old})
    assert torch.equal(again.history["raw"], goals.history["raw"]) and bool(again.history["rows"].isnan().all())


def test_counts_are_loaded_by_name() -> None:
    goals = three()
    goals(raw_of(), mask={"a": KNOWN})
    other = GoalSet(new=Minimize(1.0), a=Minimize(1.0))
    other.load_state_dict(goals.state_dict())
    assert other.history["rows"].nan_to_num(-1).tolist() == [[-1, 2]]


def test_the_full_history_of_many_columns_fits() -> None:
    goals = GoalSet(g=Group(**{f"m{k}": Minimize(1.0) for k in range(64)}))
    goals.history.stride = 4
    counts = torch.rand(4 * (CAPACITY - 1) + 3, 64)
    goals.history.append(goals.layout.counted(torch.rand(len(counts), goals.layout.size), counts))
    again = unpack_history(goals.monitor.get_extra_state())
    assert torch.equal(again["counts"], goals.history["rows"]) and torch.equal(again["open_counts"], counts[-3:])


# What the host does not see.


def test_replayed_steps_have_the_samples_of_the_capture() -> None:
    ring = torch.arange(20.0)[:, None]

    def taken(log: RowCounts, *where: Any) -> list[float]:
        return log.take(*where, 1).nan_to_num(-1)[:, 0].tolist()

    log = RowCounts()
    log.note(0, 6), log.note(2, 4)
    assert taken(log, 0, 3, 3, None) == [6, 6, 4]
    log.note(3, 4), log.note_captured(4)
    assert taken(log, 3, 8, 4, None) == [4] * 5  # four of them replayed
    log.note(8, None)
    assert taken(log, 8, 9, 9, ring[8:9]) == [8]
    assert taken(log, 9, 12, 9, None) == [4] * 3
    log.note(12, 5), log.note(13, None)
    assert taken(log, 12, 14, 14, ring[12:14]) == [5, 13]
    log.note(14, 5)
    assert taken(log, 14, 18, 15, None) == [-1] * 4  # some of 5 samples and some of 4
    log.note(18, 5)
    assert taken(log, 18, 19, 19, None) == [5]
    log = RowCounts()
    log.note_captured(None)
    assert log.on_device and taken(log, 0, 3, 0, ring[:3]) == [0, 1, 2]


@pytest.mark.parametrize("masked", [False, True])
def test_a_captured_step_counts(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    goals = three()

    def step() -> None:
        goals(raw_of(), mask={"a": KNOWN} if masked else None)

    with monkeypatch.context() as patch:
        patch.setattr(monitor, "capturing", lambda device: True)
        for _ in range(3):
            step()  # counted on the device, as the replays of a graph are
    assert goals.history["rows"].tolist() == [[2 if masked else 6, 6, 6]] * 3


def test_a_compiled_step_counts() -> None:
    torch._dynamo.reset()
    goals, backend = three(), Graphs(aot=True)

    def loss(x: Tensor, mask: Tensor | None) -> Tensor:
        return goals({"a": x, "g": {"x": x, "y": x}}, mask=None if mask is None else {"a": mask}).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for batch in (6, 8, 9):
        compiled(torch.rand(batch), None)
        compiled(torch.rand(batch), torch.arange(batch) < 2)
    counts = [[[b, b, b], [2, b, b]] for b in (6, 8, 9)]
    assert goals.history["rows"].tolist() == [count for pair in counts for count in pair]
    torch._dynamo.reset()


# What people see.


class Kept:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        self.values = values


def test_the_table_and_the_log_show_the_counts_of_a_budget() -> None:
    goals, logger = four(0.5), Kept()
    assert "rows" in str(goals).splitlines()[1].split()
    rows_of(goals, 64)
    assert [line.split()[-1] for line in str(goals).splitlines()[1:]] == ["rows", "18", "9", "5", "3"]
    log_goals(goals, logger, 1)
    assert [logger.values[f"goals/rows/{name}"] for name in NAMES] == [18, 9, 5, 3]
    goals = GoalSet(a=Minimize(1.0), spill=Spill(0.5))
    goals({"a": torch.rand(6)})
    log_goals(goals, logger, 1)
    assert "rows" not in str(goals) and "goals/rows/a" not in logger.values
