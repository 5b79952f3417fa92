"""VICReg (Bardes, Ponce & LeCun 2022) on scikit-learn's digits, judged by a linear probe."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.policies.digits import SPLITS
from bench.policies.problem import Anchor, Measure, Problem
from bench.policies.tasks import CLASSES, digits
from bomkern import covariance_penalty

BATCH, FEATURES, EMBEDDING, HIDDEN = 128, 32, 64, 128
NOISE, CONTRAST = 0.3, 0.2  # standard deviations of the views' noise and of the logarithm of their contrast
SETS, LABELLED = 10, 100  # a probe sees few labels, and is repeated on other ones
RIDGE = 1e-2  # of the probe, as a part of the mean variance of a feature
FLOOR = (EMBEDDING - 1) / (BATCH - 1)  # covariance of independent columns with variance 1


def view(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Return images [n, 64] that are moved by up to a pixel each way, with another contrast and noise."""
    count = len(pixels)
    wide = F.pad(pixels.view(count, 8, 8), (1, 1, 1, 1))
    down, right = torch.randint(3, (2, count, 1, 1), generator=draw)
    span = torch.arange(8)
    moved = wide[torch.arange(count)[:, None, None], down + span[:, None], right + span].flatten(1)
    contrast = torch.exp(CONTRAST * torch.randn(count, 1, generator=draw))
    return (moved * contrast + NOISE * torch.randn(count, 64, generator=draw)).clamp(0, 1)


def probe(features: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Return the classes of ``others`` by a ridge regression of one-hot ``labels`` on ``features``, in closed form."""
    x, other = features.double(), others.double()
    mean = x.mean(0)
    x, other = x - mean, other - mean
    targets = F.one_hot(labels, CLASSES).double()
    centred = targets - targets.mean(0)
    gram = x.T @ x
    gram += (RIDGE * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    return (other @ torch.linalg.solve(gram, x.T @ centred) + targets.mean(0)).argmax(1)


class VICReg(Problem):
    """Three goals: invariance of two views, the hinge of the standard deviation, and covariance, at the embedding.

    Anchors: two independent views of variance 1, the hinge's target, differ by 2; the hinge is 1 where all embeddings
    are the same; a covariance of independent columns is the floor, and 2 above it the nadir.
    """

    title = "VICReg"
    family = "vicreg"
    measure = Measure("accuracy", "accuracy of a linear probe", 3)
    rate, steps = 2e-3, 800
    samples = SPLITS["train"].stop
    drifting, blocked = "covariance", "invariance"
    anchors: ClassVar = {
        "invariance": Anchor(0.0, 2.0),
        "variance": Anchor(0.0, 1.0),
        "covariance": Anchor(FLOOR, FLOOR + 2),
    }

    def build(self, seed: int) -> None:
        encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, FEATURES), nn.SiLU())
        expander = nn.Sequential(nn.Linear(FEATURES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.model = nn.Sequential(encoder, expander)

    def batch(self) -> Tensor:
        self.rows = torch.randint(self.samples, (BATCH,), generator=self.draw)
        pixels = digits()["train"].pixels[self.rows]
        return torch.cat([view(pixels, self.draw), view(pixels, self.draw)])

    def values(self, inputs: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        both = self.model(inputs)
        one, other = both.chunk(2)
        spread = [torch.sqrt(x.var(0) + 1e-4) for x in (one, other)]
        return {
            "invariance": (one - other).square().mean(1),
            "variance": torch.stack([F.relu(1 - s).mean() for s in spread]).mean(),
            "covariance": (covariance_penalty(one) + covariance_penalty(other)) / 2,
        }

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        data, train = digits()[split], digits()["train"]
        draw = torch.Generator().manual_seed(7)
        chunks = data.pixels[: len(data.pixels) // BATCH * BATCH].split(BATCH)  # the covariance's floor depends on B
        found = [self.outside(self.values(torch.cat([view(x, draw), view(x, draw)]), draw)) for x in chunks]
        deficits = dict(zip(self.anchors, torch.stack(found).mean(0).tolist(), strict=True))
        encoder = self.model[0]
        known, features = encoder(train.pixels), encoder(data.pixels)
        rows = torch.randperm(len(known), generator=draw)[: SETS * LABELLED].view(SETS, LABELLED)
        hits = [probe(known[few], train.labels[few], features) == data.labels for few in rows]
        return deficits, {"accuracy": float(torch.stack(hits).float().mean())}


class VICRegSGD(VICReg):
    title = "VICReg, SGD"
    faults = ("none",)
    momentum = True
    rate, steps = 0.15, 1000
