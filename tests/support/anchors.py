"""Data, and the numbers of an `Anchored`, for the tests of `bomkern.anchors`."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import Anchored


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(anchored: Anchored) -> tuple[float, float]:
    return anchored.known["ideal"], anchored.known["nadir"]
