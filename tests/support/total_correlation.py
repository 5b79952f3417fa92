"""Inputs and calls of total_correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import total_correlation

ESTIMATORS = {"plain": (None, "mws"), "mws": (5000, "mws"), "mss": (5000, "mss")}
Latents = tuple[Tensor, Tensor, Tensor]


def latents(batch: int, dims: int, dtype: torch.dtype = torch.float32, spread: float = 0.5) -> Latents:
    """Return a batch of codes as a trained VAE gives them: z is drawn from its own posterior."""
    generator = torch.Generator().manual_seed(batch * 1000 + dims)
    mu, wide, noise = torch.randn(3, batch, dims, generator=generator, dtype=torch.float64)
    logvar = wide * spread - 1
    return (mu + torch.exp(logvar / 2) * noise).to(dtype), mu.to(dtype), logvar.to(dtype)


def run(inputs: Latents, impl: str | None, which: tuple[int | None, str]) -> tuple[Tensor, ...]:
    """Return values and gradients under fixed weights of the samples."""
    value = total_correlation(*inputs, *which, impl=impl)
    weight = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=value.device)
    return value.detach(), *torch.autograd.grad((value * weight).sum(), inputs)


def leaves(inputs: Latents, dtype: torch.dtype | None = None, device: str = "cpu") -> Latents:
    made = tuple(x.detach().to(device=device, dtype=dtype or x.dtype).clone().requires_grad_() for x in inputs)
    return made  # type: ignore[return-value]
