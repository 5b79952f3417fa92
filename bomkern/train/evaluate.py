"""Held-out quality: PSNR and SSIM of reconstructions from the posterior mean, and of the mean-colour image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from .features import flat
from .networks import VAE

HELD_OUT_CROPS = 105
CHUNK = 64


def _metrics(device: torch.device) -> MetricCollection:
    # PSNR of the mean squared error over all crops, in dB; SSIM is averaged over crops.
    return MetricCollection(
        {"psnr": PeakSignalNoiseRatio(data_range=1.0), "ssim": StructuralSimilarityIndexMeasure(data_range=1.0)}
    ).to(device)


@torch.no_grad()
def reconstruct(vae: VAE, images: Tensor) -> Tensor:
    """Decode the posterior means. [n, 3, S, S] -> [n, 3, S, S]."""
    return torch.cat([vae.decode(vae.encoder(part)[0]) for part in images.split(CHUNK)])


def quality(vae: VAE, images: Tensor) -> dict[str, float]:
    """Return ``psnr`` in dB and ``ssim`` of reconstructed held-out crops [n, 3, S, S]."""
    scores = _metrics(images.device)(reconstruct(vae, images), images)
    return {name: float(value) for name, value in scores.items()}


def baseline(images: Tensor) -> dict[str, float]:
    """Return the quality of each crop's own mean colour, which a model has to beat."""
    scores = _metrics(images.device)(flat(images).contiguous(), images)
    return {f"baseline_{name}": float(value) for name, value in scores.items()}
