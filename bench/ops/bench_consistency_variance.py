"""Time consistency_variance of four views against eager PyTorch, torch.compile and the bandwidth of a copy."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import Case, Size, in_turn, measure, sizes_and, sizes_at, traffic
from bench.regimes import CODES, SIZES, views
from bench.report.write import SHOWN

V = 4


def ours(*views: Tensor, impl: str | None = None) -> Tensor:
    return bomkern.consistency_variance(views, impl=impl)


def plain(*views: Tensor) -> Tensor:
    """Compute the variance over the views in plain PyTorch."""
    return torch.stack(views).var(0).mean(1)


CASE = Case(
    "consistency_variance", functools.partial(views, count=V), ours, plain, torch.mean, traffic(V),
    regimes=CODES, tolerance=(1e-4, 1e-3),
)  # fmt: skip


@sizes_and(SIZES, regimes=CASE.regimes, at=SHOWN["consistency_variance"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["consistency_variance"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)
