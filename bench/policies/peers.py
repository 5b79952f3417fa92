"""Alternatives to bomkern's rules: weighted sums, and balancers of losses and of gradients, on the outside anchors."""

from __future__ import annotations

import torch
from torch import Tensor
from torchjd.aggregation import UPGrad
from torchjd.autojac import backward, jac_to_grad
from torchjd.scalarization import FAMO, STCH

from bench.policies.problem import Problem
from bench.policies.rules import Arm

SUMS = 30  # random weightings from which the tuned sum is chosen


def deficits(problem: Problem, raw: dict[str, Tensor]) -> Tensor:
    """Return the outside deficits, [B, K]."""
    return torch.stack([(raw[name] - a.ideal) / (a.nadir - a.ideal) for name, a in problem.anchors.items()], 1)


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


class Weighted(Rule):
    """The weighted sum ``sum_k w_k mean_b d_bk``; ``weights=None`` weighs all goals equally."""

    def __init__(self, weights: Tensor | None = None) -> None:
        self.weights = weights

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return d.mean(0).sum() if self.weights is None else d.mean(0) @ self.weights


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


class SmoothTchebycheff(Rule):
    """TorchJD's STCH (Lin et al. 2024) of the batch's mean deficits."""

    def __init__(self, mu: float = 0.1) -> None:
        self.mu = mu

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return STCH(self.mu, weights=torch.ones(d.shape[1]))(d.mean(0))


class FastAdaptive(Rule):
    """TorchJD's FAMO (Liu et al. 2023), which needs each loss again after the update.

    Its losses must be positive: deficits better than ideal are clamped.
    """

    def start(self, problem: Problem) -> None:
        self.famo = FAMO(len(problem.anchors))

    def loss(self, problem: Problem, d: Tensor) -> Tensor:
        return self.famo(d.mean(0).clamp(min=1e-3))

    def after(self, problem: Problem) -> None:
        self.famo.update(deficits(problem, problem.values_after_update()).mean(0).clamp(min=1e-3))


class Balancer(Rule):
    """EnCodec's balancer (Defossez et al. 2022).

    Each loss is weighted by ``1 / moving average of its gradient's norm`` at the latent code, where all goals meet.
    """

    def start(self, problem: Problem) -> None:
        self.norms, self.count = torch.zeros(len(problem.anchors)), 0.0

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
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

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        means = dict(zip(problem.anchors, deficits(problem, raw).mean(0), strict=True))
        here = [problem.last]
        ratio = norm(means["reconstruction"], here) / (norm(means["realism"], here) + 1e-4)
        weights = torch.stack(
            [0.8 * ratio.clamp(max=1e4) if name == "realism" else torch.tensor(1.0) for name in means]
        )
        (torch.stack(list(means.values())) @ weights).backward()
        return weights / weights.sum()


def norm(loss: Tensor, at: list[Tensor]) -> Tensor:
    """Return the norm of the gradient of a loss at the tensors ``at``."""
    grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in grads if g is not None]).norm()


class JacobianDescent(Arm):
    """TorchJD's UPGrad (Quinton & Rey 2024) of the batch's mean deficits, with one backward for each goal."""

    def start(self, problem: Problem) -> None:
        self.aggregator = UPGrad()

    def backward(self, problem: Problem, raw: dict[str, Tensor]) -> Tensor:
        means = list(deficits(problem, raw).mean(0))
        backward(means, inputs=problem.parameters, parallel_chunk_size=1)
        weights = jac_to_grad(problem.parameters, self.aggregator)
        if weights is None:
            return torch.full((len(means),), 1 / len(means))
        weights = weights.detach().abs()
        return weights / weights.sum()
