"""The layout of a record of `goal_set` in Python. `RecordAt` of kernels/goal_set/goal_set.h is its twin in C++."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class RecordAt(NamedTuple):
    """The offset of each part of a record.

    Attributes:
        share, level, deficit: G numbers each, one per goal.
        raw, highest, ideal, slope: K numbers each, one per column.
        loss, finite: one number each.
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
    """Concatenate the parts of a record, which are passed by name: ``loss`` and ``finite`` 0-dim, the others 1-dim."""
    return torch.cat([parts[name].reshape(-1) for name in RecordAt._fields])


def record_parts(record: Tensor, goals: int, columns: int) -> dict[str, Tensor]:
    """Return the parts of records [..., size] by name, views of the last axis.

    For each of G goals: ``share`` (its mean weight in the gradient over the samples in the loss), ``level`` (mean
    score, at most 1) and ``deficit`` (mean). For each of K columns: ``raw`` (mean), ``highest`` (the largest finite raw
    value, -inf if there is none), ``ideal`` and ``slope`` (the first two parameters; 1 / slope is the scale). For the
    step: ``loss`` (its mean, if there is one per sample) and ``finite`` (1 or 0). With masks ``level``, ``deficit`` and
    ``raw`` are means over the samples that have the goal or column, NaN if none has.
    """
    parts = dict(zip(RecordAt._fields, record.split(_sizes(goals, columns), dim=-1), strict=True))
    return {**parts, "loss": parts["loss"][..., 0], "finite": parts["finite"][..., 0]}
