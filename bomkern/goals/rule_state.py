"""The state that policies, guard and spill of a `bomkern.GoalSet` change in a step, and how a step is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..common.host_copy import capturing
from ..common.process_group import Ranks
from ..common.torch_internals import buffers_of, under_transform
from ..reference import RecordAt
from .anchors import Buffers, write_anchor
from .monitor import Monitor
from .policies import MOST_NUDGE, Policy
from .presence import Present
from .rules import ShareGuard, Spill

SPILL = ("average", "multipliers", "_average_before", "_multipliers_before")  # the buffers of the rule by order
LEARNT = ("params", "policy_state")  # the buffers that policies change
NO_END = 2**63 - 1  # the last step of a policy that never ends


def ends_of(policies: Mapping[str, Policy], begun: Sequence[int] = ()) -> list[int]:
    """Return the step after which each policy changes nothing. ``begun``: the step at which each began, 0 if empty."""
    first = begun or [0] * len(policies)
    ends = [NO_END if policy.until is None else policy.until for policy in policies.values()]
    return [end + step if 0 < end < NO_END else end for end, step in zip(ends, first, strict=True)]


def learning_is_enabled() -> bool:
    """Return whether gradient is enabled, without which no call is a step of training."""
    # Dynamo cannot trace the second question, which matters only if gradient is enabled inside inference mode.
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


class RuleState:
    """The policies, the guard and the spill of a `bomkern.GoalSet` in training, and a copy of what a step changed.

    Their state is kept in buffers of the GoalSet, which are passed to the methods.

    Args:
        policies: by column.
        guard, spill: the guard and the spill, or None.
        at: the layout of a record.
        ranks: the processes that share the batch.

    Attributes:
        changed: each buffer that the step changes, with a copy of its value before; cleared when a step begins.
        begun: the step at which the policy of each column began; above 0 for a goal that was added on resuming.
    """

    def __init__(
        self, policies: dict[str, Policy], guard: ShareGuard | None, spill: Spill | None, at: RecordAt, ranks: Ranks
    ) -> None:
        self.policies, self.guard, self.spill, self.ranks = policies, guard, spill, ranks
        self._share, self._deficit, self._goals = at.share, at.deficit, at.level - at.share
        self.begin([0] * len(policies))
        self.guarded = ("params", "log_nudge", "guard_share") if guard else ()
        self.changed: list[tuple[Tensor, Tensor]] = []

    def begin(self, begun: Sequence[int]) -> list[int]:
        """Set the step at which each policy began, and return their ends."""
        self.begun, self._ends = list(begun), ends_of(self.policies, begun)
        self._until = max(self._ends)
        return self._ends

    def learn(self, buffers: Buffers, tensors: list[Tensor], monitor: Monitor, present: Present | None = None) -> None:
        """Copy the buffers that this step changes, and update the policies from its raw values."""
        learning = self.learning(buffers, monitor)
        for name in self.guarded:
            self.changed.append((buffers[name], buffers[name].clone()))
        if learning:
            raws = self.raws(learning, tensors, present)
            self.update(learning, buffers, raws, buffers_of(monitor)["place"], present)

    def learning(self, buffers: Buffers, monitor: Monitor) -> dict[int, Policy]:
        """Return the policies that may change something in this step, by the index of their column.

        Raises:
            RuntimeError: something would learn inside of a transform of torch.func.
        """
        learning = {}
        if self._until:
            # A compiled or captured graph runs at steps that the host does not know, so it holds all policies that may
            # ever change something.
            fixed = torch.compiler.is_compiling() or capturing(buffers["params"].device)
            step = 0 if fixed else monitor.steps
            if step < self._until:
                policies = enumerate(self.policies.values())
                learning = {k: p for k, p in policies if step < self._ends[k]}
        if (learning or self.guard) and under_transform() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "a GoalSet with a ShareGuard, or policies that follow raw values, cannot learn inside torch.func: "
                "call eval() first"
            )
        return learning

    def raws(self, learning: dict[int, Policy], tensors: list[Tensor], present: Present | None = None) -> list[Tensor]:
        """Return the raw values of the columns of these policies, [n] or 0-dim each, of all ranks; NaN is absent."""
        raws = [tensors[k].detach().float() for k in learning]
        if present is not None:
            raws = [present.known(k, raw) for k, raw in zip(learning, raws, strict=True)]
        if self.ranks.size > 1:
            gathered = self.ranks.gather(torch.cat([raw.reshape(-1) for raw in raws]))
            raws = [part.flatten() for part in gathered.split([raw.numel() for raw in raws], 1)]
        return raws

    def update(
        self,
        learning: dict[int, Policy],
        buffers: Buffers,
        raws: list[Tensor],
        step: Tensor,
        present: Present | None = None,
    ) -> None:
        """Set ideals and scales by the policies. ``step``, [1], is counted on the device.

        A policy sees NaN where its goal is absent, and changes nothing in a step in which no sample has it.
        """
        copies = [(buffers[name], buffers[name].clone()) for name in LEARNT]
        self.changed += copies
        for (k, policy), raw in zip(learning.items(), raws, strict=True):
            own = step[0] - self.begun[k] if self.begun[k] else step[0]
            ideal_and_scale = policy.update(raw, buffers["policy_state"][k], own)
            if ideal_and_scale is not None:
                write_anchor(buffers, k, *ideal_and_scale)
            if present is not None and k in present.masked:
                there = present.column_there(k)
                for now, before in copies:
                    now[k] = torch.where(there, now[k], before[k])
        if any(policy.until is not None for policy in learning.values()):
            goes_on = (step < buffers["_ends"])[:, None]
            for now, before in copies:
                now.copy_(torch.where(goes_on, now, before))

    def keep(
        self, buffers: Buffers, monitor: Monitor, record: Tensor, rows: Tensor | int, present: Present | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """Add the record of the step to the monitor; update the weights of the spill and the nudges of the guard.

        Args:
            record: [size].
            rows: the number of samples that it rests on, [K] or one for all columns.

        Returns:
            The record and the number.
        """
        spill, guard = self.spill, self.guard
        if spill is None:
            monitor.add(record, rows)
        else:
            deficit = record.narrow(0, self._deficit, self._goals)
            state = [buffers[name] for name in SPILL]
            by_order = buffers["_weights_by_order"]
            monitor.add(record, rows, deficit, by_order, spill.rate, state, spill.relative, spill.follow)
            self.changed += (
                (buffers["average"], buffers["_average_before"]),
                (buffers["multipliers"], buffers["_multipliers_before"]),
            )
        if guard is not None:
            so_far = buffers["log_nudge"]
            share = record.narrow(0, self._share, self._goals).to(so_far.dtype)
            average = buffers["guard_share"]
            before = average if present is None else average.clone()
            change = guard.update(share, average)
            if present is not None:  # a goal that no sample has stays as it is
                there = present.goals_there(len(share))
                average.copy_(torch.where(there, average, before))
                change = torch.where(there, change, 0)
            nudge = change[buffers["_belongs"]]
            nudge = (so_far + nudge).clamp(-MOST_NUDGE, MOST_NUDGE) - so_far
            so_far += nudge
            buffers["params"][:, 1:3] *= torch.exp(-nudge)[:, None]
        return record, rows

    def restore(self) -> None:
        """Take back the changes of a step that raised an error."""
        for now, before in self.changed:
            now.copy_(before)
        self.changed.clear()

    def accept(self, ok: Tensor) -> None:
        """Take back the changes of the last step if ``ok``, a 0-dim bool on the device, is False."""
        for now, before in self.changed:
            now.copy_(torch.where(ok, now, before))
        self.changed.clear()
