"""gaussian_kl against eager PyTorch and torch.compile, and its share of a copy's bandwidth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.codes import SIZES, codes
from bench.harness import Case, Size, measure, sizes_and, traffic


def plain(mu: Tensor, logvar: Tensor) -> Tensor:
    """As one writes it in plain PyTorch."""
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)


CASE = Case(
    "gaussian_kl", lambda **size: codes(**size)[1:], bomkern.gaussian_kl, plain, torch.mean, traffic(2),
    tolerance=(1e-4, 1e-3),
)  # fmt: skip


@sizes_and(SIZES)
def test_peers(benchmark: Any, size: Size, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction)
