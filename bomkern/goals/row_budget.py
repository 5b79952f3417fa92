"""The rows that each goal of a `bomkern.GoalSet` takes in a step of training with `Spill(budget=)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.graph_constants import on_device
from ..common.host_copy import HostCopy
from ..common.process_group import Ranks
from ..lazy_goals.evaluate import Evaluation
from ..lazy_goals.lazy import Lazy
from ..reference import counts_of
from .anchors import Buffers
from .looks import Seen, seen_by
from .presence import AVERAGED, Masks, Presence, Present
from .rules import Spill

SLACK = 1e-6  # a product of weight, budget and batch that is whole up to rounding is not rounded up
NONE: frozenset[int] = frozenset()
BITS = 0xFFFFFFFF
BEHIND = 1 << 32  # added to the keys of samples that lack a goal, which puts them behind all others


class RowBudget:
    """Choose the rows of each goal before a step, and evaluate lazy goals for their rows alone.

    Args:
        spill: the rule, with a budget.
        owner: the index of the goal of each column.
        presence: finds what is present in a step.
        reduction: by name.
        ranks: the processes that share the batch. Each draws its own rows, the same number of them.

    Raises:
        ValueError: ``reduction`` needs the deficits of each sample.
    """

    def __init__(self, spill: Spill, owner: Sequence[int], presence: Presence, reduction: str, ranks: Ranks) -> None:
        if reduction not in AVERAGED:
            raise ValueError(
                f"Spill(budget=) needs reduction='mean' or 'sum', got {reduction!r}: a sample has not all of its goals"
            )
        assert spill.budget is not None
        self.budget, self._owner, self._presence, self._ranks = spill.budget, list(owner), presence, ranks
        self._sums, self.look = reduction == "sum", spill.look
        self._key = _mix(_mix(_mix(spill.seed & BITS) ^ (spill.seed >> 32 & BITS)) ^ ranks.rank)
        self._copy: HostCopy | None = None

    def of(
        self,
        tensors: Sequence[Any],
        absent: bool,
        mask: Masks | None,
        evaluation: Evaluation | None,
        buffers: Buffers,
        step: Tensor,
        look: bool | Tensor = False,
    ) -> tuple[list[Tensor], Present, Seen | None]:
        """Return the raw values as the op takes them, the rows of each goal as what is present, and what a look sees.

        Args:
            tensors: the raw values of the columns; None where a column is absent.
            absent: whether any is.
            mask: by name, see `GoalSet.forward`.
            evaluation: that of the lazy goals, or None if there are none.
            buffers: those of the GoalSet.
            step: [1] int64, counted on the device.
            look: whether the step looks at all rows, see `looks.is_due`.
        """
        presence, ranks, device = self._presence, self._ranks, buffers["params"].device
        zero = on_device((0.0,), torch.float32, device)
        values: list[Any] = [zero.expand(t.rows) if type(t) is Lazy else t for t in tensors]
        given: Present | None = None
        if absent or mask is not None or presence.needed(values):
            values, given = presence.of(values, mask, device)
        batch = 1
        for t in values if given is None else given.mask:
            if isinstance(t, Tensor) and t.dim() == 1:
                batch = t.shape[0]
        weights = buffers["multipliers"]
        if evaluation is not None:
            weights = self._on_host(weights)
        count = self.rows(weights, batch)
        known = [] if evaluation is None else count.tolist()
        if weights.device != device:
            count = _to_device(count, device)
        keys = draw(self._key, step, batch)
        order: Tensor | None = None
        if given is None:
            order = keys.argsort()
            taken = order.argsort() < count[:, None]
        else:
            sizes = [self._owner.count(g) for g in range(len(count))]
            there = torch.stack([members.any(0) for members in given.mask.split(sizes)])
            taken = torch.where(there, keys, keys + BEHIND).argsort(1).argsort(1) < count[:, None]
        rows = taken.index_select(0, buffers["_belongs"])
        if given is not None:
            rows = rows & given.mask
        counts, samples = counts_of(rows, self._owner, torch.int64), None
        if ranks.size > 1:
            if given is None:  # as many on every rank
                samples, counts = counts[:1].expand(ranks.size), counts * ranks.size
            else:
                gathered = ranks.gather(counts)
                counts, samples = gathered.sum(0), gathered[:, 0]
        factor: Tensor | None = None
        if self._sums:  # over all samples, of which the op sees those that some goal takes
            whole = batch * ranks.size if given is None else given.counts[0]
            factor = whole / counts[0].clamp(min=1)
        gone = NONE if given is None else given.absent
        present = Present(rows, counts, samples, frozenset(range(len(values))), gone, factor)
        seen = seen_by(look, values, present, given, evaluation, self._owner, ranks)
        if evaluation is not None:
            self._evaluate(evaluation, values, rows, known, order)
        return values, present, seen

    def rows(self, weights: Tensor, batch: int) -> Tensor:
        """Return the number of rows that goals of these weights take of a batch, int64."""
        part = weights * (self.budget * batch * (1 - SLACK))
        return part.ceil().clamp(1, batch).to(torch.int64)

    def send(self, multipliers: Tensor) -> None:
        """Start to copy the weights of the next step to the host, if it needs them and does not have them."""
        if multipliers.device.type == "cuda":
            self._copy = HostCopy(multipliers)

    def forget(self) -> None:
        """Forget the weights that were copied, because others were loaded."""
        self._copy = None

    def _on_host(self, multipliers: Tensor) -> Tensor:
        """Return the weights on the host.

        The copy was started in the forward of the step before, whose backward the device has yet to run. So the device
        does not idle while the host waits for it. Only the first step waits for a copy that begins now.
        """
        if multipliers.device.type == "cpu":
            return multipliers
        copy, self._copy = self._copy or HostCopy(multipliers), None
        return copy.wait()

    def _evaluate(
        self, evaluation: Evaluation, values: list[Any], rows: Tensor, known: list[int], order: Tensor | None
    ) -> None:
        """Put the values of the lazy goals at their rows into ``values``; the other rows are 0.

        Args:
            evaluation: that of the lazy goals.
            values: of the columns, changed in place.
            rows: [K, B], the rows of each column.
            known: the number of rows of each goal.
            order: [B], of which each goal takes the first; None if masks decide too. Then the host reads ``rows``.
        """
        lazies = {k: goal for k, goal in enumerate(evaluation.goals) if type(goal) is Lazy}
        if order is None:
            masks = rows.cpu()
            if self._ranks.size > 1:  # others may wait for the gradients of a function that this rank leaves out
                masks = masks | (torch.arange(masks.shape[1], device="cpu") == 0) & ~masks.any(1, keepdim=True)
            needed = evaluation.masked({k: masks[k, : goal.rows] for k, goal in lazies.items()})
        else:
            needed = evaluation.nested({k: known[self._owner[k]] for k in lazies}, order)
        for k, (places, part) in evaluation.rows_of_goals(needed).items():
            values[k] = part.new_zeros(rows.shape[1]).index_copy(0, places, part)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}  # a copy under way holds an event, which cannot be copied


def _to_device(count: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU copies it from pinned memory, without a wait."""
    return count.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else count.to(device)


def draw(key: int, step: Tensor, batch: int) -> Tensor:
    """Return a random number below 2^32 for each row of a step, [B] int64, all different.

    They are a hash, a bijection of the row, so every device and every compiler draws the same and a resumed run goes on
    with the same. A generator would have a state to keep, and on a GPU other numbers.

    Args:
        key: hash of the seed and the rank.
        step: [1] int64.
        batch: B.
    """
    first = _mix((step & BITS) ^ key)
    second = _mix(first ^ 0x5BD1E995)
    rows = torch.arange(batch, device=step.device)
    return _mix(_mix(rows ^ first) ^ second)  # type: ignore[no-any-return]


def _mix(x: Any) -> Any:
    """Return a hash of whole numbers below 2^32, a bijection; products stay below 2^63."""
    x = x ^ (x >> 16)
    x = (x * 0x2C1B3C6D) & BITS
    x = x ^ (x >> 12)
    x = (x * 0x297A2D39) & BITS
    return x ^ (x >> 15)
