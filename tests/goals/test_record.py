"""Test the layout of a step's record."""

from __future__ import annotations

import pytest
import torch

from bomkern import GoalSet, Group, Minimize
from bomkern.reference import RecordAt, record_parts
from tests.support.processes import ROOT

SIZES = pytest.mark.parametrize(("goals", "columns"), [(1, 1), (2, 5), (9, 9), (64, 64)])


@SIZES
def test_the_offsets_are_where_the_parts_begin(goals: int, columns: int) -> None:
    at = RecordAt.of(goals, columns)
    parts = record_parts(torch.arange(at.size), goals, columns)
    assert list(parts) == list(RecordAt._fields)
    assert {name: part.reshape(-1)[0].item() for name, part in parts.items()} == at._asdict()
    assert sum(part.numel() for part in parts.values()) == at.size == 3 * goals + 4 * columns + 2


def test_a_layout_has_the_offsets_of_its_goals() -> None:
    layout = GoalSet(a=Minimize(1.0), b=Group(x=Minimize(1.0), y=Minimize(2.0))).layout
    assert layout.at == RecordAt.of(2, 3) and layout.size == layout.at.size
    records = torch.arange(2.0 * layout.size).view(2, -1)
    assert torch.equal(layout.parts(records)["finite"], records[:, layout.at.finite])


def test_the_parts_have_the_order_that_the_kernels_know() -> None:
    text = (ROOT / "kernels/goal_set/goal_set.h").read_text()
    fields = text.split("struct RecordAt {", 1)[1].split(";", 1)[0]
    assert fields.split("int ", 1)[1].replace(" = 0", "").split(", ") == list(RecordAt._fields)
