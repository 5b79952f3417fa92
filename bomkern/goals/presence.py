"""Which goals count in which samples of a step of a `bomkern.GoalSet`: masks, absent goals, different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.checks import check_goals
from ..common.graph_constants import on_device
from ..common.process_group import Ranks
from ..common.reductions import REDUCTIONS
from ..reference import counts_of

Masks = Mapping[str, "Tensor | bool | Mapping[str, Tensor | bool | None] | None"]
AVERAGED = ("mean", "sum")  # the reductions in which only each goal's mean matters, with spill


class Present(NamedTuple):
    """What is present in one step.

    Attributes:
        mask: [K, B] bool.
        counts: [1 + G + K] int64, `reference.counts_of` the mask, summed over the ranks.
        samples: [W] int64, the number of each rank's samples that have a goal; None for one process.
        masked: the columns that may be absent somewhere.
        absent: the columns without a raw value.
        factor: 0-dim, by which the weights of a spill are multiplied, or None.
    """

    mask: Tensor
    counts: Tensor
    samples: Tensor | None
    masked: frozenset[int]
    absent: frozenset[int]
    factor: Tensor | None = None

    def with_graph(self, loss: Tensor, alone: int | None) -> Tensor:
        """Return the loss so that its backward runs even if no raw value is in it; a compiled graph leaves it as it is.

        Args:
            loss: the loss of all columns, or of one.
            alone: the index of that one, or None.
        """
        nothing = len(self.absent) == len(self.mask) if alone is None else alone in self.absent
        if not nothing or loss.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return loss
        return loss.detach().requires_grad_()

    def known(self, k: int, raw: Tensor) -> Tensor:
        """Return the raw values of column k, [B] or 0-dim, with NaN where they are absent.

        Of several ranks one may lack what another has, so both return [B]; a 0-dim value then stands in the first.
        """
        if k not in self.masked:
            return raw
        there = self.mask[k]
        if not raw.dim():
            there = there.any() if self.samples is None else there & (there.cumsum(0) == 1)
        return torch.where(there, raw, torch.nan)

    def goals_there(self, goals: int) -> Tensor:
        """Return whether any sample has each goal, [G] bool."""
        return self.counts[1 : 1 + goals] > 0

    @property
    def of_columns(self) -> Tensor:
        """The number of samples that have each column, over all ranks, [K] int64."""
        return self.counts[len(self.counts) - len(self.mask) :]

    def column_there(self, k: int) -> Tensor:
        """Return whether any sample has column k, 0-dim bool."""
        return self.of_columns[k] > 0

    def weights(self, multipliers: Tensor) -> Tensor:
        """Return the multipliers [G] by which each goal's mean over its own samples has the given weight.

        The weights of goals that no sample has go to the others.
        """
        counts = self.counts.to(multipliers.dtype)
        of_goals = counts[1 : 1 + len(multipliers)]
        given = torch.where(of_goals > 0, multipliers, 0)
        total = given.sum()
        weights = given / torch.where(total > 0, total, 1) * counts[0] / of_goals.clamp(min=1)
        return weights if self.factor is None else weights * self.factor

    def mean(self, k: int, values: Tensor) -> Tensor:
        """Return the sum of column k over this rank's samples that have it, over the number of all that do."""
        count = self.of_columns[k].clamp(min=1)
        return torch.where(self.mask[k], values, 0).sum() / count


class Presence:
    """Find what is present in a step, from masks and from raw values that are None.

    Args:
        names: the goals.
        members: the members of each group.
        columns: the name of each column.
        owner: the index of the goal of each column.
        optional: the goals, or "group.member", that may be left out.
        ranks: the processes that share the batch.
        averaged: whether only each goal's mean over its samples matters, so that goals may have different lengths.
    """

    def __init__(
        self,
        names: Sequence[str],
        members: Mapping[str, Sequence[str]],
        columns: Sequence[str],
        owner: Sequence[int],
        optional: str | Sequence[str],
        ranks: Ranks,
        averaged: bool,
    ) -> None:
        self.columns, self.owner, self.ranks, self.averaged = list(columns), list(owner), ranks, averaged
        self._index = {name: [k] for k, name in enumerate(columns)}
        self._members = members
        for name in members:
            self._index[name] = [self._index[f"{name}.{member}"][0] for member in members[name]]
        self._batch = 1  # of the last step, for a rank on which nothing has a size
        self.optional: set[int] = set()
        for name in [optional] if isinstance(optional, str) else optional:
            if name not in self._index:
                raise ValueError(f"optional must name goals ({', '.join(names)}), got {name!r}")
            self.optional.update(self._index[name])

    def needed(self, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether a step without a mask needs one: goals are absent, or have different lengths."""
        if self.ranks.size > 1 and self.optional:
            return True  # on all ranks, in every step
        return self.averaged and _differ(tensors)

    def of(
        self, tensors: Sequence[Tensor | None], mask: Masks | None, device: torch.device
    ) -> tuple[list[Tensor], Present]:
        """Return the raw values as the op takes them, and what is present.

        Args:
            tensors: the raw values of the columns; None where a column is absent.
            mask: by name, see `GoalSet.forward`.
            device: that of the GoalSet.
        """
        values, masks = list(tensors), self._masks(mask, device)
        for k, one in enumerate(masks):
            if one is False:
                values[k] = masks[k] = None
        absent = [k for k, value in enumerate(values) if value is None]
        masked = {*absent, *(k for k, one in enumerate(masks) if one is not None)}
        if self.ranks.size > 1:
            for k in masked - self.optional:
                raise ValueError(
                    f"{self.columns[k]} is absent or masked, so that all ranks must expect it: declare it with "
                    f"GoalSet(..., optional=[{self.columns[k]!r}])"
                )
            masked = masked | self.optional  # a new set: Dynamo of torch 2.11 cannot trace a copy of that one
        batch = self._align(values, masks, masked)
        empty = on_device((0.0,), torch.float32, device).reshape(())
        filled = [empty if value is None else value for value in values]
        if batch > 1 and all(value.dim() == 0 for value in filled):  # only the masks have samples
            filled[0] = filled[0].expand(batch)
        yes = on_device((True,), torch.bool, device)
        rows = [yes if one is None else one for one in masks]
        if absent:
            no = on_device((False,), torch.bool, device)
            for k in absent:
                rows[k] = no
        present = torch.stack([row.expand(batch) for row in rows])
        counts, samples = counts_of(present, self.owner, torch.int64), None
        if self.ranks.size > 1:
            gathered = self.ranks.gather(counts)
            counts, samples = gathered.sum(0), gathered[:, 0]
        return filled, Present(present, counts, samples, frozenset(masked), frozenset(absent))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let a call of `of` inside leave no trace for the next step."""
        batch = self._batch
        try:
            yield
        finally:
            self._batch = batch

    def _masks(self, mask: Masks | None, device: torch.device) -> list[Any]:
        """Return the mask of each column: a tensor, None where there is none, or False."""
        masks: list[Any] = [None] * len(self.columns)
        if mask is None:
            return masks
        if not isinstance(mask, Mapping):
            raise TypeError(f"mask must be a mapping of goals' names to bool tensors, got {type(mask).__name__}")
        for name, value in mask.items():
            if name not in self._index:
                raise KeyError(f"mask: no goal is called {name} (there are {', '.join(self._index)})")
            if isinstance(value, Mapping):
                known = self._members.get(name, ())
                for member, one in value.items():
                    if member not in known:
                        raise KeyError(f"mask: no member of {name} is called {member} (there are {', '.join(known)})")
                    k = self._index[f"{name}.{member}"][0]
                    masks[k] = self._checked(k, one, device)
            else:
                for k in self._index[name]:
                    masks[k] = self._checked(k, value, device)
        return masks

    def _checked(self, k: int, value: object, device: torch.device) -> Any:
        name = self.columns[k]
        if value is None or value is True:
            return None
        if value is False:
            return False
        if not isinstance(value, Tensor):
            raise TypeError(f"the mask of {name} must be a bool tensor, [B] or [], got {type(value).__name__}")
        if value.dtype != torch.bool:
            raise TypeError(f"the mask of {name} must be torch.bool, got {value.dtype}: write mask > 0")
        if value.dim() > 1:
            raise ValueError(f"the mask of {name} must have shape [B] or [], got {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"the mask of {name} is on {value.device}, the GoalSet on {device}: move it")
        return value

    def _align(self, values: list[Any], masks: list[Any], masked: set[int]) -> int:
        """Return B. Pad goals of different lengths to the longest, which is B; the padding is absent."""
        if _differ(values):
            self._pad(values, masks, masked)
        batch = self._batch
        for sized in (masks, values):  # torch.compile can trace a loop, but no max with a default
            for one in sized:
                if isinstance(one, Tensor) and one.dim() == 1:
                    batch = one.shape[0]
        if self.ranks.size > 1 and not torch.compiler.is_compiling():
            self._batch = batch
        for k, one in enumerate(masks):
            if one is not None and one.dim() == 1 and len(one) != batch:
                self._refuse_length(k, one, batch)
        return batch

    def _pad(self, values: list[Any], masks: list[Any], masked: set[int]) -> None:
        """Pad the goals that have fewer rows than others, and mask the padding. The members of a group have as many."""
        rows = {k: t.shape[0] for k, t in enumerate(values) if isinstance(t, Tensor) and t.dim() == 1}
        of_goal: dict[int, int] = {}
        if not self.averaged or self.ranks.size > 1:
            given = {f"the raw value of {self.columns[k]}": t for k, t in enumerate(values) if t is not None}
            check_goals(list(given.values()), list(given))  # raises
        for k, count in rows.items():
            others = of_goal.setdefault(self.owner[k], count)
            if count != others:
                raise ValueError(
                    f"the raw value of {self.columns[k]} has {count} samples, others have {others}: the members of a "
                    "Group need the same samples"
                )
        batch = max(list(rows.values()))
        for k, value in enumerate(values):
            count = of_goal.get(self.owner[k], batch)
            if value is None or count == batch:
                continue
            own = masks[k]
            if own is not None and own.dim() == 1 and len(own) != count:
                self._refuse_length(k, own, count)
            own = torch.ones(count, dtype=torch.bool, device=value.device) if own is None else own.expand(count)
            masks[k] = torch.nn.functional.pad(own, (0, batch - count), value=False)
            values[k] = torch.nn.functional.pad(value, (0, batch - count)) if k in rows else value
            masked.add(k)

    def _refuse_length(self, k: int, mask: Tensor, batch: int) -> None:
        raise ValueError(f"the mask of {self.columns[k]} has {len(mask)} samples, the goals have {batch}")


def averages(reduction: str, spill: object) -> bool:
    """Return whether only each goal's mean over its samples matters."""
    assert reduction in REDUCTIONS
    return spill is not None and reduction in AVERAGED


def _differ(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether goals that are not of the whole batch have different numbers of samples."""
    first = None
    for t in tensors:
        if isinstance(t, Tensor) and t.dim() == 1:
            if first is None:
                first = t.shape[0]
            elif t.shape[0] != first:
                return True
    return False
