"""Warn once of the goals of a `bomkern.GoalSet` that have no graph; no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.host_copy import HostCopy
from ..ops.without_graph import LOOKS, columns_without, warn


class WithoutGraph:
    """What the host knows of the goals of one `GoalSet` that have no graph.

    Args:
        goals: names of the goals.
        owner: index of the goal of each column.

    Attributes:
        left: number of the next steps that are checked.
        found: goals without a graph, of which the user does not know yet.
    """

    def __init__(self, goals: Sequence[str], owner: Sequence[int]) -> None:
        self._goals, self._owner = list(goals), list(owner)
        self.left, self.found, self._told = LOOKS, list[int](), False
        self._copy: HostCopy | None = None

    def look(self, tensors: Sequence[Any]) -> None:
        """Check the columns of a step."""
        if torch.is_grad_enabled():
            self.left -= 1
            self.note(columns_without(tensors))

    def note(self, without: int) -> None:
        """Note the columns without a graph, a bit mask. A goal has a graph if any of its members has one."""
        if without and not self._told:
            moving = {g for k, g in enumerate(self._owner) if not without >> k & 1}
            self.found = [g for g in range(len(self._goals)) if g not in moving]

    def look_again(self) -> None:
        """Check the next step, because the loop may have changed."""
        if not self._told:
            self.left = max(self.left, 1)

    def tell(self, shares: Tensor) -> None:
        """Warn as soon as the shares of the steps so far, [n, G] on the device, are on the host; do not wait."""
        if self._copy is None:
            self._copy = HostCopy(shares.nanmean(0))
        if self._copy.ready():
            mean = self._copy.wait().tolist()
            found, self.found, self._copy = self.found, [], None
            self._told, self.left = True, 0
            warn([self._goals[g] for g in found], [mean[g] for g in found], " (`GoalSet(..., monitor={...})`)")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}  # a copy under way holds an event, which cannot be copied
