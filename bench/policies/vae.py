"""The two VAEs' part of a problem: a live discriminator, reconstructions, and figures of images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.policies.faults import FAULTS, Fault
from bench.policies.problem import Measure, Problem
from bomkern import Lazy
from bomkern.train import features as see

JUDGE_LR = 3e-4


class VAE(Problem):
    """A variational autoencoder and a live discriminator.

    A subclass defines `build`, `batch`, `forward`, `lazies`, `images`, `decode_means` and `realism_outside`.

    Attributes:
        model, judge: networks.
        code: the [B, D] tensors that all goals of the last `raw` go through. last: the weight of the output layer.
        recon: the reconstructions of the last `raw`.
    """

    measure = Measure("psnr", "PSNR, dB")
    extras = (
        Measure("ssim", "SSIM", 3),
        Measure("kl", "KL, nats", 1, larger=False),
        Measure("active", "active units"),
    )
    drifting = "consistency"
    faults: ClassVar = tuple(FAULTS)
    judge: nn.Module
    code: list[Tensor]
    last: Tensor
    recon: Tensor | Lazy

    def __init__(self, seed: int, fault: Fault, steps: int | None = None) -> None:
        super().__init__(seed, fault, steps)
        self.judge_optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=JUDGE_LR * fault.judge_speed, betas=(0.5, 0.99)
        )
        for _ in range(fault.warm_up):
            with torch.no_grad():
                real = self.batch()
                fake = self.forward(real, self.draw)[1]
            self._train_judge(real, fake)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=self.rate)

    @property
    def image(self) -> Tensor:
        """The last batch, [B, C, H, W]."""
        return self.inputs

    @property
    def state(self) -> list[Any]:
        return [self.judge, self.judge_optimizer, *super().state]

    def forward(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Return raw values of every goal, [B] each, and the reconstructions that the judge sees."""
        raise NotImplementedError

    def lazies(self, image: Tensor, draw: torch.Generator) -> tuple[dict[str, Tensor | Lazy], Lazy]:
        """Return the same as `forward`; what is computed from reconstructions, and these themselves, is lazy."""
        raise NotImplementedError

    def images(self, split: str) -> Tensor:
        """Return the images of "validation" or "test"."""
        raise NotImplementedError

    def decode_means(self, image: Tensor) -> Tensor:
        """Return reconstructions from the posterior means."""
        raise NotImplementedError

    def realism_outside(self, recon: Tensor, image: Tensor) -> float:
        """Return the distance between the distributions of fixed features, over that of a trivial answer: 0 to 1."""
        raise NotImplementedError

    # One step.

    def values(self, inputs: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        values, self.recon = self.forward(inputs, draw)
        return values

    def lazy_raw(self) -> dict[str, Tensor | Lazy]:
        """Return the raw values of the next batch as `raw`, those of `lazies` lazy."""
        self.inputs, self.before = self.batch(), self.draw.get_state()
        values, self.recon = self.lazies(self.inputs, self.draw)
        return {**values, **self.lifted(values)}

    def update(self, fake: Tensor | None = None) -> None:
        """Take the model's step after a backward, then the judge's.

        Args:
            fake: the reconstructions that the judge trains on, any number of rows; None for those of the last `raw`.
        """
        if fake is None:  # before the weights change, because the rows that were left out are made here
            fake = self.recon.value if isinstance(self.recon, Lazy) else self.recon.detach()
        super().update()
        if self.step > self.fault.judge_from:
            self._train_judge(self.image, fake)

    def _train_judge(self, real: Tensor, fake: Tensor) -> None:
        for p in self.judge.parameters():
            p.requires_grad_(True)
        yes, no = self.judge(torch.cat([real, fake])).flatten(1).mean(1).split([len(real), len(fake)])
        yes, no = F.softplus(-yes), F.softplus(no)
        # Equal up to rounding where both are as many; runs of whole batches keep their bits.
        loss = (yes + no).mean() / 2 if len(real) == len(fake) else (yes.mean() + no.mean()) / 2
        loss.backward()
        self.judge_optimizer.step()
        self.judge_optimizer.zero_grad()
        for p in self.judge.parameters():
            p.requires_grad_(False)  # the model's step needs no gradient of the judge's weights

    # What is measured.

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return deficits and figures. Realism's is `realism_outside`, because each arm trains its own judge."""
        image = self.images(split)
        raw, _ = self.forward(image, torch.Generator().manual_seed(7))
        recon = self.decode_means(image)
        deficits = self.named_deficits(raw)
        deficits["realism"] = self.realism_outside(recon, image)
        return deficits, {
            "psnr": float(-10 * (recon - image).square().mean().log10()),
            "ssim": 1 - float(see.dissimilarity(recon, image).mean()),
            "kl": float(raw["kl_divergence"].mean()),
            "active": float(self.active),
        }


def transport(a: Tensor, b: Tensor) -> Tensor:
    """Return the Wasserstein-1 distance of two samples [n, F], averaged over the columns."""
    return (a.sort(0).values - b.sort(0).values).abs().mean()
