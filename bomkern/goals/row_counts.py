"""How many samples the numbers of each step of a `bomkern.GoalSet` rest on, as far as the host knows without a wait."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

Known = int | None  # samples of every goal in a step; None where a tensor on the device holds a number for each


class RowCounts:
    """A log of the samples of each step, from which the history is completed when records arrive on the host.

    A step without masks and budget has one number of samples, which the host knows, so that it costs no tensor op.
    The numbers of other steps are in a ring on the device beside the records.

    Attributes:
        on_device: whether any step has put its numbers into the ring.
    """

    def __init__(self) -> None:
        self.on_device = False
        self._runs: list[tuple[int, Known]] = []  # the first step of each run of steps that are alike
        self._captured: set[Known] = set()  # of the steps in CUDA graphs, whose replays the host does not see

    def note(self, step: int, rows: Known) -> None:
        """Note the samples of a step, by its number."""
        if not self._runs or self._runs[-1][1] != rows:
            self._runs.append((step, rows))
            self.on_device |= rows is None

    def note_captured(self, rows: Known) -> None:
        """Note the samples of a step that a CUDA graph holds."""
        self._captured.add(rows)
        self.on_device |= rows is None

    def restart(self) -> None:
        """Forget all steps; graphs that were captured may still be replayed."""
        self._runs = []

    def take(self, first: int, until: int, known: int, ring: Tensor | None, columns: int) -> Tensor:
        """Return the samples of the steps from ``first`` to ``until``, [n, K] float32, and forget these steps.

        Args:
            first, until: numbers of steps; the records of those before ``first`` are lost, or were taken before.
            known: the number of steps that the host knew of. It saw no others, up to ``until``: these were replayed.
            ring: the numbers of the same steps on the device, [n, K], where such were written.
            columns: K.

        Where replayed steps and others differ, the host cannot tell which are which, and the numbers are NaN.
        """
        replayed = until - known
        both = pairwise([*self._runs, (known, None)])
        runs = [(step, min(end, known), rows) for (step, rows), (end, _) in both if step < known]
        if replayed > 0:
            begun = [rows for _, end, rows in runs if end > first]
            alike = {*begun, *self._captured}
            runs = [(first, until, alike.pop())] if len(alike) == 1 else []
        counts = torch.full((until - first, columns), math.nan, dtype=torch.float32, device="cpu")
        for step, end, rows in runs:
            part = slice(max(step - first, 0), max(end - first, 0))
            if rows is not None:
                counts[part] = rows
            elif ring is not None:
                counts[part] = ring[part]
        later = [(step + max(replayed, 0), rows) for step, rows in self._runs if step >= known]
        last = [(until, rows) for step, rows in self._runs if step < known][-1:]
        self._runs = later if later and later[0][0] == until else last + later
        return counts
