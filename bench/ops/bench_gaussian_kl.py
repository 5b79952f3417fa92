"""Time gaussian_kl against eager PyTorch, torch.compile and the bandwidth of a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import Case, Inputs, Size, in_turn, measure, sizes_and, sizes_at, traffic
from bench.regimes import CODES, SIZES, codes
from bench.report.write import SHOWN


def plain(mu: Tensor, logvar: Tensor) -> Tensor:
    """Compute the KL divergence in plain PyTorch."""
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)


def posteriors(regime: str, B: int, D: int) -> Inputs:
    return codes(regime, B, D)[1:]


CASE = Case(
    "gaussian_kl", posteriors, bomkern.gaussian_kl, plain, torch.mean, traffic(2), regimes=CODES, tolerance=(1e-4, 1e-3)
)


@sizes_and(SIZES, regimes=CASE.regimes, at=SHOWN["gaussian_kl"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["gaussian_kl"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)
