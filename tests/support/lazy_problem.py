"""A small network with lazy goals, and the comparison of its lazy step with the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bomkern import Minimize, lazy, min_goal_loss

REDUCTIONS = ("mean", "sum", "none", "min")
Wrap = Callable[..., Any]
Make = Callable[[Wrap], list[Any]]


def plain(fn: Callable[..., Tensor], *args: Any) -> Tensor:
    return fn(*args)


def error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def size(a: Tensor) -> Tensor:
    return a.abs().flatten(1).mean(1)


class Problem(nn.Module):
    """An encoder, a decoder that several goals read, and a judge of the decoder's output."""

    def __init__(self, middle: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(5, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 16), middle or nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 5))
        self.judge = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 3))
        self.to(dtype)
        self.x = torch.randn(24, 5, dtype=dtype)

    def goals(self, wrap: Wrap) -> list[Any]:
        z = self.encoder(self.x)
        recon, swap = wrap(self.decoder, z), wrap(self.decoder, z.roll(1, 0))
        judged = wrap(self.judge, recon)
        return [wrap(error, recon, self.x), wrap(error, swap, self.x), wrap(size, judged), z.square().mean(1)]

    def step(self, wrap: Wrap, loss: Callable[[list[Any]], Tensor], goals: Make | None = None) -> list[Tensor]:
        torch.manual_seed(7)
        found = loss((goals or self.goals)(wrap))
        weight = torch.arange(1, found.numel() + 1, dtype=found.dtype).reshape(found.shape)
        grads = torch.autograd.grad((found * weight).sum(), list(self.parameters()), materialize_grads=True)
        return [found.detach(), *grads]


SCALES = [Minimize(1.0), Minimize(1.3), Minimize(0.4), Minimize(0.3)]


def check(
    problem: Problem, loss: Callable[[list[Any]], Tensor], goals: Make | None = None, near: float = 1e-12
) -> None:
    want, got = problem.step(plain, loss, goals), problem.step(lazy, loss, goals)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= near * b.norm() + 1e-300


def of_list(reduction: str = "mean", route: str = "always") -> Callable[[list[Any]], Tensor]:
    return lambda goals: min_goal_loss(goals, SCALES, reduction=reduction, route=route)  # type: ignore[return-value]
