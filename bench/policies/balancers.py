"""Published balancers of losses: TorchJD's where it has them.

They see the batch's mean deficits by the outside anchors, so that units do not hurt them. `Lookback` and `Soft` are
made for equations, and see the raw losses as in their papers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchjd.scalarization import DWA, FAMO, IMTLL, PBI, STCH, UW

from bench.policies.peers import Rule, deficits, units
from bench.policies.problem import Problem

EPOCH = 20  # steps that `DynamicAverage` averages over: those of an epoch of the digits
LEARNT = 0.025  # learning rate of a balancer's own parameters, as in the code of Nash-MTL


def positive(problem: Problem, d: Tensor) -> Tensor:
    """Return mean deficits, [K], for balancers of positive losses.

    Where some ideal is no bound, so that a batch can be better, deficits are clamped at 0.001.
    """
    return d.mean(0).clamp(min=1e-3 if any(anchor.ideal for anchor in problem.anchors.values()) else 1e-12)


class SmoothTchebycheff(Rule):
    """STCH (Lin et al. 2024)."""

    def __init__(self, mu: float = 0.1) -> None:
        self.mu = mu

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return STCH(self.mu, weights=torch.ones(d.shape[1]))(d.mean(0))


class FastAdaptive(Rule):
    """FAMO (Liu et al. 2023), which needs each loss again after the update."""

    def start(self, problem: Problem) -> None:
        self.famo = FAMO(len(problem.anchors))

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return self.famo(positive(problem, d))

    def after(self, problem: Problem) -> None:
        self.famo.update(positive(problem, deficits(problem, problem.values_after_update())))


class Boundary(Rule):
    """PBI (Zhang & Li 2007) with its penalty of 5, from the ideals."""

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return PBI(theta=5.0, weights=torch.ones(d.shape[1]))(d.mean(0)) / d.shape[1] ** 0.5


class DynamicAverage(Rule):
    """DWA (Liu, Johns & Davison 2019) with temperature 2."""

    def start(self, problem: Problem) -> None:
        self.dwa = DWA()

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return self.dwa(positive(problem, d)) / d.shape[1]

    def after(self, problem: Problem) -> None:
        if problem.step % EPOCH == 0:
            self.dwa.step()


class Learnt(Rule):
    """UW (Kendall, Gal & Cipolla 2018) or IMTL-L (Liu et al. 2021): the weights are learnt with the model.

    Args:
        kind: the scalarizer, whose parameters an Adam of its own trains.
    """

    def __init__(self, kind: type[UW] | type[IMTLL]) -> None:
        self.kind = kind

    def start(self, problem: Problem) -> None:
        self.scalarizer = self.kind(len(problem.anchors))
        self.optimizer = torch.optim.Adam(self.scalarizer.parameters(), lr=LEARNT)

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return self.scalarizer(positive(problem, d)) / d.shape[1]

    def after(self, problem: Problem) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lookback(Rule):
    """ReLoBRaLo (Bischof & Kraus 2021): weights by each loss relative to its first and its last value.

    Args:
        temperature, memory, chance: T, alpha and the expected rho of the paper.
    """

    def __init__(self, temperature: float = 0.1, memory: float = 0.999, chance: float = 0.999) -> None:
        self.temperature, self.memory, self.chance = temperature, memory, chance

    def start(self, problem: Problem) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.weights = torch.ones(len(problem.anchors))
        self.first: Tensor | None = None

    def balanced(self, now: Tensor, then: Tensor) -> Tensor:
        """Return K softmax(now / (T then)), [K]."""
        return len(now) * torch.softmax(now / (self.temperature * then), 0)

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        losses = positive(problem, d) * units(problem)
        now = losses.detach()
        if self.first is None:
            self.first = self.last = now
        kept = float(torch.rand((), generator=self.draw) < self.chance)  # rho: without it, the look goes to the start
        history = kept * self.weights + (1 - kept) * self.balanced(now, self.first)
        self.weights = self.memory * history + (1 - self.memory) * self.balanced(now, self.last)
        self.last = now
        return losses @ self.weights


class Soft(Rule):
    """SoftAdapt (Heydari, Thompson & Mehmood 2019), weighted by the losses: ``f_k exp(beta s_k)``, summing to K.

    s is the slope of the loss by the last 5 steps, and f its mean over them.
    """

    beta, window = 0.1, 5

    def start(self, problem: Problem) -> None:
        self.seen: list[Tensor] = []

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        losses = positive(problem, d) * units(problem)
        self.seen = [*self.seen, losses.detach()][-self.window :]
        recent = torch.stack(self.seen)
        time = torch.arange(len(recent)) - (len(recent) - 1) / 2
        slope = time @ recent / time.square().sum().clamp(min=0.5)
        weights = recent.mean(0) * torch.exp(self.beta * (slope - slope.max()))
        return losses @ (weights * (len(weights) / weights.sum()))
