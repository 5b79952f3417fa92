"""`Rejections`: what a `bomkern.StepGuard` does about rejected steps: it names the goal at fault, and gives up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..common.host_copy import HostCopy, capturing
from ..common.process_group import several_ranks
from .branches import Branches
from .goal_set import GoalSet

log = logging.getLogger("bomkern")

EVERY = 16  # steps between two copies of the counts from a GPU
SELDOM = 500  # steps between two rejections for which a scale that has grown too large is to blame
FIRST, MOST = 16, 1024  # steps that are searched after a rejection; twice as many after each that found nothing
REMEDY = (
    "mask the input of an operation, not its result: torch.where(known, y, x) before (y - x) ** 2, and not "
    "torch.where(known, (y - x) ** 2, 0)"
)
SEARCHED = (
    "its loss is finite, a gradient is not. The next steps are searched for the goal that such a gradient comes from"
)


def at_once(device: torch.device) -> bool:
    """Return whether the host can read a tensor without waiting."""
    return device.type == "cpu"


class Rejections:
    """The host's part of a `bomkern.StepGuard`.

    The host learns of a rejection at once on a CPU. From a GPU the counts are copied every `EVERY` steps, and read when
    the next copy starts. So it waits only after a rejection. If the loss of a rejected step was not finite, its record
    names the goals. Otherwise `Branches` watches the next steps, which then cost a hook on each node of their graphs.

    Args:
        goals: the GoalSets of the guard.
        limit: number of rejected steps in a row after which the guard gives up, or None.
        group: the ranks that step together, or None.
        scaled: whether a GradScaler scales the loss. Then infinite gradients are its doing, and only NaN is searched.

    Attributes:
        reason: the last sentence that names a goal, or None.
    """

    def __init__(self, goals: Sequence[GoalSet], limit: int | None, group: Any, scaled: bool) -> None:
        self.goals, self.limit, self.group, self.scaled = goals, limit, group, scaled
        self.reason: str | None = None
        self._every = EVERY if limit is None else min(EVERY, limit)
        self._steps, self._known, self._last = 0, 0, -SELDOM
        self._copy: HostCopy | None = None
        self._left, self._window = 0, FIRST
        self._told: set[str] = set()

    def restart(self, rejected: int) -> None:
        """Begin with the counts of a checkpoint."""
        self._known, self._copy = rejected, None

    def look(self, counts: Tensor) -> None:
        """Look at the counts after a step: all rejected ones and those in a row, [2].

        Raises:
            RuntimeError: too many steps in a row were rejected; on all ranks in the same step.
        """
        if capturing(counts.device):
            return
        self._steps += 1
        known: list[int] | None = None
        if at_once(counts.device):
            known = counts.tolist()
        elif self._steps % self._every == 0:
            arrived, self._copy = self._copy, HostCopy(counts)
            known = None if arrived is None else arrived.wait().tolist()
        if self._left:
            self._search(counts.tolist()[0])
        elif known is not None and known[0] > self._known:
            self._notice(*known)
        # What is read late is waited for until the search has begun too, at the same step on every rank.
        extra = 0 if at_once(counts.device) else self._every
        if known is not None and self.limit is not None and known[1] >= self.limit + extra:
            self._give_up(known[1])

    def _notice(self, rejected: int, in_a_row: int) -> None:
        """Name the goals of a rejected step from its record, or search the next steps for them."""
        self._known = rejected
        often, self._last = in_a_row > 1 or self._steps - self._last < SELDOM, self._steps
        reasons = [reason for goals in self.goals if (reason := _loss_not_finite(goals))]
        if reasons:
            self._tell("; ".join(reasons))
        elif self.goals and (in_a_row > 1 if self.reason else often or not self.scaled):
            if not self.scaled:
                self._warn(SEARCHED)
            self._left = self._window
            for goals in self.goals:
                goals.branches = []

    def _search(self, rejected: int) -> None:
        """Look into the branches of this step if it was rejected."""
        new, self._known = rejected > self._known, rejected
        found = self._found() if new else None
        if found:
            self._tell(found)
        self._left -= 1
        over = bool(found) or self._left == 0
        if over:
            self._left = 0
            self._window = FIRST if found else min(2 * self._window, MOST)
        for goals in self.goals:
            for branches in goals.branches or ():
                branches.close()
            goals.branches = None if over else []

    def _found(self) -> str | None:
        """Return a sentence about the step that has just been rejected."""
        reasons = [reason for goals in self.goals if (reason := _loss_not_finite(goals))]
        if reasons:
            return "; ".join(reasons)
        every: list[Branches] = [branches for goals in self.goals for branches in goals.branches or ()]
        for branches in every:
            if found := branches.find(self.scaled):
                node, goals_there = found
                where = f"the branch of {goals_there[0]}"
                if len(goals_there) > 1:
                    where = f"the graph that {', '.join(goals_there[:-1])} and {goals_there[-1]} share"
                return f"in {where}, {node} made a gradient not finite: {REMEDY}"
        if not any(branches.seen for branches in every):
            return "no graph of a goal could be searched: run a step without torch.compile to learn which"
        if self.scaled or several_ranks():
            return None  # the scale was too large, or another rank has the goal
        return (
            "every gradient in the graphs of the goals is finite, so it comes from another loss, or from a change of "
            "the gradients after backward"
        )

    def _tell(self, reason: str) -> None:
        self.reason = reason
        self._warn(reason)

    def _warn(self, what: str) -> None:
        """Log a sentence once."""
        if what not in self._told:
            self._told.add(what)
            log.warning("StepGuard rejected step %d: %s", self._steps, what)

    def _give_up(self, in_a_row: int) -> None:
        reason = self.reason
        if self.group is not None:  # only the rank with the bad sample may know
            reasons: list[str | None] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(reasons, reason, group=self.group)
            reason = next((known for known in reasons if known), None)
        raise RuntimeError(
            f"StepGuard rejected {in_a_row} steps in a row (limit={self.limit}): "
            + (reason or "in each of them the loss or a gradient was not finite")
        )


def _loss_not_finite(goals: GoalSet) -> str | None:
    """Name the goals whose raw values made the loss of the last rejected step not finite, if it was that."""
    monitor = goals.monitor
    ring, place = monitor.ring.detach(), int(HostCopy(monitor.place).wait())
    count = min(place, 2 * EVERY, len(ring))
    last = torch.arange(place - count, place) % len(ring)
    parts = monitor.layout.parts(HostCopy(ring).wait().index_select(0, last))
    rejected = (parts["finite"] == 0).nonzero()[:, 0].tolist()
    if not rejected or bool(parts["loss"][rejected[-1]].isfinite()):
        return None
    row = rejected[-1]
    # A goal that is absent has no numbers either, but no share.
    guilty = [
        name
        for g, name in enumerate(monitor.layout.goals)
        if not bool(parts["deficit"][row, g].isfinite()) and float(parts["share"][row, g]) != 0
    ]
    names = " and ".join(guilty) or "a goal"
    return f"the loss is not finite, because the deficit of {names} is not"
