"""Scikit-learn's digits, 8 x 8 pixels: a VAE of two layers with 16 latents and six goals."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.policies.problem import Anchor
from bench.policies.vae import VAE, transport
from bomkern import Lazy, active_units, consistency_variance, covariance_penalty, gaussian_kl, lazy

BATCH, LATENTS, HIDDEN = 64, 16, 128
SPLITS = {"train": slice(0, 1200), "validation": slice(1200, 1497), "test": slice(1497, 1797)}


@lru_cache
def _data() -> dict[str, Tensor]:
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 16
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    return {name: pixels[rows] for name, rows in SPLITS.items()}


@lru_cache
def _trivial() -> float:
    """Return the squared error of the mean image."""
    train = _data()["train"]
    return float((train - train.mean(0)).square().mean())


def _error(recon: Tensor, image: Tensor) -> Tensor:
    return (recon - image).square().mean((1, 2, 3)) / _trivial()


def _unreal(logits: Tensor) -> Tensor:
    return 1 - torch.sigmoid(logits)[:, 0]


class Code(nn.Module):
    """An encoder from [B, 1, 8, 8] to a code of `LATENTS`, and a decoder back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * LATENTS),
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 64),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 8, 8)),
        )


class Digits(VAE):
    """Six goals: reconstruction, KL, realism, decorrelation, consistency under contrast and noise, capacity."""

    title = "Digits"
    family = "digits"
    rate, steps = 2e-3, 1500
    samples = SPLITS["train"].stop
    blocked = "decorrelation"
    anchors: ClassVar = {
        "reconstruction": Anchor(0.0, 1.0),
        "kl_divergence": Anchor(0.0, 30.0),
        "realism": Anchor(0.5, 1.0),
        "decorrelation": Anchor(1 / (BATCH - 1), 1.0),
        "consistency": Anchor(0.0, 1.0),
        "capacity": Anchor(0.0, 1.0),
    }

    def build(self, seed: int) -> None:
        self.model = Code()
        self.judge = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))
        self.last = self.model.decoder[4].weight

    def batch(self) -> Tensor:
        self.rows = torch.randint(self.samples, (BATCH,), generator=self.draw)
        return _data()["train"][self.rows]

    def images(self, split: str) -> Tensor:
        return _data()[split]

    def forward(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        return self._goals(image, draw, lambda fn, *args: fn(*args))

    def lazies(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor | Lazy], Lazy]:
        return self._goals(image, draw, lazy)

    def _goals(self, image: Tensor, draw: torch.Generator, call: Callable[..., Any]) -> tuple[dict[str, Any], Any]:
        """Return the goals and the reconstructions; ``call`` calls what needs reconstructions, now or later."""
        count = len(image)
        contrast = torch.exp(0.2 * torch.randn(count, 1, 1, 1, generator=draw))
        view = (image * contrast + 0.15 * torch.randn(image.shape, generator=draw)).clamp(0, 1)
        mu, logvar = self.model.encoder(torch.cat([image, view])).chunk(2, 1)
        logvar = 8 * torch.tanh(logvar / 8)
        (mu, other), logvar = mu.chunk(2), logvar[:count]
        z = mu + torch.exp(logvar / 2) * torch.randn(mu.shape, generator=draw)
        self.code = [mu, logvar, other]
        recon = call(self.model.decoder, z)
        active, effective = active_units(mu)
        self.active = active.detach()
        spread = z.var(0).detach().mean()  # of the noisy code: the variance of means starts near 0, a bad divisor
        values = {
            "reconstruction": call(_error, recon, image),
            "kl_divergence": gaussian_kl(mu, logvar),
            "realism": call(_unreal, call(self.judge, recon)),
            "decorrelation": covariance_penalty(z, normalize=True) / (LATENTS - 1),
            "consistency": consistency_variance([mu, other]) / spread,
            "capacity": (1 - (active + effective) / 2).expand(count),
        }
        return values, recon

    def decode_means(self, image: Tensor) -> Tensor:
        return self.model.decoder(self.model.encoder(image).chunk(2, 1)[0])

    def realism_outside(self, recon: Tensor, image: Tensor) -> float:
        filters = torch.randn(32, 1, 3, 3, generator=torch.Generator().manual_seed(1))
        filters -= filters.mean((1, 2, 3), keepdim=True)

        def features(x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, filters).movedim(1, -1).flatten(0, 2)

        mean = _data()["train"].mean(0).expand_as(image)
        real = features(image)
        return float(transport(features(recon), real) / transport(features(mean), real))
