"""A `GoalSet` whose steps are of several calls, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Calibrated,
    GoalSet,
    Group,
    Minimize,
    MinimizeHard,
    Policy,
    Tracking,
    Upper,
)

from .goal_sets import RULES

SIZES = pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (5, 11, 16), (32,)], ids=str)
ANCHORED: dict[str, dict[str, Any]] = {
    **{name: rule for name, rule in RULES.items() if name != "budget"},  # each micro-batch draws rows of its own
    "sum": {"reduction": "sum"},
    "smooth, each": {"temperature": 0.1, "reduction": "none"},
    "spill auto": {"spill": "auto"},
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


def call(goals: GoalSet, scale: float = 1.0) -> Any:
    return goals({"a": torch.full((4,), scale, requires_grad=True), "b": torch.full((4,), 2.0)})


def two(**rule: Any) -> GoalSet:
    return GoalSet(a=Calibrated(3), b=Anchored(0.0, 1.0), **rule)
