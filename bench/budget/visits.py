"""Count how well the owner that a sample had when it was last drawn predicts the one that it has now."""

from __future__ import annotations

import torch
from torch import Tensor

THIRDS = 3  # parts of a run


class Visits:
    """The owners of samples when they were last drawn, and how well these predict, by thirds of the run.

    Attributes:
        last: by sample, [N] int64; -1 before the first time.
        counts: samples that were drawn before; those of them with the same owner; with the owner most common in the
            previous step; and the sum of the steps since they were drawn, [3, 4].
        now, before: how often each goal owned these samples now, and when they were last drawn, [3, K].
    """

    def __init__(self, samples: int, goals: int) -> None:
        self.last = torch.full((samples,), -1)
        self._step = torch.zeros(samples)
        self._common = -1
        self.counts = torch.zeros(THIRDS, 4)
        self.now, self.before = torch.zeros(THIRDS, goals), torch.zeros(THIRDS, goals)

    def add(self, step: int, third: int, rows: Tensor, owners: Tensor) -> None:
        """Add the samples of a step, ``rows`` [B] and their owners [B], both int64."""
        old = self.last[rows]
        seen = old >= 0
        now, old, goals = owners[seen], old[seen], self.now.shape[1]
        age = (step - self._step[rows[seen]]).sum()
        self.counts[third] += torch.stack([seen.sum(), (now == old).sum(), (now == self._common).sum(), age])
        self.now[third] += now.bincount(minlength=goals)
        self.before[third] += old.bincount(minlength=goals)
        self.last[rows], self._step[rows] = owners, float(step)
        self._common = int(owners.bincount().argmax())

    def found(self) -> dict[str, list[float]]:
        """Return the fractions of samples whose owner was predicted, by thirds, and the mean steps between draws."""
        seen, same, common, age = self.counts.T
        chance = (self.now * self.before).sum(1) / seen.square()
        return {"last": figures(same / seen), "common": figures(common / seen), "chance": figures(chance),
                "age": figures(age / seen)}  # fmt: skip


def figures(x: Tensor) -> list[float]:
    """Return the values of a tensor [n], rounded for a file of results."""
    return [float(f"{value:.4g}") for value in x.tolist()]
