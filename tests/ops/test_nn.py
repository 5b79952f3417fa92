"""Test that the modules equal the functions with their options."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import Minimize, MinimizeHard, Upper, nn

CONSTRAINTS = (Minimize(0.5), MinimizeHard(0.4), Upper(0.3, 0.2))


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


Z, MU, LOGVAR = (rand(12, 4, seed=k) for k in range(3))
PAIRS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "tc": (nn.TotalCorrelation(100, "mss"), lambda *x: bomkern.total_correlation(*x, 100, "mss"), (Z, MU, LOGVAR)),
    "tc, parts": (
        nn.TotalCorrelation(100, parts=True),
        lambda *x: bomkern.total_correlation(*x, 100, parts=True),
        (Z, MU, LOGVAR),
    ),
    "tc, some rows": (
        nn.TotalCorrelation(parts=True),
        lambda z, mu, logvar, rows: bomkern.total_correlation(z, mu, logvar, parts=True, rows=rows),
        (Z[[2, 7]], MU, LOGVAR, torch.tensor([2, 7])),
    ),
    "gaussian tc": (nn.GaussianTotalCorrelation(), bomkern.gaussian_total_correlation, (Z,)),
    "kl": (nn.GaussianKL(2, 0.3), lambda *x: bomkern.gaussian_kl(*x, 2, 0.3), (MU, LOGVAR)),
    "consistency": (
        nn.ConsistencyVariance(0, detach=True),
        lambda x: bomkern.consistency_variance(x, 0, detach=True),
        ([Z, MU],),
    ),
    "covariance": (
        nn.CovariancePenalty(True, reduction="batch"),
        lambda x: bomkern.covariance_penalty(x, True, reduction="batch"),
        (Z,),
    ),
    "active": (nn.ActiveUnits(0.2), lambda x: bomkern.active_units(x, 0.2), (MU,)),
    "latent": (nn.LatentStatistics(0.2), lambda *x: bomkern.latent_statistics(*x, 0.2), (Z, MU, LOGVAR)),
    "min goal": (nn.MinGoalLoss(CONSTRAINTS), lambda x: bomkern.min_goal_loss(x, CONSTRAINTS), (rand(9, 3),)),
    "scores": (nn.MinGoalLoss(reduction="min"), lambda x: bomkern.min_goal_loss(x, reduction="min"), (rand(9, 3),)),
    "stats": (
        nn.MinGoalLoss(CONSTRAINTS, return_stats=True, reduction="none"),
        lambda x: bomkern.min_goal_loss(x, CONSTRAINTS, return_stats=True, reduction="none"),
        (list(rand(3, 9)),),
    ),
}


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in flat(part)]


@pytest.mark.parametrize("name", PAIRS)
def test_a_module_is_its_function(name: str) -> None:
    module, function, given = PAIRS[name]
    for a, b in zip(flat(module(*given)), flat(function(*given)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PAIRS)
def test_modules_are_copied_and_print_what_they_are(name: str) -> None:
    module, _, given = PAIRS[name]
    again = copy.deepcopy(module)
    assert all(torch.equal(a, b) for a, b in zip(flat(again(*given)), flat(module(*given)), strict=True))
    assert repr(module).startswith(type(module).__name__ + "(")


def test_every_module_is_here() -> None:
    assert {type(module).__name__ for module, _, _ in PAIRS.values()} | {"GoalSet"} == set(nn.__all__)


def test_options_are_printed() -> None:
    assert repr(nn.TotalCorrelation(10)) == "TotalCorrelation(dataset_size=10, estimator='mws', parts=False, impl=None)"
    printed = repr(nn.MinGoalLoss([Minimize(0.5)], reduction="sum"))
    assert "Minimize(" in printed and "reduction='sum'" in printed and "impl" not in printed


def test_constraints_move_are_saved_and_change_in_place() -> None:
    loss, x = nn.MinGoalLoss(CONSTRAINTS), rand(9, 3)
    assert loss.params is not None and list(loss.state_dict()) == ["params"]
    before = loss(x)
    loss.params[:, 1:3] *= 2
    doubled = loss(x)
    assert not torch.equal(before, doubled)
    again = nn.MinGoalLoss(CONSTRAINTS)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(x), doubled)
    assert loss.half().params.dtype is torch.float32 and torch.equal(loss(x), doubled)


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_precision_is_that_of_the_goals(kept: torch.dtype, given: torch.dtype) -> None:
    loss = nn.MinGoalLoss(CONSTRAINTS).to(kept)
    x = rand(9, 3, dtype=given)
    assert loss(x).dtype is given
    torch.testing.assert_close(loss(x), bomkern.min_goal_loss(x, CONSTRAINTS))


def test_a_state_that_replaces_constraints_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    saved, edited = nn.MinGoalLoss([Minimize(0.1), Minimize(1.0)]), nn.MinGoalLoss([Minimize(0.1), Minimize(2.0)])
    with caplog.at_level(logging.WARNING, "bomkern"):
        nn.MinGoalLoss([Minimize(0.1), Minimize(1.0)]).load_state_dict(saved.state_dict())
        assert not caplog.records
        edited.load_state_dict(saved.state_dict())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "has Minimize(scale=1, ideal=0) for goals[1], and the code has Minimize(scale=2, ideal=0)" in line
    edited.reset_parameters()
    assert edited.params is not None and edited.params[1, 1] == 0.5
