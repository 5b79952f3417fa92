"""The photographs of `bomkern train`, its networks at half the width, and its nine goals."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.policies import vae
from bench.policies.problem import Anchor
from bomkern import Lazy, active_units, lazy
from bomkern.train import features as see
from bomkern.train import nine_goals as goal
from bomkern.train.data import Data, load, to_float
from bomkern.train.networks import VAE, Discriminator
from bomkern.train.trainer import raw_values

BATCH, SIZE, WIDTH, STRUCTURE, APPEARANCE = 16, 32, 16, 36, 12
LATENTS = STRUCTURE + APPEARANCE
CPU = torch.device("cpu")


@lru_cache
def _data() -> tuple[Data, goal.Trivial, dict[str, Tensor]]:
    data = load(None, SIZE)
    trivial = goal.trivial_answers(to_float(data.train.batch(256, np.random.default_rng(0)), CPU))
    held_out = to_float(data.held_out.grid(210), CPU)
    return data, trivial, {"validation": held_out[::2], "test": held_out[1::2]}


class Photographs(vae.VAE):
    """Nine goals, with raw values as in `bomkern.train.nine_goals`."""

    title = "Photographs"
    family = "photographs"
    rate, steps = 1e-3, 320
    blocked = "latent_stats"
    anchors: ClassVar = {name: Anchor(*pair) for name, pair in goal.anchors(BATCH).items()}

    def build(self, seed: int) -> None:
        self.model = VAE(SIZE, STRUCTURE, APPEARANCE, WIDTH)
        self.judge = Discriminator(WIDTH // 2)
        self.last = self.model.decoder.out.weight

    def batch(self) -> Tensor:
        seed = int(torch.randint(2**31, (1,), generator=self.draw))
        return to_float(_data()[0].train.batch(BATCH, np.random.default_rng(seed)), CPU)

    def images(self, split: str) -> Tensor:
        return _data()[2][split]

    def forward(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        raw, recon = self.lazies(image, draw)
        *values, recon, view = Lazy.tensors([*raw.values(), recon, self.code[2]])
        self.code = [*self.code[:2], view]
        return dict(zip(raw, values, strict=True)), recon

    def lazies(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor | Lazy], Lazy]:
        noise = torch.randn(len(image), 2 * LATENTS + 6, generator=draw)
        posterior, shake, view = noise.split([LATENTS, LATENTS, 6], 1)
        order = torch.rand(len(image), LATENTS, generator=draw).argsort(0)
        out = self.model(image, lazy(see.photometric, image, view), posterior, shake)
        self.code = [out.mu, out.logvar, out.view]
        self.active = active_units(out.mu.detach())[0]
        raw = raw_values(out, image, lazy(self.judge, out.recon), order, _data()[1])
        return dict(zip(goal.GOALS, raw, strict=True)), out.recon

    def decode_means(self, image: Tensor) -> Tensor:
        return self.model.decode(self.model.encoder(image)[0])

    def realism_outside(self, recon: Tensor, image: Tensor) -> float:
        def features(x: Tensor) -> list[Tensor]:
            return [part.movedim(1, -1).flatten(0, 2) for part in see.early_vision(x)]

        real, flat = features(image), features(see.flat(image))
        parts = [vae.transport(a, b) / vae.transport(c, b) for a, b, c in zip(features(recon), real, flat, strict=True)]
        return float(torch.stack(parts).mean())
