"""The problems of the study: two small VAEs, on scikit-learn's digits and on the trainer's photographs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.policies.faults import Fault, lift
from bomkern import Lazy, lazy
from bomkern.train import features as see

JUDGE_LR = 3e-4


class Anchor(NamedTuple):
    """Deficit 0 at ``ideal``, 1 at ``nadir``; `Problem.anchors` are the outside targets that every arm is judged by."""

    ideal: float
    nadir: float


def _plus(value: Tensor, more: float) -> Tensor:
    return value + more


class Problem:
    """A model, its goals and a live discriminator.

    A subclass sets the attributes below, and defines `batch`, `forward`, `lazies`, `images` and `realism_outside`.

    Attributes:
        anchors: outside ideal and nadir of every goal, known before training and the same for every arm.
        drifting, blocked: the goals that faults act on.
        model, judge: networks. rate, steps: learning rate and training steps of the model.
        code: the [B, D] tensors that all goals of the last `raw` go through. last: the weight of the output layer.
        recon: the reconstructions of the last `raw`.
        samples: number of training samples, 0 where each step draws new ones. rows: those of the last `batch`, [B].
    """

    anchors: ClassVar[dict[str, Anchor]]
    drifting = "consistency"
    blocked: str
    model: nn.Module
    judge: nn.Module
    rate: float
    steps: int
    code: list[Tensor]
    last: Tensor
    recon: Tensor | Lazy
    samples = 0
    rows: Tensor

    def __init__(self, seed: int, fault: Fault, steps: int | None = None) -> None:
        self.fault, self.step = fault, 0
        self.steps = steps or self.steps
        torch.manual_seed(seed)
        self.build()
        self.draw = torch.Generator().manual_seed(1000 + seed)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.rate)
        self.judge_optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=JUDGE_LR * fault.judge_speed, betas=(0.5, 0.99)
        )
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for _ in range(fault.warm_up):
            with torch.no_grad():
                real = self.batch()
                fake = self.forward(real, self.draw)[1]
            self._train_judge(real, fake)

    def build(self) -> None:
        raise NotImplementedError

    def batch(self) -> Tensor:
        """Draw the training images of the next step."""
        raise NotImplementedError

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

    def raw(self) -> dict[str, Tensor]:
        """Return the raw values of the next batch, [B] each, with the planted fault."""
        self.image, self.before = self.batch(), self.draw.get_state()
        values, self.recon = self.forward(self.image, self.draw)
        return {**values, **self._lifted(values)}

    def lazy_raw(self) -> dict[str, Tensor | Lazy]:
        """Return the raw values of the next batch as `raw`, those of `lazies` lazy."""
        self.image, self.before = self.batch(), self.draw.get_state()
        values, self.recon = self.lazies(self.image, self.draw)
        return {**values, **self._lifted(values)}

    def _lifted(self, values: Mapping[str, Tensor | Lazy]) -> dict[str, Tensor | Lazy]:
        """Return the raw values of the goals that the fault lifts now."""
        drift, floor = lift(self.fault, min(1.0, self.step / self.steps))
        lifted: dict[str, Tensor | Lazy] = {}
        for name, amount in ((self.drifting, drift), (self.blocked, floor)):
            if amount:
                value, more = values[name], amount * (self.anchors[name].nadir - self.anchors[name].ideal)
                lifted[name] = lazy(_plus, value, more) if isinstance(value, Lazy) else value + more
        return lifted

    def outside(self, raw: dict[str, Tensor]) -> Tensor:
        """Return the batch's mean outside deficits, [K]."""
        return torch.stack(
            [(raw[name].detach().mean() - a.ideal) / (a.nadir - a.ideal) for name, a in self.anchors.items()]
        )

    def values_after_update(self) -> dict[str, Tensor]:
        """Return the raw values of the last batch and noise with the current model, without gradient or fault."""
        draw = torch.Generator()
        draw.set_state(self.before)
        with torch.no_grad():
            return self.forward(self.image, draw)[0]

    def update(self, fake: Tensor | None = None) -> None:
        """Take the model's step after a backward, then the judge's.

        Args:
            fake: the reconstructions that the judge trains on, any number of rows; None for those of the last `raw`.
        """
        if fake is None:  # before the weights change, because the rows that were left out are made here
            fake = self.recon.value if isinstance(self.recon, Lazy) else self.recon.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            weight = max(0.01, 1 / (self.step + 1))
            for name, p in self.model.named_parameters():
                self.average[name].lerp_(p, weight)
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

    # For `bomkern.probe`.

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "draw": self.draw.get_state(), "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.average = state["step"], state["average"]
        self.draw.set_state(state["draw"])

    # What is measured.

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Any]:
        """Evaluate the averaged weights on a held-out split, without any planted lift.

        Returns:
            PSNR in dB, SSIM, and every goal's outside deficit ``(raw - ideal) / (nadir - ideal)``, of which ``worst``
            is the largest. Realism's deficit is `realism_outside`, because each arm trains its own judge.
        """
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._load(self.average)
        image = self.images(split)
        raw, _ = self.forward(image, torch.Generator().manual_seed(7))
        recon = self.decode_means(image)
        self._load(trained)
        deficits = dict(zip(self.anchors, self.outside(raw).tolist(), strict=True))
        deficits["realism"] = self.realism_outside(recon, image)
        return {
            "psnr": float(-10 * (recon - image).square().mean().log10()),
            "ssim": 1 - float(see.dissimilarity(recon, image).mean()),
            "worst": max(deficits.values()),
            "deficits": deficits,
            "kl": float(raw["kl_divergence"].mean()),
            "active": float(self.active),
        }

    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])


def transport(a: Tensor, b: Tensor) -> Tensor:
    """Return the Wasserstein-1 distance of two samples [n, F], averaged over the columns."""
    return (a.sort(0).values - b.sort(0).values).abs().mean()
