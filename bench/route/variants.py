"""Four variants of the trainer's step: plain PyTorch, and bomkern's with ever fewer graphs to walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss_section import plain_loss
from bomkern import Lazy, latent_statistics
from bomkern.train import features as see
from bomkern.train import loop
from bomkern.train import nine_goals as goal
from bomkern.train.config import Config
from bomkern.train.data import Data, load
from bomkern.train.trainer import AVERAGE, Trainer

SIZE = 64  # pixels
VARIANTS = ("plain", "walked", "branches", "rows")
WORDS = {
    "plain": "plain PyTorch: separate decodes, all graphs walked, `.any()` and `.item()`",
    "walked": 'bomkern, `route="never"`: fused loss and statistics, no syncs',
    "branches": "and branches without a share passed by",
    "rows": "and graphs built for owned rows alone (`lazy`)",
}


@lru_cache
def data() -> Data:
    return load(None, SIZE)


def config(batch: int, reduction: str, device: str) -> Config:
    return Config(image_size=SIZE, batch_size=batch, reduction=reduction, spill=0.0, device=device)


class Routed(Trainer):
    """bomkern's trainer. Only "rows" keeps the goals lazy; only "walked" walks all of their graphs."""

    def __init__(self, variant: str, batch: int, reduction: str, device: str) -> None:
        chosen = config(batch, reduction, device)
        super().__init__(chosen, loop.launch(chosen), data().train)
        self.keeps_lazy = variant == "rows"
        self.goals.route = "never" if variant == "walked" else "always"

    def raw(self) -> tuple[Mapping[str, Tensor | Lazy], Tensor, Tensor | Lazy]:
        raw, image, recon = super().raw()
        if not self.keeps_lazy:
            raw = dict(zip(raw, Lazy.tensors(list(raw.values())), strict=True))
        return raw, image, recon

    def double(self, other: Trainer) -> Routed:
        """Convert this trainer to float64, with the weights and the scales of another."""
        for part in ("vae", "discriminator", "goals"):
            getattr(self, part).double().load_state_dict(getattr(other, part).state_dict())
        self.trivial = goal.Trivial(*(x.double() for x in other.trivial))
        self.step, images, noise = other.step, self.images, self._noise
        self.images = lambda: images().double()  # type: ignore[method-assign]
        self._noise = lambda: tuple(x.double() if x.is_floating_point() else x for x in noise())  # type: ignore
        return self

    def gradients(self) -> list[Tensor | None]:
        """Return the gradient of every parameter of the VAE without taking the step."""
        self.goals(self.raw()[0]).loss.backward()
        grads = [p.grad for p in self.vae.parameters()]
        self.optimizers[0].zero_grad()
        return grads


class Plain(Trainer):
    """The same step by hand: separate calls for each decode and feature, scores, stack, min, log, checks, logs."""

    def __init__(self, batch: int, reduction: str, device: str) -> None:
        chosen = config(batch, reduction, device)
        super().__init__(chosen, loop.launch(chosen), data().train)
        self.optimizers = [
            torch.optim.AdamW(self.vae.parameters(), lr=chosen.lr),
            torch.optim.AdamW(self.discriminator.parameters(), lr=chosen.discriminator_lr, betas=(0.5, 0.99)),
        ]
        self.log: dict[str, float] = {}

    def raw(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        image = self.images()
        noise, shake, view, order = self._noise()
        vae, cut = self.vae, self.vae.parts
        mu, logvar = vae.encoder(image)
        other, _ = vae.encoder(see.photometric(image, view))
        z = mu + noise * torch.exp(logvar / 2)
        s, a = z.split(cut, dim=1)
        ds, da = shake.split(cut, dim=1)
        recon, swap = vae.decoder(s, a), vae.decoder(s, a.roll(-1, 0))
        moved_structure, moved_appearance = vae.decoder(s + ds, a), vae.decoder(s, a + da)
        code = latent_statistics(z, mu, logvar, impl="reference")
        edges, recon_edges = see.edges(image), see.edges(recon)
        values = [
            goal.kl_divergence(code),
            goal.disentanglement(z, mu, logvar, order, "reference"),
            goal.capacity(code),
            goal.behavioral_separation(
                see.mean_colour(recon), see.mean_colour(moved_structure), recon_edges, see.edges(moved_appearance),
                self.trivial,
            ),
            goal.latent_stats(z, code, "reference"),
            goal.reconstruction(recon, image, recon_edges, edges, self.trivial),
            goal.cross_recon(swap, see.edges(swap), edges, image.roll(-1, 0), self.trivial),
            goal.realism(self.discriminator(recon)),
            goal.consistency(mu[:, : cut[0]], other[:, : cut[0]], code.mu_variance[: cut[0]], "reference"),
        ]  # fmt: skip
        return dict(zip(goal.GOALS, values, strict=True)), image, recon

    def loss(self, raw: dict[str, Tensor]) -> Tensor:
        return plain_loss(raw, goal.anchors(self.config.batch_size), self.log, self.config.reduction)

    def gradients(self) -> list[Tensor | None]:
        self.discriminator.requires_grad_(False)
        self.loss(self.raw()[0]).backward()
        grads = [p.grad for p in self.vae.parameters()]
        self.optimizers[0].zero_grad()
        return grads

    def advance(self) -> None:
        self.discriminator.requires_grad_(False)
        raw, image, recon = self.raw()
        loss = self.loss(raw)
        loss.backward()
        self.discriminator.requires_grad_(True)
        judged = F.softplus(-self.discriminator(image)).mean() + F.softplus(self.discriminator(recon.detach())).mean()
        (judged / 2).backward()
        self.log["judge"] = judged.item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.vae.parameters(), strict=True):
                mean.lerp_(now, max(AVERAGE, 1 / (self.step + 1)))
        self.step += 1


def build(variant: str, batch: int, reduction: str, device: str, start: Sequence[Trainer] = ()) -> Any:
    """Return a trainer of this variant, with the weights of the trainer in ``start`` if there is one."""
    run = Plain(batch, reduction, device) if variant == "plain" else Routed(variant, batch, reduction, device)
    for other in start:
        run.vae.load_state_dict(other.vae.state_dict())
        run.average.load_state_dict(other.average.state_dict())
        run.discriminator.load_state_dict(other.discriminator.state_dict())
    return cast(Any, run)
