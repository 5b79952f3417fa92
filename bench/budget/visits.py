"""Count how well the owner that a sample had when it was last drawn predicts the one that it has now."""

from __future__ import annotations

import torch
from torch import Tensor

THIRDS = 3  # parts of a run


class Visits:
    """The owners of samples when they were last drawn, and how well these predict, by thirds of a run.

    Attributes:
        last: by sample, [N] int64; -1 before the first time. N is 0 where all samples are new.
        counts: samples that were drawn before, or all if N is 0; those of them with the same owner; with the owner
            most common in the previous step; and the sum of the steps since they were drawn, [3, 4].
        now, before: how often each goal owned these samples now, and when they were last drawn, [3, K].
    """

    def __init__(self, samples: int, goals: int) -> None:
        self.last = torch.full((samples,), -1)
        self._step = torch.zeros(samples)
        self._common = -1
        self.counts = torch.zeros(THIRDS, 4)
        self.now, self.before = torch.zeros(THIRDS, goals), torch.zeros(THIRDS, goals)

    def add(self, step: int, third: int, owners: Tensor, rows: Tensor | None = None) -> None:
        """Add the owners of a step, [B] int64, and which samples they are of, [B]; without these all are new."""
        if rows is not None:
            old, at = self.last[rows], self._step[rows]
            self.last[rows], self._step[rows] = owners, float(step)
            seen = old >= 0
            now, old, age = owners[seen], old[seen], (step - at[seen]).sum()
        else:
            now, old, age = owners, owners, torch.zeros(())
        goals = self.now.shape[1]
        self.counts[third] += torch.stack(
            [torch.tensor(len(now)), (now == old).sum(), (now == self._common).sum(), age]
        )
        self.now[third] += now.bincount(minlength=goals)
        self.before[third] += old.bincount(minlength=goals)
        self._common = int(owners.bincount().argmax())

    def found(self) -> dict[str, list[float]]:
        """Return the fractions of samples whose owner was predicted, by thirds, and the mean steps between draws."""
        total, same, common, age = self.counts.T
        chance = (self.now * self.before).sum(1) / total.square()
        again = {"last": figures(same / total), "age": figures(age / total)} if len(self.last) else {}
        return {**again, "common": figures(common / total), "chance": figures(chance)}


def figures(x: Tensor) -> list[float]:
    """Return the values of a tensor [n], rounded for a file of results."""
    return [float(f"{value:.4g}") for value in x.tolist()]
