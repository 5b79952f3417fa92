"""The layout of a record of `goal_set` in Python. `RecordAt` of kernels/goal_set/goal_set.h is its twin in C++."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class RecordAt(NamedTuple):
    """Where each part of a record begins.

    Attributes:
        share, level, deficit: of G numbers each, one for each goal.
        raw, highest, ideal, slope: of K numbers each, one for each column.
        loss, finite: of one number each.
    """

    share: int
    level: int
    deficit: int
    raw: int
    highest: int
    ideal: int
    slope: int
    loss: int
    finite: int

    @classmethod
    def of(cls, goals: int, columns: int) -> RecordAt:
        """Return the layout for this many goals in this many columns."""
        return cls(*accumulate(_sizes(goals, columns)[:-1], initial=0))

    @property
    def size(self) -> int:
        """The length of a record."""
        return self.finite + 1


def _sizes(goals: int, columns: int) -> list[int]:
    """Return the length of each part, in the order of the fields of `RecordAt`."""
    return [goals] * 3 + [columns] * 4 + [1, 1]


def record_of(**parts: Tensor) -> Tensor:
    """Join the parts of a record, given by name: 1-dim, but ``loss`` and ``finite`` 0-dim."""
    return torch.cat([parts[name].reshape(-1) for name in RecordAt._fields])


def record_parts(record: Tensor, goals: int, columns: int) -> dict[str, Tensor]:
    """Return the parts of records [..., size] by name, views of the last axis.

    Of each of G goals ``share`` (who gets the gradient: its mean weight over the samples taken into the loss),
    ``level`` (mean score) and ``deficit`` (mean); of each of K columns ``raw`` (mean), ``highest`` (the largest finite
    raw value, -inf if there is none), ``ideal`` and ``slope`` (the first two parameters: 1 / slope is the scale);
    ``loss`` (its mean over samples where it is one per sample) and ``finite`` (1 or 0).
    """
    parts = dict(zip(RecordAt._fields, record.split(_sizes(goals, columns), dim=-1), strict=True))
    return {**parts, "loss": parts["loss"][..., 0], "finite": parts["finite"][..., 0]}
