"""The record of a step of a `bomkern.GoalSet`: its layout, and how the records of all ranks are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import Ranks
from ..common.reductions import Reduction
from ..reference import RecordAt, record_of, record_parts, worst_of
from .constraint_info import ConstraintInfo, from_text


class Layout:
    """The goals and columns whose numbers a record holds.

    Attributes:
        goals: G names.
        columns: K names: a goal's own, or "goal.member".
        owner: index of the goal of each column.
        constraints: description of each column's constraint or policy. A string, the text that it prints, is read too.
        most: the largest share that the rule gives to one goal. It is less than 1 if every goal has a part.
        least: the smallest share that the rule gives to one goal.
    """

    def __init__(
        self,
        goals: Sequence[str],
        columns: Sequence[str],
        owner: Sequence[int],
        constraints: Sequence[ConstraintInfo | str],
        most: float = 1.0,
        least: float = 0.0,
    ) -> None:
        self.most, self.least = most, least
        self.goals, self.columns, self.owner = list(goals), list(columns), list(owner)
        self.constraints = [from_text(given) if isinstance(given, str) else given for given in constraints]

    @property
    def at(self) -> RecordAt:
        """The offsets of the parts of a record."""
        return RecordAt.of(len(self.goals), len(self.columns))

    @property
    def size(self) -> int:
        return self.at.size

    def parts(self, records: Tensor) -> dict[str, Tensor]:
        """Return the parts of records by name, as `record_parts` does, with ``scale`` in place of ``slope``.

        Records of `counted` have one part more, ``rows``.
        """
        records, counts = records.tensor_split([self.size], -1)
        parts = record_parts(records, len(self.goals), len(self.columns))
        parts["scale"] = 1 / parts.pop("slope").abs()  # the constraint says which side is worse
        return {**parts, "rows": counts} if counts.shape[-1] else parts

    def counted(self, records: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return records [n, size] with the number of samples of each column behind them, [n, size + K].

        Args:
            records: [n, size]; with numbers of samples they are returned as they are.
            counts: [n, K]; without, the numbers are NaN.
        """
        if records.shape[-1] != self.size:
            return records
        if counts is None:
            counts = records.new_full((len(records), len(self.columns)), torch.nan)
        return torch.cat([records, counts.to(records)], -1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values. Constraints are texts, as in files of every version; `History.save` adds the rest."""
        plain = {name: getattr(self, name) for name in ("goals", "columns", "owner", "most")}
        return {**plain, "constraints": [str(constraint) for constraint in self.constraints]}


def merge_records(records: Tensor, weights: Tensor, goals: int, columns: int, reduction: int) -> tuple[Tensor, Tensor]:
    """Merge the records of parts of a batch into that of the whole batch.

    Means are weighted, ``highest`` is the largest and ``finite`` the least. Ideals and slopes are those of the last
    part. The loss is the sum for ``SUM``. For ``MIN`` loss and shares are those of the part with the worst loss. A
    batch without samples has loss 0 and no shares.

    Args:
        records: [n, size], one row for each part.
        weights: [n, size], the number of samples that each number is a mean of. A NaN in a record that is finite
            belongs to a goal without samples, and has weight 0.

    Returns:
        The record, [size], NaN where all weights are 0; and the sums of the weights, [size].
    """
    parts = record_parts(records, goals, columns)
    weights = torch.where(records.isnan() & (parts["finite"] > 0)[:, None], 0, weights)
    total = weights.sum(0)
    together = torch.where(weights > 0, records * (weights / total), 0).sum(0)
    together = torch.where(total > 0, together, torch.nan)
    merged = record_parts(together, goals, columns)
    merged["highest"].copy_(parts["highest"].amax(0))
    merged["finite"].copy_(parts["finite"].amin(0))
    for name in ("ideal", "slope"):
        merged[name].copy_(parts[name][-1])
    if reduction == Reduction.SUM:
        merged["loss"].copy_(parts["loss"].sum(0))
    elif reduction == Reduction.MIN:
        worst = _worst(parts["loss"], record_parts(weights, goals, columns)["loss"])
        merged["loss"].copy_(parts["loss"].index_select(0, worst)[0])
        merged["share"].copy_(parts["share"].index_select(0, worst)[0])
    of_loss = record_parts(total, goals, columns)["loss"]
    for name in ("share", "loss"):
        merged[name].copy_(torch.where(of_loss > 0, merged[name], 0))
    return together, total


def _worst(losses: Tensor, samples: Tensor) -> Tensor:
    """Return the index [1] of the worst loss of the parts that have samples."""
    return worst_of(torch.where(samples > 0, losses, -torch.inf), 0).reshape(1)


def weights_of(counts: Tensor, goals: int, columns: int) -> Tensor:
    """Return the number of samples that each number of a record is a mean of, [size].

    Args:
        counts: [1 + G + K], `reference.counts_of` a mask.
    """
    samples, of_goals, of_columns = counts.split([1, goals, columns])
    each = samples.expand(columns)
    return record_of(
        share=samples.expand(goals),
        level=of_goals,
        deficit=of_goals,
        raw=of_columns,
        highest=of_columns,
        ideal=each,
        slope=each,
        loss=samples,
        finite=samples,
    )


def share_record(
    loss: Tensor,
    record: Tensor,
    goals: int,
    columns: int,
    reduction: int,
    ranks: Ranks,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the losses and records of all ranks into those of the whole batch, by one gather.

    Args:
        loss: this rank's loss, 0-dim, or [B] if ``reduction`` is NONE: then it is returned unchanged.
        record: this rank's record, [size].
        samples: with masks the number of each rank's samples that have a goal, [W]. The means in the loss and in the
            record are then this rank's part of those of the whole batch, and are added.

    Returns:
        The loss, equal on all ranks, and the record. The mean over the ranks of the gradients of the loss is the
        gradient of the whole batch.
    """
    own = loss.detach().mean().to(record.dtype)
    gathered = ranks.gather(torch.cat([record.detach(), own[None]]))  # [W, size + 1]
    records, losses = gathered[:, : len(record)], gathered[:, len(record)]
    parts, weights = record_parts(records, goals, columns), torch.ones_like(records)
    if reduction != Reduction.NONE:  # there the record's is the mean over the samples that count
        parts["loss"].copy_(losses)
    parted = samples is not None  # means are parts of those of the whole batch
    if samples is None:
        samples = weights[:, -1]
    else:
        record_parts(weights, goals, columns)["loss"].copy_(samples)
    together, _ = merge_records(records, weights, goals, columns, reduction)
    merged = record_parts(together, goals, columns)
    added = reduction == Reduction.SUM or (parted and reduction != Reduction.MIN)
    for name in ("level", "deficit", "raw", *(("share", "loss") if added else ())) if parted else ():
        merged[name].copy_(parts[name].sum(0))
    if reduction == Reduction.NONE:
        return loss, together
    weight = torch.ones_like(own)
    if added:
        weight = weight * ranks.size
    elif reduction == Reduction.MIN:
        weight = (_worst(losses, samples)[0] == ranks.rank) * weight * ranks.size
    return ranks.shared(loss, merged["loss"], weight), together
