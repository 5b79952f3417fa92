"""consistency_variance of four views against eager PyTorch and torch.compile, and its share of a copy's bandwidth."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from latent_benches import DEVICE, DIRECTIONS, Case, Inputs, measure, share_of_a_copy, sizes_and
from torch import Tensor

import bomkern

V = 4


@functools.lru_cache(maxsize=1)
def views(batch: int, dims: int) -> Inputs:
    """One code per sample, seen four times with noise."""
    source = torch.Generator().manual_seed(0)
    code = torch.randn(batch, dims, generator=source)
    noisy = [code + 0.3 * torch.randn(batch, dims, generator=source) for _ in range(V)]
    return tuple(x.to(DEVICE).requires_grad_() for x in noisy)


def ours(*given: Tensor, impl: str | None = None) -> Tensor:
    return bomkern.consistency_variance(given, impl=impl)


def plain(*given: Tensor) -> Tensor:
    """As one writes it in plain PyTorch."""
    return torch.stack(given).var(0).mean(1)


CASE = Case("consistency_variance", views, {"bomkern": ours, "eager": plain}, torch.mean)


@sizes_and()
def test_peers(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, CASE, name, size, backward)


@pytest.mark.parametrize("backward", DIRECTIONS, ids=DIRECTIONS.get)
def test_share_of_a_copy(benchmark: Any, capsys: Any, backward: bool) -> None:
    share_of_a_copy(benchmark, capsys, CASE, backward)
