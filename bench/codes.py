"""The codes that the benches of the statistics are fed."""

from __future__ import annotations

import torch

from bench.harness import Inputs
from bench.machine import DEVICE

SIZES = [{"B": batch, "D": 128} for batch in (512, 4096, 65536)]
if DEVICE == "cuda":
    SIZES.append({"B": 1_048_576, "D": 128})


def codes(B: int, D: int) -> Inputs:
    """z, mu and logvar of a trained code: idle dimensions and busy ones."""
    source = torch.Generator().manual_seed(0)
    mu, logvar, noise = torch.randn(3, B, D, generator=source).unbind()
    mu, logvar = mu * torch.logspace(-1.5, 0.3, D), 0.5 * logvar - 1
    z = mu + noise * torch.exp(logvar / 2)
    return tuple(x.to(DEVICE).requires_grad_() for x in (z, mu, logvar))
