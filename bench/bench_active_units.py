"""active_units against eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from latent_benches import Case, codes, measure, sizes_and
from torch import Tensor

import bomkern


def plain(mu: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it in plain PyTorch, for a code of which something varies."""
    variance = mu.var(0)
    p = variance / variance.sum()
    return torch.sigmoid((variance - 0.1) / 0.05).mean(), torch.exp(-(p * p.log()).sum()) / len(p)


CASE = Case("active_units", lambda b, d: codes(b, d)[1:2], {"bomkern": bomkern.active_units, "eager": plain}, sum)


@sizes_and()
def test_peers(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, CASE, name, size, backward)
