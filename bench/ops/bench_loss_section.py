"""Time the loss section of a nine-goal step: a `GoalSet` with its history against plain PyTorch with checks and logs.

Also count what each costs on a GPU beside the time: launches, and the syncs at which the host waits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine
from bench.harness import BOTH, OURS, Size, about, timed
from bench.loss_section import plain_loss
from bench.machine import DEVICE
from bench.ops.bench_min_goal import ANCHORED, SIZES, raw_values
from bomkern import Anchored, GoalSet

ANCHORS = {f"goal{k}": (c.ideal, c.ideal + c.scale) for k, c in enumerate(ANCHORED)}


@pytest.mark.parametrize("name", [OURS, "eager"])
@pytest.mark.parametrize("size", SIZES[:3], ids=lambda size: f"B{size['B']}")
def test_loss_section(benchmark: Any, size: Size, name: str) -> None:
    raw = dict(zip(ANCHORS, raw_values(**size), strict=True))
    goals = GoalSet({goal: Anchored(*pair) for goal, pair in ANCHORS.items()}).to(DEVICE)
    exact = {goal: x.detach().double().requires_grad_() for goal, x in raw.items()}
    log: dict[str, float] = {}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return goals(values).loss if name == OURS else plain_loss(values, ANCHORS, log)

    def gradients(value: torch.Tensor, values: dict[str, torch.Tensor]) -> Any:
        return torch.autograd.grad(value, list(values.values()), materialize_grads=True)

    want = plain_loss(exact, ANCHORS, {})
    got = loss(raw)
    assert torch.allclose(got.double(), want, rtol=1e-5)
    for a, b in zip(gradients(got, raw), gradients(want, exact), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4)

    def step() -> None:
        gradients(loss(raw), raw)

    about(benchmark, "goal_set", "loss section", BOTH, name, size)
    benchmark.extra_info.update(machine.counted(step))
    timed(benchmark, [step])
