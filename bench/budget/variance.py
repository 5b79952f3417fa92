"""The variance of the gradient over draws of rows, beside that over batches, at a trained state of a problem."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.budget.arms import EXACT, RATIO
from bench.budget.draws import METHODS, Step
from bench.budget.run import Runner
from bench.policies import peers
from bench.policies.faults import FAULTS
from bench.policies.problems import VAES
from bench.policies.vae import VAE
from bomkern import GoalSet, Lazy, Spill
from bomkern.goals.row_budget import RowBudget

STEPS = 200  # of training with exact spill, before anything is measured
SEED = 20
RATIOS = (1 / 3, RATIO, 0.8)
BUDGETS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Plan(NamedTuple):
    """The amount of work: batches for the variance over batches, batches whose rows are drawn, and draws of each."""

    batches: int = 48
    drawn: int = 4
    draws: int = 400


class Rows(NamedTuple):
    """The gradients of a batch.

    Attributes:
        gram: their inner products, [K B, K B] float64.
        deficits: of the rows, [K, B] float64.
    """

    gram: Tensor
    deficits: Tensor


def gradients_of(values: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return the gradient of each of n values, [n, P]."""
    rows = []
    for value in values:
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(grads, parameters, strict=True)]
            )
        )
    return torch.stack(rows)


def rows_of(problem: VAE) -> Rows:
    """Return the gradients of all rows of all goals for the next batch."""
    deficits = peers.deficits(problem, problem.raw()).T
    gradients = gradients_of(deficits.flatten(), problem.parameters)
    return Rows((gradients @ gradients.T).double(), deficits.detach().double())


def budget_of(problem: VAE, ratio: float, rows: float) -> RowBudget:
    """Return the part of a `GoalSet` that knows how many rows a goal takes."""
    from bench.policies.rules import anchored

    found = GoalSet(anchored(problem), spill=Spill(ratio, budget=rows)).row_budget
    assert found is not None
    return found


def over_batches(products: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the squared norm of the expected gradient, and the variance over batches.

    Args:
        products: inner products of the goals' gradients of M batches, [M, K, M, K].
        weights: [K].
    """
    inner = torch.einsum("akbl,k,l->ab", products, weights, weights)
    count = len(inner)
    variance = float((inner.diagonal().mean() - inner.mean()) * count / (count - 1))
    return float(inner.mean()) - variance / count, variance


def over_draws(method: str, step: Step, gram: Tensor, draws: int) -> float:
    """Return the mean squared distance of the drawn gradients from that of all rows."""
    off = METHODS[method](step, draws) - (step.weights / step.deficits.shape[1])[:, None]
    off = off.flatten(1).double()
    return float(((off @ gram) * off).sum(1).mean())


def measure(data: str, steps: int = STEPS, quick: bool = False) -> dict[str, Any]:
    """Train with exact spill, and measure; variances are parts of the squared norm of the expected gradient.

    Returns:
        The goals, worst first, and for each ratio the variance over batches and, for each budget, the part of all goal
        rows that is taken and the variance of every method.
    """
    from tqdm import tqdm

    torch.set_num_threads(1)
    plan = Plan(3, 1, 20) if quick else Plan()
    runner = Runner(VAES[data](SEED, FAULTS["none"], steps), EXACT)
    runner.advance(steps)
    problem = runner.problem
    names = list(problem.anchors)
    code = [k for k, value in enumerate(problem.lazy_raw().values()) if not isinstance(value, Lazy)]
    position = runner.arm.goals.multipliers.argsort(descending=True).argsort()
    means = []
    for _ in tqdm(range(plan.batches), desc=f"{data}, batches"):
        means.append(gradients_of(peers.deficits(problem, problem.raw()).mean(0), problem.parameters))
    flat = torch.cat(means)
    count = len(names)
    products = (flat @ flat.T).double().unflatten(1, (-1, count)).unflatten(0, (-1, count))
    drawn = [rows_of(problem) for _ in tqdm(range(plan.drawn), desc=f"{data}, rows")]
    batch = drawn[0].deficits.shape[1]
    found: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "parameters": flat.shape[1],
        "goals": [names[k] for k in position.argsort().tolist()],
        "code": [names[k] for k in code],
        "ratios": {},
    }
    torch.manual_seed(0)
    for ratio in RATIOS:
        weights = Spill(ratio).weights(count)[position]
        signal, variance = over_batches(products, weights.double())
        budgets = {}
        for rows in BUDGETS:
            counts = budget_of(problem, ratio, rows).rows(weights, batch)
            budgets[f"{rows:g}"] = {"rows": _rounded(counts.sum() / (count * batch))}
            for method in METHODS:
                each = []
                for gram, deficits in drawn:
                    step = Step(weights.double(), counts, deficits, *_sizes(gram, count), code)
                    each.append(over_draws(method, step, gram, plan.draws))
                budgets[f"{rows:g}"][method] = _rounded(sum(each) / len(each) / signal)
        found["ratios"][f"{ratio:.3g}"] = {"batches": _rounded(variance / signal), "budgets": budgets}
    return found


def _sizes(gram: Tensor, goals: int) -> tuple[Tensor, Tensor]:
    """Return the norms of the rows' gradients, [K, B], and the standard deviations of the goals' over the rows, [K]."""
    squares = gram.diagonal().clamp(min=0).unflatten(0, (goals, -1))
    blocks = gram.unflatten(1, (goals, -1)).unflatten(0, (goals, -1))
    means = torch.stack([blocks[k, :, k].mean() for k in range(goals)])
    return squares.sqrt(), (squares.mean(1) - means).clamp(min=0).sqrt()


def _rounded(x: Any) -> float:
    return float(f"{float(x):.4g}")
