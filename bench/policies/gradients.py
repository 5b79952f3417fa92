"""Peers that look at the gradient of every goal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchjd.aggregation import Aggregator
from torchjd.autojac import backward, jac_to_grad

from bench.policies.peers import Rule, deficits, units
from bench.policies.problem import Problem
from bench.policies.rules import Arm
from bench.policies.vae import VAE


def norm(loss: Tensor, at: list[Tensor]) -> Tensor:
    """Return the norm of the gradient of a loss at the tensors ``at``."""
    grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in grads if g is not None]).norm()


class JacobianDescent(Arm):
    """An aggregator of TorchJD, on the batch's mean deficits, with one backward for each goal.

    Args:
        aggregator: makes the aggregator. sums: whether its weights sum to the number of goals, not to 1.
    """

    def __init__(self, aggregator: Callable[[], Aggregator], sums: bool = False) -> None:
        self.make, self.sums = aggregator, sums

    def start(self, problem: Problem) -> None:
        self.aggregator = self.make()

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        means = list(deficits(problem, raw).mean(0) / (len(problem.anchors) if self.sums else 1))
        # One pass batched over the goals is faster, but the operations of the VAEs cannot all be batched.
        backward(means, inputs=problem.parameters, parallel_chunk_size=1 if isinstance(problem, VAE) else None)
        weights = jac_to_grad(problem.parameters, self.aggregator)
        if weights is None:
            return torch.full((len(means),), 1 / len(means))
        weights = weights.detach().abs()
        return weights / weights.sum()


class GradientNorms(Rule):
    """Learning-rate annealing (Wang, Teng & Perdikaris 2021, algorithm 1), for a residual and its conditions.

    As in their code, every 10 steps the weight of a condition's raw loss moves by a tenth towards a quotient: the
    largest entry of the residual's gradient over the mean entry of the condition's weighted one, both at the weight
    matrices. The residual is the first goal and has weight 1.
    """

    every, speed = 10, 0.1

    def start(self, problem: Problem) -> None:
        self.weights = torch.ones(len(problem.anchors))

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        means = deficits(problem, raw).mean(0) * units(problem)
        if problem.step % self.every == 0:
            residual, *conditions = (self._entries(problem, loss) for loss in means * self.weights)
            largest = torch.stack([g.max() for g in residual]).max()
            sizes = torch.stack([torch.stack([g.mean() for g in each]).mean() for each in conditions])
            self.weights[1:] = self.weights[1:].lerp(largest / sizes.clamp(min=1e-12), self.speed)
        (means @ self.weights).backward()
        share = self.weights * units(problem)
        return share / share.sum()

    @staticmethod
    def _entries(problem: Problem, loss: Tensor) -> list[Tensor]:
        """Return the absolute gradient of a loss for each weight matrix."""
        matrices = [p for p in problem.parameters if p.ndim == 2]
        return [g.abs() for g in torch.autograd.grad(loss, matrices, retain_graph=True)]


class Balancer(Rule):
    """EnCodec's balancer (Defossez et al. 2022).

    Each loss is weighted by ``1 / moving average of its gradient's norm`` at the latent code, where all goals meet.
    """

    def start(self, problem: Problem) -> None:
        self.norms, self.count = torch.zeros(len(problem.anchors)), 0.0

    def backward(self, problem: VAE, raw: dict[str, Tensor]) -> Tensor:
        means = deficits(problem, raw).mean(0)
        norms = torch.stack([norm(m, problem.code) for m in means])
        self.norms, self.count = 0.999 * self.norms + norms, 0.999 * self.count + 1
        weights = 1 / (self.norms / self.count).clamp(min=1e-12)
        (means @ weights / len(weights)).backward()
        return weights / weights.sum()


class Adaptive(Rule):
    """VQGAN's adaptive weight (Esser et al. 2021).

    The weight of the adversarial loss is ``0.8 |grad reconstruction| / (|grad realism| + 1e-4)`` at the last layer; the
    other goals have weight 1.
    """

    def backward(self, problem: VAE, raw: dict[str, Tensor]) -> Tensor:
        means = dict(zip(problem.anchors, deficits(problem, raw).mean(0), strict=True))
        here = [problem.last]
        ratio = norm(means["reconstruction"], here) / (norm(means["realism"], here) + 1e-4)
        weights = torch.stack(
            [0.8 * ratio.clamp(max=1e4) if name == "realism" else torch.tensor(1.0) for name in means]
        )
        (torch.stack(list(means.values())) @ weights).backward()
        return weights / weights.sum()
