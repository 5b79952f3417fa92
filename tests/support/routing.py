"""A network of four branches, losses of their goals, and the comparison of routed gradients with plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import GoalSet, Group, Minimize, min_goal_loss
from bomkern.common.reductions import REDUCTIONS
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("min_goal"))
SET_IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
NAMES = ("a", "b", "c", "d")
Goals = Callable[[Sequence[Tensor]], Tensor]


class Branches(nn.Module):
    """A trunk with four heads.

    Goal k is large if ``level[k]`` is. The last goal is 0-dim.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.trunk = nn.Linear(3, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4))
        for p in self.parameters():
            p.data = torch.rand(p.shape, generator=source) * 0.3
        self.to(dtype)

    def forward(self, x: Tensor, level: Sequence[float] = (1.0, 1.0, 0.0, 0.0)) -> list[Tensor]:
        h = torch.tanh(self.trunk(x))
        raw = [high + head(h)[:, 0].square() for head, high in zip(self.heads, level, strict=True)]
        return [*raw[:3], raw[3].mean()]


def samples(batch: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def plain_goals(server: tuple[str, str], reduction: str = "mean", **how: Any) -> Goals:
    return lambda raw: min_goal_loss(list(raw), Minimize(1.0), reduction=reduction, impl=server[0], **how)


def named_goals(server: tuple[str, str], reduction: str = "mean", **how: Any) -> Goals:
    goals = GoalSet({n: Minimize(1.0) for n in NAMES}, reduction=reduction, impl=server[0], **how).to(server[1])
    return lambda raw: goals(dict(zip(NAMES, raw, strict=True))).loss


def grouped_goals(server: tuple[str, str], reduction: str = "mean", **how: Any) -> Goals:
    """Return a GoalSet with a and b in one group, c and the 0-dim d in another."""
    goals = GoalSet(
        p=Group(a=Minimize(1.0), b=Minimize(1.0)),
        q=Group(c=Minimize(1.0), d=Minimize(1.0)),
        reduction=reduction,
        impl=server[0],
        **how,
    ).to(server[1])
    return lambda raw: goals({"p": {"a": raw[0], "b": raw[1]}, "q": {"c": raw[2], "d": raw[3]}}).loss


ALL = (plain_goals, named_goals, grouped_goals)
EACH_WAY = pytest.mark.parametrize("make", ALL, ids=[make.__name__ for make in ALL])


def gradients(goals: Goals, net: Branches, x: Tensor, bend: Any = None, **how: Any) -> list[Tensor | None]:
    """Return the gradient of every parameter."""
    net.zero_grad()
    raw = net(x, **how)
    loss = goals(raw if bend is None else bend(raw))
    loss.backward(torch.linspace(1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape))
    return [p.grad for p in net.parameters()]


def check_same(routed: Sequence[Tensor | None], plain: Sequence[Tensor | None], undefined: int) -> None:
    """Check that the gradients are bitwise equal.

    ``undefined`` of the routed ones are None, where the plain ones are zero.
    """
    assert all(g is not None for g in plain)
    assert sum(g is None for g in routed) == undefined
    for ours, theirs in zip(routed, plain, strict=True):
        assert theirs is not None
        if ours is None:
            assert not theirs.any()
        else:
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
