"""active_units against eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.codes import SIZES, codes
from bench.harness import Case, Size, measure, sizes_and, traffic


def plain(mu: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it in plain PyTorch, for a code of which something varies."""
    variance = mu.var(0)
    p = variance / variance.sum()
    return torch.sigmoid((variance - 0.1) / 0.05).mean(), torch.exp(-(p * p.log()).sum()) / len(p)


CASE = Case(
    "active_units", lambda **size: codes(**size)[1:2], bomkern.active_units, plain, sum, traffic(1),
    tolerance=(1e-4, 1e-3),
)  # fmt: skip


@sizes_and(SIZES)
def test_peers(benchmark: Any, size: Size, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction)
