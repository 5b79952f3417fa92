"""Time min_goal_loss, forward and backward, against eager PyTorch and torch.compile; and the host's time in one call.

The peers are a user's code: scores, stack, min, log, mean. Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import (
    BOTH,
    FORWARD,
    OURS,
    Case,
    Function,
    Inputs,
    Size,
    about,
    in_turn,
    measure,
    sizes_and,
    sizes_at,
    timed,
    traffic,
)
from bench.machine import DEVICE
from bench.regimes import GOALS, goals
from bench.report.write import SHOWN
from bomkern import Box, BoxAsymmetric, Constraint, Lower, Minimize, MinimizeHard, Upper, min_goal_loss

K = 9
SIZES = [{"K": K, "B": batch} for batch in (64, 512, 8192, *((65536,) if DEVICE == "cuda" else ()), 1_048_576)]

# The parameters have few bits, so that goals can tie exactly.
ANCHORED = tuple(Minimize(scale=2.0 ** (k % 4 - 3), ideal=k / 128) for k in range(K))
MIXED = (
    *(Minimize(0.5), Minimize(0.5, ideal=0.125), MinimizeHard(0.5), MinimizeHard(0.9)),
    *(Upper(0.5, 0.25), Lower(0.375, 0.25), Box(-0.3, 1.4), Box(-0.5, 1.2, tail=0.1), BoxAsymmetric(-0.2, 0.4, 1.3)),
)


def score(x: Tensor, constraint: Constraint) -> Tensor:
    """Compute a score in plain PyTorch."""
    c = constraint
    if isinstance(c, Minimize):
        return torch.exp(-(x - c.ideal) / c.scale)
    if isinstance(c, MinimizeHard):
        return 1 / (1 + (x / c.scale) ** 2)
    if isinstance(c, Upper):
        return torch.exp(-torch.relu(x - c.limit) / c.margin)
    if isinstance(c, Lower):
        return torch.exp(-torch.relu(c.limit - x) / c.margin)
    healthy = c.healthy if isinstance(c, BoxAsymmetric) else (c.lower + c.upper) / 2
    r = torch.where(x >= healthy, (x - healthy) / (c.upper - healthy), (healthy - x) / (healthy - c.lower))
    return torch.where(r <= 1 - c.tail, 1 - r, c.tail * torch.exp(-(r - 1 + c.tail) / c.tail))


def raw_values(K: int, B: int) -> Inputs:
    """Return raw values well inside the boxes, where the plain peers are right too."""
    return goals("uniform", ANCHORED[:K], B)


def plain(constraints: Sequence[Constraint]) -> Function:
    def loss(*raw: Tensor) -> Tensor:
        scores = torch.stack([score(x, c) for x, c in zip(raw, constraints, strict=True)], dim=1)
        return -torch.log(scores.min(dim=1).values).mean()

    return loss


def ours(constraints: Sequence[Constraint]) -> Function:
    return lambda *raw, impl=None: min_goal_loss(raw, constraints, route="never", impl=impl)


TRAFFIC = traffic(1, backward=1.0)  # forward reads K x B values, backward writes as many


def case(label: str, constraints: Sequence[Constraint]) -> Case:
    def make(regime: str, K: int, B: int) -> Inputs:
        return goals(regime, constraints, B)

    op, written = ours(constraints), plain(constraints)
    return Case("min_goal", make, op, written, torch.Tensor.mean, TRAFFIC, label=label, regimes=GOALS)


CASES = {"anchored": case("anchored", ANCHORED), "all six constraints": case("all six constraints", MIXED)}


def with_batch_level_goal(regime: str, K: int, B: int) -> Inputs:
    """Return inputs whose first goal has one value for all samples: its gradient is a sum over them."""
    first, *others = goals(regime, ANCHORED[:K], B)
    return first.detach()[0].clone().requires_grad_(), *others


def plain_of_the_batch(first: Tensor, *others: Tensor) -> Tensor:
    return plain(ANCHORED)(first.expand_as(others[0]), *others)


BATCH_LEVEL = Case(
    "min_goal", with_batch_level_goal, ours(ANCHORED), plain_of_the_batch, torch.Tensor.mean, TRAFFIC,
    label="a batch-level goal",
)  # fmt: skip


@sizes_and(SIZES, regimes=GOALS, at=SHOWN["min_goal anchored"])
@pytest.mark.parametrize("kind", CASES)
def test_peers(benchmark: Any, kind: str, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASES[kind], name, size, direction, regime)


@sizes_at(SIZES, SHOWN["min_goal anchored"])
@pytest.mark.parametrize("kind", CASES)
def test_regimes_in_turn(benchmark: Any, kind: str, size: Size) -> None:
    in_turn(benchmark, CASES[kind], size)


@sizes_and(SIZES[2:], OURS, "eager", directions=(BOTH, FORWARD))
def test_a_batch_level_goal(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, BATCH_LEVEL, name, size, direction, regime)


@pytest.mark.parametrize("name", [OURS, "torch.exp"])
def test_host_time_of_one_call(benchmark: Any, name: str) -> None:
    """Time one forward call at B = 64 on a [64, 9] tensor, beside torch.exp on the same tensor."""
    x = torch.rand(64, K, device=DEVICE).requires_grad_()
    about(benchmark, "min_goal", "host time of min_goal_loss", FORWARD, name, SIZES[0])
    timed(benchmark, [(lambda: min_goal_loss(x, ANCHORED)) if name == OURS else (lambda: torch.exp(x))])
