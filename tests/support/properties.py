"""Sizes, seeds and inputs of the property tests."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

Server = tuple[str, str]
few = settings(max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def small(server: Server, *sizes: int) -> tuple[int, ...]:
    """Limit sizes to those that Triton's interpreter can run."""
    return tuple(min(n, 6) for n in sizes) if server == ("triton", "cpu") else sizes


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
