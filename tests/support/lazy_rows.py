"""Rows, a rival that owns some of them, and the comparison of lazy goals with plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bomkern import Minimize, lazy, min_goal_loss
from tests.support.lazy_problem import plain

DOUBLE = torch.float64
ONE = Minimize(1.0)
Net = nn.Module


def rows(batch: int = 16, width: int = 4) -> Tensor:
    return torch.randn(batch, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(batch))


def rivals(batch: int = 16, high: float = 3.0) -> Tensor:
    """Return a goal that owns some of the rows, but not the first of them."""
    return torch.linspace(high, 0, batch, dtype=DOUBLE)


def linear(width: int = 4) -> Net:
    torch.manual_seed(0)
    return nn.Linear(width, width).double()


def check(goals: Any, leaves: Any, steps: int = 3, route: str = "always") -> None:
    """Check that ``goals(wrap)`` have the same gradient and generator state, lazily and plainly."""
    leaves = list(leaves)
    for step in range(steps):
        found = []
        for wrap in (plain, lazy):
            torch.manual_seed(step)
            loss = min_goal_loss(goals(wrap), ONE, route=route)
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            found.append((loss.detach(), torch.rand(3), *grads))  # type: ignore[union-attr]
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)
        assert any(g.any() for g in grads)


def step_alone(fn: Any, *args: Any, route: str = "always") -> Tensor:
    """Return the loss of one lazy goal and a rival that owns some of its rows."""
    return min_goal_loss([lazy(fn, *args), rivals(len(args[0]))], ONE, route=route)  # type: ignore[return-value]
