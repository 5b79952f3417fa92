"""Test the peers of `python -m bench.policies`: the weights that each gives to two linear goals, computed by hand.

The goals' deficits have gradients (1, 0) and (-2, 1), and start at 0.5 and 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchjd")
from torchjd.aggregation import MGDA, PCGrad, UPGrad
from torchjd.scalarization import IMTLL, UW

from bench.policies import balancers, gradients, peers
from bench.policies.faults import FAULTS
from bench.policies.helmholtz import SOURCE, Helmholtz
from bench.policies.problem import Anchor, Problem
from bench.policies.rules import Arm

G = torch.tensor([[1.0, 0.0], [-2.0, 1.0]])
SCALES = torch.tensor([1.0, 4.0])


class Linear(Problem):
    """Two goals that are linear in two parameters, [B] and 0-dim, with deficits ``start``."""

    title, family = "Linear", "linear"
    drifting, blocked = "first", "second"
    anchors = {"first": Anchor(0.0, 1.0), "second": Anchor(0.0, 4.0)}  # noqa: RUF012
    rate, steps = 0.0, 10

    def build(self, seed: int) -> None:
        self.model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.start = torch.tensor([0.5, 0.25])

    def batch(self) -> None:
        return None

    def values(self, inputs: None, draw: torch.Generator) -> dict[str, Tensor]:
        first, second = SCALES * (self.start + G @ self.model.weight[0])
        return {"first": first.expand(3), "second": second}


def step(arm: Arm, problem: Problem) -> Tensor:
    """Take a step, and return the gradient, [2]."""
    shares = arm.backward(problem, problem.raw())
    assert float(shares.sum()) == pytest.approx(1)
    grad = problem.model.weight.grad[0].clone()
    problem.update()
    arm.after(problem)
    return grad


def started(arm: Arm) -> tuple[Arm, Linear]:
    problem = Linear(0, FAULTS["none"])
    arm.start(problem)
    return arm, problem


def softmax(*values: float) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


FIRST = {  # the weights of the deficits in the first step
    "sum": (peers.Weighted, [0.5, 0.5]),
    "weighted": (lambda: peers.Weighted(torch.tensor([2.0, 3.0])), [0.4, 0.6]),
    "raw": (peers.Raw, [0.2, 0.8]),
    "STCH": (balancers.SmoothTchebycheff, softmax(5, 2.5)),
    "FAMO": (balancers.FastAdaptive, [0.5 / 0.5 / 3, 0.5 / 0.25 / 3]),  # the weights over the deficits sum to 1 + 2
    "PBI": (balancers.Boundary, [(1 + 5) / 2, (1 - 5) / 2]),  # (d1 + 5 d2) / sqrt(2), and the first is worse
    "DWA": (balancers.DynamicAverage, [0.5, 0.5]),
    "UW": (lambda: balancers.Learnt(UW), [0.25, 0.25]),
    "IMTL-L": (lambda: balancers.Learnt(IMTLL), [0.5, 0.5]),
    "ReLoBRaLo": (balancers.Lookback, [1, 4]),
    "SoftAdapt": (balancers.Soft, [2 * 0.5 / 1.5, 4 * 2 * 1.0 / 1.5]),  # raw losses are 0.5 and 1
    "gradient norms": (
        gradients.GradientNorms,
        [1, 4 * (0.9 + 0.1 / 6)],
    ),  # the largest entry is 1, the mean of (8, 4) 6
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_step(name: str) -> None:
    make, weights = FIRST[name]
    torch.testing.assert_close(step(*started(make())), torch.tensor(weights, dtype=torch.float32) @ G)


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: gradients.JacobianDescent(PCGrad), [0.2, 1.4]),  # (1, 0) less its part along (-2, 1), and (0, 1)
        (lambda: gradients.JacobianDescent(PCGrad, sums=True), [0.1, 0.7]),
        (lambda: gradients.JacobianDescent(UPGrad), [0.1, 0.7]),  # the mean of both projections onto the dual cone
        (lambda: gradients.JacobianDescent(MGDA), [0.1, 0.3]),  # the shortest vector between them, at 0.7 and 0.3
    ],
)
def test_gradients_are_combined_as_published(make: Callable[[], Arm], expected: list[float]) -> None:
    found = step(*started(make()))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def second(arm: Arm, deficits: list[float]) -> Tensor:
    """Return the gradient of a second step, with other deficits."""
    arm, problem = started(arm)
    step(arm, problem)
    problem.start = torch.tensor(deficits)
    return step(arm, problem)


def test_learnt_weights_move_towards_the_inverse_of_the_loss() -> None:
    """The first step of Adam is its rate: log variances and scales go where small losses weigh more."""
    rise, fall = math.exp(balancers.LEARNT), math.exp(-balancers.LEARNT)
    for kind, weights in ((UW, [0.25 * rise] * 2), (IMTLL, [0.5 * rise] * 2)):
        found = second(balancers.Learnt(kind), [0.5, 0.25])
        torch.testing.assert_close(found, torch.tensor(weights) @ G, rtol=1e-4, atol=1e-6)
    arm, problem = started(balancers.Learnt(UW))
    problem.start = torch.tensor([0.5, 3.0])  # above 1: it weighs less
    step(arm, problem)
    torch.testing.assert_close(step(arm, problem), 0.25 * torch.tensor([rise, fall]) @ G, rtol=1e-4, atol=1e-6)


def test_famo_weighs_more_what_improved_less() -> None:
    arm, problem = started(balancers.FastAdaptive())
    arm.backward(problem, problem.raw())
    problem.start = torch.tensor([0.25, 0.25])  # the update has halved the first
    arm.after(problem)
    logits = arm.famo._w.detach()
    assert logits[0] == pytest.approx(-0.025, rel=1e-3) and logits[1] == pytest.approx(0.025, rel=1e-3)


def test_dynamic_average_weighs_by_the_ratio_of_two_epochs() -> None:
    arm, problem = started(balancers.DynamicAverage())
    for _ in range(balancers.EPOCH):
        step(arm, problem)
    problem.start = torch.tensor([0.5, 0.125])
    for _ in range(balancers.EPOCH):
        step(arm, problem)
    weights = softmax(1 / 2, 0.5 / 2)
    torch.testing.assert_close(step(arm, problem), torch.tensor(weights) @ G)


def test_lookback_weighs_by_progress_since_the_last_or_the_first_step() -> None:
    ratios = softmax(2 / 0.5, 1 / 0.5)  # the first deficit doubles, at temperature 0.5
    kept = second(balancers.Lookback(0.5, 0.8, 1.0), [1.0, 0.25])  # 0.8 of the old weights, 0.2 of the last look
    torch.testing.assert_close(kept, torch.tensor([0.8 + 0.2 * 2 * r for r in ratios]) * SCALES @ G)
    back = second(balancers.Lookback(0.5, 0.8, 0.0), [1.0, 0.25])  # both looks see the first step
    torch.testing.assert_close(back, torch.tensor([2 * r for r in ratios]) * SCALES @ G)


def test_softadapt_weighs_by_loss_and_slope() -> None:
    found = second(balancers.Soft(), [1.0, 0.25])
    sizes = [0.75 * math.exp(0.1 * 0.5), 1.0]  # means of raw losses over two steps, slopes 0.5 and 0
    torch.testing.assert_close(found, torch.tensor([2 * size / sum(sizes) for size in sizes]) * SCALES @ G)


def test_gradient_norms_are_looked_at_every_tenth_step() -> None:
    arm, problem = started(gradients.GradientNorms())
    first = [step(arm, problem) for _ in range(10)]
    assert all(torch.equal(first[0], g) for g in first)
    before = 0.9 + 0.1 / 6
    weight = 4 * (0.9 * before + 0.1 / (6 * before))  # the gradient of the weighted loss is looked at
    torch.testing.assert_close(step(arm, problem), torch.tensor([1.0, weight]) @ G)


def test_weights_from_the_literature_are_those_of_raw_losses() -> None:
    arm = peers.Raw("helmholtz")
    arm.start(Helmholtz(0, FAULTS["none"], 4))
    assert arm.weights.tolist() == pytest.approx([SOURCE, 100 * Helmholtz.anchors["boundary"].nadir])


def test_positive_clamps_where_an_ideal_is_no_bound() -> None:
    _, problem = started(peers.Weighted())
    d = torch.tensor([[-1.0, 1e-5], [-3.0, 1e-5]])
    assert balancers.positive(problem, d).tolist() == pytest.approx([1e-12, 1e-5])
    problem.anchors = {**problem.anchors, "first": Anchor(0.1, 1.0)}  # type: ignore[misc]
    assert balancers.positive(problem, d).tolist() == pytest.approx([1e-3, 1e-3])
