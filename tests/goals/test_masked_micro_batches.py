"""Test steps of micro-batches in which goals are absent, and how their records are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bomkern import (
    ShareGuard,
)
from bomkern.goals.record import merge_records
from bomkern.reference import record_parts
from tests.support.micro_batches import (
    SIZES,
    anchored,
    assert_same,
    batches,
    learning,
    learnt_from,
    raw_of,
    weights,
)


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


MASKED: dict[str, dict[str, Any]] = {
    "hard": {},
    "smooth": {"temperature": 0.1},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "global": {"reduction": "min"},
    "guard": {"guard": ShareGuard(0.1, 0.3)},
}


@SIZES
@pytest.mark.parametrize("rule", MASKED)
def test_masked_micro_batches_are_one_step(rule: str, sizes: tuple[int, ...]) -> None:
    """Goals count by the samples that have them, absent goals not at all, in some micro-batches or in all of a step."""
    ours, whole = (anchored(**MASKED[rule], optional=["b"]) for _ in range(2))
    chosen = torch.Generator().manual_seed(2)
    for step, x in enumerate(batches(4)):
        w, v = weights(), weights()
        known = torch.rand(3, 32, generator=chosen) > 0.4
        known[:, 5] = False  # a sample without a goal
        known[1] &= torch.tensor(step != 1)
        masks = {"a": known[0], "b": known[1], "c": {"x": known[2], "y": known[2]}}
        some = known.any(0)
        start = 0
        for i, size in enumerate(sizes):
            rows = slice(start, start + size)
            start += size
            part = {n: {m: k[rows] for m, k in one.items()} if n == "c" else one[rows] for n, one in masks.items()}
            raw = raw_of(w, x[rows])
            if step == 1 and i % 2:
                del raw["b"], part["b"]
            with ours.accumulate(last=start == 32):
                out = ours(raw, mask=part)
                if rule == "sum":
                    out.loss.backward()
                elif rule == "each":
                    (out.loss.sum() / 32).backward()
                else:
                    (out.loss * some[rows].sum() / some.sum()).backward()
        expected = whole(raw_of(v, x), mask=masks)
        (expected.loss.mean() if rule == "each" else expected.loss).backward()
        if rule != "global":
            torch.testing.assert_close(w.grad, v.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(out.record, expected.record, rtol=1e-6, atol=1e-9, equal_nan=True)
        assert bool(out.level[1].isnan()) is (step == 1)
    assert_same(ours, whole)


def test_policies_learn_from_what_is_present() -> None:
    """A masked value teaches nothing, and a policy whose goal a step lacks stays as it is."""
    ours, whole = (learning(guard=ShareGuard(0.1, 0.3), optional=["max"]) for _ in range(2))
    for step, x in enumerate(batches(5)):
        known = torch.rand(32, generator=torch.Generator().manual_seed(step)) > 0.5
        known[:8] = True
        for i, part in enumerate(x.split(8)):
            raw = learnt_from(part)
            mask = None if i == 0 else {"track": known[8 * i : 8 * i + 8]}
            if step == 2:
                del raw["max"]
            with ours.accumulate(last=i == 3):
                ours(raw, mask=mask)
        raw = learnt_from(x)
        if step == 2:
            del raw["max"]
        whole(raw, mask={"track": known})
        assert torch.equal(ours.policy_state, whole.policy_state)
        torch.testing.assert_close(ours.history["raw"], whole.history["raw"], equal_nan=True)
