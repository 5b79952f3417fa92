"""gaussian_kl against eager PyTorch and torch.compile, and its share of a copy's bandwidth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_benches import DIRECTIONS, Case, codes, measure, share_of_a_copy, sizes_and
from torch import Tensor

import bomkern


def plain(mu: Tensor, logvar: Tensor) -> Tensor:
    """As one writes it in plain PyTorch."""
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)


CASE = Case("gaussian_kl", lambda b, d: codes(b, d)[1:], {"bomkern": bomkern.gaussian_kl, "eager": plain}, torch.mean)


@sizes_and()
def test_peers(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, CASE, name, size, backward)


@pytest.mark.parametrize("backward", DIRECTIONS, ids=DIRECTIONS.get)
def test_share_of_a_copy(benchmark: Any, capsys: Any, backward: bool) -> None:
    share_of_a_copy(benchmark, capsys, CASE, backward)
