"""active_units against eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import Case, Inputs, Size, in_turn, measure, sizes_and, sizes_at, traffic
from bench.regimes import CODES, SIZES, codes
from bench.report.write import SHOWN


def plain(mu: Tensor) -> tuple[Tensor, Tensor]:
    """Compute active units in plain PyTorch, for a code with at least one varying dimension."""
    variance = mu.var(0)
    p = variance / variance.sum()
    return torch.sigmoid((variance - 0.1) / 0.05).mean(), torch.exp(-(p * p.log()).sum()) / len(p)


def means(regime: str, B: int, D: int) -> Inputs:
    return codes(regime, B, D)[1:2]


CASE = Case("active_units", means, bomkern.active_units, plain, sum, traffic(1), regimes=CODES, tolerance=(1e-4, 1e-3))


@sizes_and(SIZES, regimes=CASE.regimes, at=SHOWN["active_units"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["active_units"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)
