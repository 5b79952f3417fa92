"""The record of a step of a `bomkern.GoalSet`: whose its numbers are, and how the ranks' records become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import Ranks
from ..common.reductions import Reduction
from ..reference import RecordAt, record_parts, worst_of
from .constraint_info import ConstraintInfo, from_text


class Layout:
    """Whose numbers a record holds.

    Attributes:
        goals: G names.
        columns: K names: a goal's own, or "goal.member".
        owner: the goal's index of each column.
        constraints: what is known of each column's constraint or policy. A string, how it prints, is read too.
        most: the largest share that a goal can hold: less than 1 where the rule gives every goal a part.
    """

    def __init__(
        self,
        goals: Sequence[str],
        columns: Sequence[str],
        owner: Sequence[int],
        constraints: Sequence[ConstraintInfo | str],
        most: float = 1.0,
    ) -> None:
        self.most = most
        self.goals, self.columns, self.owner = list(goals), list(columns), list(owner)
        self.constraints = [from_text(given) if isinstance(given, str) else given for given in constraints]

    @property
    def at(self) -> RecordAt:
        """Where the parts of a record begin."""
        return RecordAt.of(len(self.goals), len(self.columns))

    @property
    def size(self) -> int:
        return self.at.size

    def parts(self, records: Tensor) -> dict[str, Tensor]:
        """See `record_parts`; ``scale`` in place of ``slope``."""
        found = record_parts(records, len(self.goals), len(self.columns))
        found["scale"] = 1 / found.pop("slope")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Constraints are texts, as in the files of every version; `History.save` writes the rest."""
        return {**vars(self), "constraints": [str(constraint) for constraint in self.constraints]}


def share_record(
    loss: Tensor, record: Tensor, goals: int, columns: int, reduction: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Make the loss and the record of the whole batch from those of each rank's part, by one gather.

    Args:
        loss: 0-dim, or [B] where ``reduction`` is NONE: then it stays as it is.
        record: [size].

    Returns:
        The loss, equal on all ranks, whose gradient is a rank's part of it in a mean over the ranks; the record.
    """
    own = loss.detach().mean().to(record.dtype)
    gathered = ranks.gather(torch.cat([record.detach(), own[None]]))  # [W, size + 1]
    records, losses = gathered[:, : len(record)], gathered[:, len(record)]
    together = records.mean(0)
    parts = record_parts(records, goals, columns)
    merged = record_parts(together, goals, columns)
    merged["highest"].copy_(parts["highest"].amax(0))
    merged["finite"].copy_(parts["finite"].amin(0))
    if reduction == Reduction.NONE:
        return loss, together
    known, weight = losses.mean(), torch.ones_like(own)
    if reduction == Reduction.SUM:
        known, weight = losses.sum(), weight * ranks.size
    elif reduction == Reduction.MIN:
        worst = worst_of(losses, 0).reshape(1)
        known, weight = losses.index_select(0, worst)[0], (worst[0] == ranks.rank) * weight * ranks.size
        merged["share"].copy_(parts["share"].index_select(0, worst)[0])
    merged["loss"].copy_(known)
    return ranks.shared(loss, known, weight), together
