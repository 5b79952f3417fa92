"""Test that no step of a `GoalSet` makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import (
    GoalSet,
    MinimizeHard,
    Tracking,
)
from bomkern.dispatch import select
from bomkern.dispatch.schemas import OPS
from bomkern.goals import monitor, policies
from tests.support.goal_sets import EACH_RULE, RULES, every_policy
from tests.support.servers import COMPILED
from tests.support.syncs import CountSyncs


def values(device: str) -> dict[str, Any]:
    def raw() -> Tensor:
        return torch.rand(8, device=device, requires_grad=True)

    return {**{n: raw() for n in ("max", "quantile", "hard", "tracking", "moving")}, "both": {"a": raw(), "b": raw()}}


def step(goals: GoalSet, raw: dict[str, Any], ok: Tensor) -> None:
    out = goals(raw)
    out.loss.sum().backward()
    goals.accept(ok & out.finite)
    _ = out.share, out.level, out["scale"]
    goals.remeasure({"moving": (raw["moving"].detach(), raw["moving"].detach() + 1)})
    goals.temperature.mul_(0.9)
    goals["hard"] = MinimizeHard(0.5)


@EACH_RULE
def test_no_host_sync_in_a_step(rule: str) -> None:
    goals, raw, ok = every_policy(**RULES[rule]), values("cpu"), torch.tensor(True)
    with CountSyncs() as counter:
        for _ in range(6):  # to the end of the calibration
            step(goals, raw, ok)
    assert not counter.seen.keys() - {"_to_copy"}  # copies of numbers to the goals' device, which is the host here
    assert goals.steps == 6


class Arrives:
    """Replace the copies of the ring and of its position, which a GPU makes without waiting."""

    monitor: Any

    def __init__(self, source: Tensor) -> None:
        self.host = torch.zeros(source.shape)
        if source.dtype is torch.int64:  # the position, which is the number of records so far
            self.host += self.monitor._count.known

    def wait(self) -> Tensor:
        return self.host


def steps_without_values(monkeypatch: pytest.MonkeyPatch, served: str, **rule: Any) -> GoalSet:
    """Take steps past the ring's end on a device whose tensors have no values.

    Any op that reads or copies a value raises there.
    """
    monkeypatch.setattr(monitor, "ROWS", 4)
    monkeypatch.setattr(monitor, "HostCopy", Arrives)
    if served == "compiled":  # the compiled op's schema, autograd and fake kernel
        monkeypatch.setattr(select, "resolve", lambda op, device, impl: select.compiled(OPS[op]))
    goals = every_policy(**rule).to("meta")
    monkeypatch.setattr(Arrives, "monitor", goals.monitor, raising=False)
    raw, ok = values("meta"), torch.ones((), dtype=torch.bool, device="meta")
    for _ in range(10):  # to the end of the calibration
        step(goals, raw, ok)
    return goals


SERVED = pytest.mark.parametrize("served", ["reference", pytest.param("compiled", marks=[COMPILED])])


@SERVED
@EACH_RULE
def test_nothing_depends_on_values(monkeypatch: pytest.MonkeyPatch, rule: str, served: str) -> None:
    goals = steps_without_values(monkeypatch, served, **RULES[rule])
    assert goals.steps == 10 and len(goals.history) == 10


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.amax().item(),
    "float": lambda x: float(x.amax()),
    "tolist": lambda x: x.tolist(),
    "if": lambda x: 1 if x.amax() > 0 else 0,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(x.shape).copy_(x),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("read", READS)
def test_a_policy_that_reads_is_found(monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    def update(self: Tracking, raw: Tensor, *rest: Any) -> Any:
        READS[read](raw)
        return policies.Found

    monkeypatch.setattr(Tracking, "update", update)
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps_without_values(monkeypatch, "reference")


def test_the_copy_of_the_ring_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real copy raises at the end of the ring, and no step raises before."""
    real = monitor.HostCopy
    monkeypatch.setattr(Arrives, "__new__", lambda cls, rows: real(rows))
    with pytest.raises(NotImplementedError, match="meta"):
        steps_without_values(monkeypatch, "reference")


def test_the_history_is_copied_once_in_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy goes to pinned memory behind an event. The next copy waits for that event."""
    made = []
    copy = monitor.HostCopy
    monkeypatch.setattr(monitor, "HostCopy", lambda rows: made.append(len(rows)) or copy(rows))
    goals, raw = every_policy(), values("cpu")
    for _ in range(2 * monitor.ROWS + 1):
        goals(raw)
    assert made == [monitor.ROWS, 1] * 2  # the rows and the position
