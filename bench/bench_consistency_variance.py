"""consistency_variance of four views against eager PyTorch and torch.compile, and its share of a copy's bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.codes import SIZES
from bench.harness import Case, Inputs, Size, measure, sizes_and, traffic
from bench.machine import DEVICE

V = 4


def views(B: int, D: int) -> Inputs:
    """One code per sample, seen four times with noise."""
    source = torch.Generator().manual_seed(0)
    code = torch.randn(B, D, generator=source)
    noisy = [code + 0.3 * torch.randn(B, D, generator=source) for _ in range(V)]
    return tuple(x.to(DEVICE).requires_grad_() for x in noisy)


def ours(*given: Tensor, impl: str | None = None) -> Tensor:
    return bomkern.consistency_variance(given, impl=impl)


def plain(*given: Tensor) -> Tensor:
    """As one writes it in plain PyTorch."""
    return torch.stack(given).var(0).mean(1)


CASE = Case("consistency_variance", views, ours, plain, torch.mean, traffic(V), tolerance=(1e-4, 1e-3))


@sizes_and(SIZES)
def test_peers(benchmark: Any, size: Size, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction)
