"""Alternatives to bomkern's rules: weighted sums, and rules of this study's own, on the outside anchors.

Weights of deficits sum to 1, or would if all goals had the same, as in a `GoalSet`: SGD's rate means the same to all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.policies.problem import Problem
from bench.policies.rules import Arm

SUMS = 30  # random weightings from which the tuned sum is chosen


# Weights of raw losses from the literature, 1 where nothing is said.
LITERATURE: dict[str, dict[str, float]] = {
    "helmholtz": {"boundary": 100.0},  # 100 is usual for conditions: Wight & Zhao 2020
    "burgers": {"initial": 100.0, "boundary": 100.0},
    "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},  # Bardes, Ponce & LeCun 2022
}


def deficits(problem: Problem, raw: Mapping[str, Tensor]) -> Tensor:
    """Return the outside deficits, [B, K]; a batch's value counts for every row, and B is 1 if all are a batch's."""
    each = [raw[name] for name in problem.anchors]
    values = torch.stack(torch.broadcast_tensors(*each), -1).reshape(-1, len(each))
    return (values - _ideals(problem)) / units(problem)


def _ideals(problem: Problem) -> Tensor:
    return torch.tensor([a.ideal for a in problem.anchors.values()])


def units(problem: Problem) -> Tensor:
    """Return the raw value of a deficit of 1 above the ideal, [K]."""
    return torch.tensor([a.nadir - a.ideal for a in problem.anchors.values()])


def drawn(number: int, count: int) -> Tensor:
    """Return random weighting ``number``, [count], log-uniform between 0.1 and 10."""
    return 10 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(number)) - 1)


class Rule(Arm):
    """An arm with a loss of the deficits; the shares are the loss's derivatives with respect to them."""

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        """Return the 0-dim loss of the deficits ``d``, [B, K]."""
        raise NotImplementedError

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        d = deficits(problem, raw)
        leaf = d.detach().requires_grad_(True)
        self.loss(problem, leaf).backward()
        d.backward(leaf.grad)
        pull = leaf.grad.abs().sum(0)
        return pull / pull.sum().clamp(min=1e-12)


class Weighted(Arm):
    """The weighted mean ``sum_k w_k mean_b d_bk / sum_k w_k``; ``weights=None`` weighs all goals equally."""

    def __init__(self, weights: Tensor | None = None) -> None:
        self.weights = weights

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        means = deficits(problem, raw).mean(0)
        weights = torch.ones(len(means)) if self.weights is None else self.weights
        share = weights / weights.sum()
        (means @ share).backward()
        return share


class Raw(Weighted):
    """A weighted mean of raw losses in their own units.

    Args:
        family: the problem whose weights of `LITERATURE` are taken; None for equal weights.
    """

    def __init__(self, family: str | None = None) -> None:
        self.named = LITERATURE[family] if family is not None else {}

    def start(self, problem: Problem) -> None:
        self.weights = units(problem) * torch.tensor([self.named.get(name, 1.0) for name in problem.anchors])


class Half(Rule):
    """The hard minimum over a random half of the goals, at least one, drawn for every sample."""

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        kept = torch.rand(d.shape) < 0.5
        kept[torch.arange(len(d)), torch.randint(d.shape[1], (len(d),))] = True
        return torch.where(kept, d, -torch.inf).max(1).values.mean()


class BestIdeals(Rule):
    """The hard minimum with ideals a tenth of a scale below the best validation value so far, updated 20 times."""

    def start(self, problem: Problem) -> None:
        self.ideal = torch.full((len(problem.anchors),), torch.inf)
        self.look(problem)

    def look(self, problem: Problem) -> None:
        """Lower the ideals to a tenth of a scale below the current validation values."""
        with torch.no_grad():
            raw, _ = problem.forward(problem.images("validation"), torch.Generator().manual_seed(7))
            self.ideal = torch.minimum(self.ideal, deficits(problem, raw).mean(0) - 0.1)

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return ((d - self.ideal) / (1 - self.ideal).clamp(min=0.1)).max(1).values.mean()

    def after(self, problem: Problem) -> None:
        if problem.step % max(1, problem.steps // 20) == 0:
            self.look(problem)


class Multipliers(Rule):
    """Multipliers by mirror ascent with forgetting: ``sum_k softmax_k(m / mu) mean_b d_bk``.

    m is the moving average of the batch's mean deficits.
    """

    def __init__(self, mu: float = 0.1, weight: float = 0.1) -> None:
        self.mu, self.weight, self.average = mu, weight, None

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        mean = d.detach().mean(0)
        self.average = mean if self.average is None else self.average.lerp(mean, self.weight)
        return d.mean(0) @ torch.softmax(self.average / self.mu, 0)
