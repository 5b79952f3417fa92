"""Test that all evaluations of a closure are one step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    Calibrated,
    GoalSet,
    ShareGuard,
    Spill,
)
from tests.support.micro_batches import (
    assert_same,
    call,
    two,
)


def fit(scope: bool) -> tuple[GoalSet, list[float], int]:
    """Fit a line to two targets, with L-BFGS and spill; return the goals, their final means, and all evaluations."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=source, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=torch.float64) / 3)
    target = torch.stack([(x[:, 0] * x[:, 1]).tanh(), x[:, 2].sin()], 1)
    goals = GoalSet(a=Anchored(0.0, 0.5), b=Anchored(0.0, 0.5), spill=Spill(0.5, halflife=2)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe", max_iter=20)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        errors = (net(x) - target) ** 2
        loss = goals({"a": errors[:, 0], "b": errors[:, 1]}).loss
        loss.backward()
        return loss

    for _ in range(5):
        if scope:
            with goals.one_step():
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    final = ((net(x) - target) ** 2).mean(0).tolist()
    return goals, final, evaluations


def test_a_closure_is_one_step() -> None:
    """Weights that move within a line search spoil it: the final losses are far better if they stand."""
    goals, held, evaluations = fit(True)
    assert goals.steps == len(goals.history) == 5 and evaluations > 50
    moving, free, counted = fit(False)
    assert moving.steps == counted > 50  # without the context each evaluation is a step
    assert max(held) < max(free) / 2 and min(held) < min(free) / 2


def test_evaluations_see_the_weights_of_the_first() -> None:
    """The first evaluation is the step; the others, and what they learn from, leave no trace."""
    goals = GoalSet(a=Calibrated(4), b=Anchored(0.0, 1.0), guard=ShareGuard(0.1, 0.3), spill=0.5)
    single = copy.deepcopy(goals)
    for k in range(5):
        losses = []
        with goals.one_step():
            for scale in (1.0 + k, 50.0, 1.0 + k):
                losses.append(float(call(goals, scale).loss.detach()))
            inside = goals.params.clone(), goals.multipliers.clone()
            call(goals, 70.0)
            assert torch.equal(goals.params, inside[0]) and torch.equal(goals.multipliers, inside[1])
            assert goals.steps == k
        call(single, 1.0 + k)
        assert losses[0] == losses[2] != losses[1]
        for one in (goals, single):
            one.accept(torch.tensor(k != 1))
    assert_same(goals, single, 0, 0)
    assert goals.history["finite"].tolist() == [1, 0, 1, 1, 1]


def test_a_closure_of_micro_batches_is_one_step() -> None:
    goals, single = two(spill=0.5), two(spill=0.5)
    for _ in range(3):
        with goals.one_step():
            for factor in (1.0, 9.0, 4.0):  # evaluations
                for scale, last in ((1.0, False), (2.0, False), (6.0, True)):
                    with goals.accumulate(last=last):
                        call(goals, factor * scale)
        for scale, last in ((1.0, False), (2.0, False), (6.0, True)):
            with single.accumulate(last=last):
                call(single, scale)
    assert_same(goals, single, 0, 0)


def test_a_closure_that_fails_or_is_saved_leaves_nothing() -> None:
    goals = two(spill=0.5)
    with pytest.raises(ZeroDivisionError), goals.one_step():
        call(goals, 5.0)
        raise ZeroDivisionError
    assert goals.steps == 0 and goals.anchors()["a"][1] == pytest.approx(1.0) and goals.part is None
    with goals.one_step():
        first = call(goals, 5.0).loss
        assert copy.deepcopy(goals.state_dict())["params"][0, 1] == 1.0
        assert torch.equal(call(goals, 5.0).loss, first)
    assert goals.steps == 1 and goals.anchors()["a"][1] == pytest.approx(5.0)
    with goals.one_step():
        pass  # no evaluation, no step
    assert goals.steps == 1
