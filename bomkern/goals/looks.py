"""Looks at all rows of a step of a `bomkern.GoalSet` in which the loss takes some of them: `Spill(budget=, look=)`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.host_copy import capturing
from ..common.process_group import Ranks, several_ranks
from ..common.torch_internals import buffers_of
from ..lazy_goals.cost import statistics_of
from ..lazy_goals.evaluate import Evaluation
from ..lazy_goals.lazy import Lazy
from ..reference import RecordAt, counts_of
from .monitor import Monitor
from .presence import Present


class Seen(NamedTuple):
    """What the record of a step and the policies learn from.

    Attributes:
        values: the raw values of the columns, as the op takes them.
        present: what is present, or None for all.
    """

    values: list[Tensor]
    present: Present | None


def is_due(look: int, monitor: Monitor) -> bool | Tensor:
    """Return whether a step is a look: the first of every ``look`` steps.

    The host knows, without a wait. Only a graph, which runs at steps that the host does not know, asks the device: then
    the result is a tensor, [1] bool.
    """
    place: Tensor = buffers_of(monitor)["place"]
    if torch.compiler.is_compiling() or capturing(place.device):
        due: Tensor = place % look == 0
        return due
    return monitor.steps % look == 0


def all_rows(evaluation: Evaluation) -> dict[int, Tensor]:
    """Return the values of all rows of the lazy goals, without a graph, by their places among the goals.

    Generators, and lazies that had no value yet, stay as they were.
    """
    fresh = [node for node in evaluation.nodes if node.whole is None]
    # Of several processes none checks a function on first use: see `Evaluation.rows_of_goals`.
    unchecked = {statistics_of(node.fn) for node in fresh} if several_ranks() else set()
    unchecked = {statistics for statistics in unchecked if not statistics.checked}
    try:
        for statistics in unchecked:
            statistics.checked = True
        with Evaluation(evaluation.goals).looked():
            goals = {k: goal for k, goal in enumerate(evaluation.goals) if type(goal) is Lazy}
            return {k: goal.whole for k, goal in goals.items() if goal.whole is not None}
    finally:
        for statistics in unchecked:
            statistics.checked = False


def seen_by(
    due: bool | Tensor,
    values: list[Any],
    rows: Present,
    given: Present | None,
    evaluation: Evaluation | None,
    owner: list[int],
    ranks: Ranks,
) -> Seen | None:
    """Return what a step sees, or None if that is what its loss takes.

    Args:
        due: what `is_due` returned. A tensor selects on the device.
        values: of the columns; those of lazy goals have no meaning.
        rows: the rows in the loss.
        given: what is present besides, None if all rows are.
        evaluation: that of the lazy goals.
        owner: the index of the goal of each column.
        ranks: the processes that share the batch.
    """
    if due is False:
        return None
    seen = [value.detach() if isinstance(value, Tensor) else value for value in values]
    if isinstance(due, Tensor):
        mask = rows.mask | (due if given is None else due & given.mask)
        counts, samples = counts_of(mask, owner, torch.int64), None
        if ranks.size > 1:
            gathered = ranks.gather(counts)
            counts, samples = gathered.sum(0), gathered[:, 0]
        return Seen(seen, Present(mask, counts, samples, rows.masked, rows.absent))
    for k, value in all_rows(evaluation).items() if evaluation is not None else ():
        if k not in rows.absent:
            seen[k] = torch.nn.functional.pad(value, (0, len(seen[k]) - len(value)))
    return Seen(seen, given)


def record_of_look(own: Tensor, seen: Tensor, at: RecordAt) -> tuple[Tensor, Tensor]:
    """Return a record with level, deficit, raw value and highest of a look, and whether it has them, 0-dim bool.

    A look that is not finite, where the loss is, does not count: the loss has not read what made it so.

    Args:
        own: the record of the rows in the loss, [size].
        seen: the record of the look, [size].
    """
    finite = seen[at.finite] > 0
    part = slice(at.level, at.ideal)
    return torch.cat([own[: at.level], torch.where(finite, seen[part], own[part]), own[at.ideal :]]), finite
