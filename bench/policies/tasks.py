"""Many tasks on scikit-learn's digits: one shared network, and a head for each task."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.policies.digits import SPLITS
from bench.policies.problem import Anchor, Measure, Problem

BATCH = 64
NOISE = 0.2  # standard deviation of the noise that is added to the pixels of a training batch, which lie in [0, 1]
LEVELS = 16  # grey levels of the data set
CLASSES = 10


class Split(NamedTuple):
    """Pixels [n, 64] from 0 to 1, labels [n] int64, and mean ink [n] in grey levels."""

    pixels: Tensor
    labels: Tensor
    ink: Tensor


@lru_cache
def digits() -> dict[str, Split]:
    """Return the splits, with the same rows as those of the VAE."""
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(loaded.data).float()[order] / LEVELS
    labels = torch.from_numpy(loaded.target).long()[order]
    return {name: Split(pixels[rows], labels[rows], LEVELS * pixels[rows].mean(1)) for name, rows in SPLITS.items()}


def entropy(shares: Tensor) -> float:
    """Return the entropy of frequencies, in nats: the cross-entropy of a predictor that knows nothing else."""
    return float(-(shares * shares.clamp(min=1e-12).log()).sum())


def f1(predicted: Tensor, true: Tensor) -> float:
    """Return the F1 score of two boolean tensors: 0 where nothing is found."""
    return float(2 * (predicted & true).sum() / (predicted.sum() + true.sum()).clamp(min=1))


def explained(predicted: Tensor, true: Tensor) -> float:
    """Return the part of the variance that is explained, at least 0."""
    return max(0.0, 1 - float((predicted - true).square().mean() / true.var(0, correction=0).mean()))


class Tasks(Problem):
    """A network with a narrow last layer, which the tasks share, and one linear head each.

    Attributes:
        hidden, narrow: units of the two shared layers. outputs: those of all heads together.
    """

    family = "tasks13"
    extras = (Measure("least", "least score of a task", 3),)
    rate, steps = 3e-3, 1200
    samples = SPLITS["train"].stop
    hidden, narrow = 64, 12
    outputs: ClassVar[int]

    def build(self, seed: int) -> None:
        self.model = nn.Sequential(
            nn.Linear(64, self.hidden),
            nn.SiLU(),
            nn.Linear(self.hidden, self.narrow),
            nn.SiLU(),
            nn.Linear(self.narrow, self.outputs),
        )

    def batch(self) -> Split:
        self.rows = torch.randint(self.samples, (BATCH,), generator=self.draw)
        clean = digits()["train"]
        noise = NOISE * torch.randn(BATCH, 64, generator=self.draw)
        self.target = clean.pixels[self.rows]
        return Split(self.target + noise, clean.labels[self.rows], clean.ink[self.rows])

    def values(self, inputs: Split, draw: torch.Generator) -> dict[str, Tensor]:
        return self.losses(self.model(inputs.pixels), inputs, self.target)

    def losses(self, out: Tensor, split: Split, target: Tensor) -> dict[str, Tensor]:
        """Return the loss of every task, [B] each, of the outputs [B, outputs] and the pixels without noise."""
        raise NotImplementedError

    def scores(self, out: Tensor, split: Split) -> dict[str, float]:
        """Return the held-out score of every task, 1 for a perfect one."""
        raise NotImplementedError

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, Any]]:
        data = digits()[split]
        out = self.model(data.pixels)
        scores = self.scores(out, data)
        figures = {"score": sum(scores.values()) / len(scores), "least": min(scores.values()), "scores": scores}
        return self.named_deficits(self.losses(out, data, data.pixels)), figures


def _binary(share: float) -> Anchor:
    return Anchor(0.0, entropy(torch.tensor([share, 1 - share])))


class Tasks13(Tasks):
    """Thirteen tasks: each digit against the rest, parity, mean ink in grey levels, and the pixels.

    Binary tasks have a cross-entropy in nats, whose nadir is the entropy of the labels' frequencies, and are scored by
    F1. The others have a mean squared error, whose nadir is the variance, and are scored by the explained variance. The
    mean ink is 4.9 with a standard deviation of 0.54, and its head starts at 0: some 80 nadirs away.
    """

    title = "13 tasks"
    measure = Measure("score", "mean F1 or explained variance", 3)
    outputs = CLASSES + 2 + 64
    drifting, blocked = "digit 8", "parity"
    anchors: ClassVar = {
        **{f"digit {d}": _binary(float((digits()["train"].labels == d).float().mean())) for d in range(CLASSES)},
        "parity": _binary(float((digits()["train"].labels % 2).float().mean())),
        "ink": Anchor(0.0, float(digits()["train"].ink.var(correction=0))),
        "pixels": Anchor(0.0, float(digits()["train"].pixels.var(0, correction=0).mean())),
    }

    def losses(self, out: Tensor, split: Split, target: Tensor) -> dict[str, Tensor]:
        truth = torch.cat([F.one_hot(split.labels, CLASSES), split.labels[:, None] % 2], 1).float()
        binary = F.binary_cross_entropy_with_logits(out[:, : CLASSES + 1], truth, reduction="none")
        ink = (out[:, CLASSES + 1] - split.ink).square()
        pixels = (out[:, CLASSES + 2 :] - target).square().mean(1)
        return dict(zip(self.anchors, [*binary.unbind(1), ink, pixels], strict=True))

    def scores(self, out: Tensor, split: Split) -> dict[str, float]:
        found = out[:, : CLASSES + 1] > 0
        truth = [split.labels == d for d in range(CLASSES)] + [split.labels % 2 == 1]
        scores = [f1(found[:, k], true) for k, true in enumerate(truth)]
        scores += [explained(out[:, CLASSES + 1], split.ink), explained(out[:, CLASSES + 2 :], split.pixels)]
        return dict(zip(self.anchors, scores, strict=True))


class Tasks3(Tasks):
    """Three tasks: the class, parity, and the mean ink, standardised.

    Nadirs are as in `Tasks13`. The class and parity are scored by accuracy, the ink by the explained variance.
    """

    title = "3 tasks"
    family = "tasks3"
    measure = Measure("score", "mean accuracy or explained variance", 3)
    outputs = CLASSES + 2
    drifting, blocked = "ink", "parity"
    anchors: ClassVar = {
        "class": Anchor(0.0, entropy(digits()["train"].labels.bincount().float() / SPLITS["train"].stop)),
        "parity": Tasks13.anchors["parity"],
        "ink": Anchor(0.0, 1.0),
    }

    @staticmethod
    def standard(ink: Tensor) -> Tensor:
        train = digits()["train"].ink
        return (ink - train.mean()) / math.sqrt(Tasks13.anchors["ink"].nadir)

    def losses(self, out: Tensor, split: Split, target: Tensor) -> dict[str, Tensor]:
        kind = F.cross_entropy(out[:, :CLASSES], split.labels, reduction="none")
        parity = F.binary_cross_entropy_with_logits(out[:, CLASSES], split.labels % 2.0, reduction="none")
        ink = (out[:, CLASSES + 1] - self.standard(split.ink)).square()
        return {"class": kind, "parity": parity, "ink": ink}

    def scores(self, out: Tensor, split: Split) -> dict[str, float]:
        return {
            "class": float((out[:, :CLASSES].argmax(1) == split.labels).float().mean()),
            "parity": float(((out[:, CLASSES] > 0) == (split.labels % 2 == 1)).float().mean()),
            "ink": explained(out[:, CLASSES + 1], self.standard(split.ink)),
        }


class Tasks13SGD(Tasks13):
    title = "13 tasks, SGD"
    faults = ("none",)
    momentum = True
    rate, steps = 2e-2, 2000


class Tasks3SGD(Tasks3):
    title = "3 tasks, SGD"
    faults = ("none",)
    momentum = True
    rate, steps = 3e-2, 1200
