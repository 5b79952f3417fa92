"""One step of a `bomkern.GoalSet` in several calls: micro-batches, and the evaluations of a closure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..common.host_copy import capturing
from ..common.reductions import REDUCTIONS
from ..common.torch_internals import FullPrecisionBuffers, buffers_of, children_of, under_transform
from ..reference import record_parts
from .anchors import Buffers
from .monitor import Monitor
from .policies import Policy
from .presence import Present
from .record import Layout, merge_records, weights_of
from .rule_state import LEARNT, RuleState


class MicroBatches:
    """Take the place of `RuleState` in calls of a `bomkern.GoalSet` that are parts of one step.

    Params that no policy sets, multipliers and nudges stay as they are until the step ends. It ends with the last
    micro-batch, or on leaving `TakesMicroBatches.one_step`: then `RuleState.keep` gets the record of the whole step.

    Args:
        rules: what a step changes.
        layout: of a record.
        reduction: by name.

    Attributes:
        last: whether the next call is the last micro-batch; None outside of `TakesMicroBatches.accumulate`.
        held: whether the step ends on leaving `TakesMicroBatches.one_step`.
        open: whether calls of an unfinished step have been made.
        complete: whether the step has all of its samples, so that further calls repeat it.
        changed: buffers that the current call changes, with copies of their values before.
    """

    def __init__(self, rules: RuleState, layout: Layout, reduction: str) -> None:
        self.rules, self._code = rules, REDUCTIONS[reduction]
        self._sizes = len(layout.goals), len(layout.columns)
        self.last: bool | None = None
        self.held = False
        self.changed: list[tuple[Tensor, Tensor]] = []
        self.forget()

    def forget(self) -> None:
        """Forget the open step, without taking anything back."""
        self.open = self.complete = False
        self._before: dict[str, Tensor] = {}  # buffers before the step
        self._raws: dict[int, Tensor] = {}  # raw values of the step so far, by column of a policy that learns
        self._record: Tensor | None = None
        self._weights: Tensor | None = None
        self._rewound = self._captured = False
        self._new: dict[int, Tensor] = {}  # raw values with those of the current call
        self._samples = 0  # of the current call
        self._present: Present | None = None  # what was present in the step so far, if a call had a mask

    @property
    def active(self) -> bool:
        """Whether the next call is a part of a step, or a step is open."""
        return self.last is not None or self.held or self.open

    # The methods that `GoalSet.forward` calls, as those of `RuleState`.

    def learn(self, buffers: Buffers, tensors: list[Tensor], monitor: Monitor, present: Present | None = None) -> None:
        """Update the policies from the raw values of the step so far and of this call."""
        if self.complete:
            if self._rewound:
                self._relearn(buffers, monitor)
            return
        if self.last is None and not self.held:
            raise RuntimeError(
                "a step of micro-batches is open, and this call belongs to none: make the step's last call inside of "
                "GoalSet.accumulate(last=True), or call GoalSet.discard() before the next step"
            )
        if under_transform() and not torch.compiler.is_compiling():
            raise RuntimeError("a step of several calls cannot be taken inside torch.func: make the step one call")
        captured = capturing(buffers["params"].device)
        if self.open and self._captured is not captured:
            raise RuntimeError(
                "a step of micro-batches must be captured in a CUDA graph as a whole, all of its calls or none"
            )
        self._captured = captured
        rules = self.rules
        learning = rules.learning(buffers, monitor)
        if not self.open:
            rules.changed.clear()  # the step before can no longer be taken back
        for name in (*rules.guarded, *(LEARNT if learning else ())):
            if name not in self._before:
                self._before[name] = buffers[name].clone()
        self._samples = next((len(t) for t in tensors if isinstance(t, Tensor) and t.dim()), 1)
        if learning:
            self.changed += [(buffers[name], buffers[name].clone()) for name in LEARNT]
            raws = {
                k: torch.cat([self._raws[k], raw.reshape(-1)]) if k in self._raws else raw
                for k, raw in zip(learning, rules.raws(learning, tensors, present), strict=True)
            }
            self._update(learning, buffers, raws, monitor, self._so_far(present))
            self._new = {k: raw if k in self._raws else raw.reshape(-1).clone() for k, raw in raws.items()}

    def restore(self) -> None:
        """Take back the changes of a call that raised an error; the calls before stay in the step."""
        for now, before in self.changed:
            now.copy_(before)
        self.changed.clear()
        self._new = {}

    def keep(
        self, buffers: Buffers, monitor: Monitor, record: Tensor, rows: Tensor | int, present: Present | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """Merge the record of the call into that of the step, and end the step after its last micro-batch.

        Returns the record of the step so far with the number of samples that it rests on; or ``record`` and ``rows``,
        if the call repeats a complete step.
        """
        self.changed.clear()
        if self.complete:
            return record, rows
        records = record.detach()[None]
        weights = torch.full_like(records, self._samples)
        if present is not None:
            weights[0] = weights_of(present.counts, *self._sizes)
        self._present = self._so_far(present)
        if self._record is not None and self._weights is not None:
            records = torch.stack([self._record, records[0].to(self._record)])
            weights = torch.stack([self._weights, weights[0].to(self._weights)])
        merged, self._weights = merge_records(records, weights, *self._sizes, self._code)
        self._record, self._raws, self._new = merged, {**self._raws, **self._new}, {}
        self.open, self._rewound, self._samples = True, False, 0
        rows = self._rows()
        if self.held:
            self.complete = self.last is not False
        elif self.last:
            self.finish(buffers, monitor)
        return merged, rows

    def _rows(self) -> Tensor:
        """Return the number of samples that the record of the step so far rests on, over all ranks, [K]."""
        assert self._weights is not None
        own = record_parts(self._weights, *self._sizes)["raw"]
        return own * self.rules.ranks.size if self._present is None else own  # presence is counted over the ranks

    def _so_far(self, present: Present | None) -> Present | None:
        """Return what is present in the step so far and in the current call; None if no call had a mask."""
        before = self._present
        latest = before if present is None else present
        if latest is None:
            return None
        counts = torch.full_like(latest.counts, self._samples) if present is None else present.counts
        if before is not None:
            counts = counts + before.counts
        elif self._weights is not None:  # calls without a mask
            counts = counts + self._weights[-1].to(counts.dtype)
        masked = latest.masked if before is None else latest.masked | before.masked
        return latest._replace(counts=counts, masked=masked)

    # The end of a step.

    def finish(self, buffers: Buffers, monitor: Monitor) -> None:
        """End the open step, if there is one, with the calls so far."""
        record = self._record
        if not self.open or record is None:
            return
        if self._rewound:
            self._relearn(buffers, monitor)
        rules = self.rules
        rules.changed += [(buffers[name], before) for name, before in self._before.items()]
        present, rows = self._present, self._rows()
        self.forget()
        rules.keep(buffers, monitor, record, rows, present)

    def discard(self, buffers: Buffers) -> None:
        """Take back what the policies learnt in the open step, and forget it."""
        self.rewind(buffers)
        self.forget()

    def rewind(self, buffers: Buffers) -> None:
        """Put the buffers back to before the open step. The next call, or its end, learns its raw values again."""
        self._unlearn(buffers, self._raws)
        self._rewound = bool(self._raws)

    def own(self) -> None:
        """Copy what the graph of a call has returned: the next replay of a CUDA graph writes into the same memory."""
        if self._record is None or self._weights is None or not self._record.is_cuda:
            return
        self._record, self._weights = self._record.clone(), self._weights.clone()
        self._before = {name: before.clone() for name, before in self._before.items()}
        self._raws = {k: raw.clone() for k, raw in self._raws.items()}
        if self._present is not None:
            self._present = self._present._replace(counts=self._present.counts.clone())

    def _relearn(self, buffers: Buffers, monitor: Monitor) -> None:
        """Update the policies from the raw values of the step so far, after `rewind`."""
        policies = list(self.rules.policies.values())
        self._update({k: policies[k] for k in self._raws}, buffers, self._raws, monitor, self._present)
        self._rewound = False

    def _unlearn(self, buffers: Buffers, columns: Iterable[int]) -> None:
        """Put what policies change in these columns back to before the step; other columns may have been set since."""
        for k in columns:
            for name in LEARNT:
                buffers[name][k].copy_(self._before[name][k])

    def _update(
        self,
        learning: dict[int, Policy],
        buffers: Buffers,
        raws: dict[int, Tensor],
        monitor: Monitor,
        present: Present | None,
    ) -> None:
        """Update policies, from their state before the step, by all raw values of the step."""
        if self.open:
            self._unlearn(buffers, learning)
        if learning:
            self.rules.update(learning, buffers, list(raws.values()), buffers_of(monitor)["place"], present)
        self.rules.changed.clear()  # what takes the step back is in ``_before``


class TakesMicroBatches(FullPrecisionBuffers):
    """The part of a `bomkern.GoalSet` by which several calls are one step.

    Attributes:
        micro: the state of the open step.
        part: ``micro`` while calls are parts of a step, else None: then each call is a step.
    """

    micro: MicroBatches
    part: MicroBatches | None

    def __init__(self) -> None:
        super().__init__()
        self.part = None
        self.register_state_dict_pre_hook(_rewind)
        self.register_load_state_dict_post_hook(_forget)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Treat each call inside of the context as a micro-batch: all of them up to the last one are one step.

        The loss of a micro-batch is its own. Anchors, weights of a spill and nudges of a guard are the same for all
        micro-batches, so with equal sizes the gradients of ``loss / n`` add up to that of one batch. Spill, guard,
        history and `steps` take the step once, after the last micro-batch, from means over all of its samples; with
        ``reduction="min"`` they take the worst micro-batch. Policies that learn use all raw values of the step so far,
        so the scales under an early micro-batch are those of its samples and the ones before. `accept` and `StepGuard`
        take the whole step back; they also end a step that is still open.

        A goal of the whole batch (0-dim) is judged within each micro-batch, by the value that it has there. Its record
        is the mean of these values.

        If an exception leaves the context before the step ends, the step is discarded, see `discard`. A call outside
        of the context while a step is open is an error. A checkpoint in the middle of a step holds the state before it.
        Capture all calls of a step in one CUDA graph, or none. Lightning's `GoalCallback` does all this by itself.

        Args:
            last: whether the calls inside are the last of the step. At the end of an epoch the last micro-batch may
                come early: ``last=(i + 1) % n == 0 or i + 1 == len(loader)``.

        Example:
            >>> with goals.accumulate(last=(i + 1) % n == 0):
            ...     out = goals(raw)
            ...     (out.loss / n).backward()
            >>> # with Accelerate, which divides the loss itself
            >>> with accelerator.accumulate(model), goals.accumulate(last=accelerator.sync_gradients):
            ...     accelerator.backward(goals(raw).loss)
        """
        return _Accumulate(self, last)

    def one_step(self) -> AbstractContextManager[None]:
        """Treat all calls inside of the context as evaluations of one step, for an optimizer that takes a closure.

        L-BFGS evaluates its closure up to 25 times. The first evaluation is the step: policies learn from it, and its
        record is kept. All others see the same anchors and weights, learn nothing and leave no record. Spill and guard
        follow on leaving the context. A closure may use `accumulate`; then all micro-batches of its first evaluation
        are the step. If an exception leaves the context, the step is discarded. `steps` counts once; `accept` comes
        after the context.

        Example:
            >>> with goals.one_step():
            ...     optimizer.step(closure)
        """
        return _OneStep(self)

    def begin_micro_batch(self, last: bool) -> None:
        """Begin what `accumulate` does inside of its context, until `end_micro_batch`; for callbacks of a trainer."""
        if not isinstance(last, bool):
            raise TypeError(f"last must be True or False, got {type(last).__name__}")
        self._flag(last)

    def end_micro_batch(self) -> None:
        """End what `begin_micro_batch` began. The step stays open if the micro-batch was not the last."""
        self._flag(None)

    def end_step(self) -> None:
        """End an open step with the micro-batches so far; without an open step do nothing.

        A callback that learns only afterwards that a micro-batch was the last calls this before the optimizer's step.
        """
        for goals in self._together():
            goals.micro.finish(buffers_of(goals), children_of(goals)["monitor"])
            goals._settle()

    def discard(self) -> None:
        """Forget an open step: policies return to their state before it, and nothing is recorded.

        Clear the gradients too. Without an open step the call does nothing.
        """
        for goals in self._together():
            goals.micro.discard(buffers_of(goals))
            goals._settle()

    def _together(self) -> list[TakesMicroBatches]:
        """Return this object and those inside of it, which are called with it."""
        return [self, *(child for child in children_of(self).values() if isinstance(child, TakesMicroBatches))]

    def _flag(self, last: bool | None) -> None:
        """Set whether the next call is a micro-batch, and the last."""
        for goals in self._together():
            goals.micro.last = last
            goals._settle()

    def _hold(self, held: bool) -> None:
        """Set whether calls are evaluations of one step."""
        for goals in self._together():
            goals.micro.held = held
            goals._settle()

    def _settle(self) -> None:
        """Let the next call be a step of its own, unless a context or a step is open."""
        micro = self.micro
        self.part = micro if micro.active else None
        if micro.open and not torch.compiler.is_compiling():
            micro.own()


class _Accumulate:
    """The context of `TakesMicroBatches.accumulate`."""

    def __init__(self, goals: TakesMicroBatches, last: bool) -> None:
        self.goals, self.last = goals, last

    def __enter__(self) -> None:
        self._outer = self.goals.micro.last
        self.goals.begin_micro_batch(self.last)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.goals._flag(self._outer)
        if kind is not None:
            self.goals.discard()


class _OneStep:
    """The context of `TakesMicroBatches.one_step`."""

    def __init__(self, goals: TakesMicroBatches) -> None:
        self.goals = goals

    def __enter__(self) -> None:
        micro = self.goals.micro
        if micro.open or micro.held:
            raise RuntimeError("GoalSet.one_step: another step is open; call GoalSet.discard() to forget it")
        self.goals._hold(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.goals._hold(False)
        if kind is None:
            self.goals.end_step()
        else:
            self.goals.discard()


def _rewind(goals: Any, prefix: str, keep_vars: bool) -> None:
    """Let a checkpoint in the middle of a step hold the state before it."""
    if goals.part is not None:
        goals.micro.rewind(buffers_of(goals))


def _forget(goals: Any, keys: Any) -> None:
    """Forget the open step, and what could be taken back, after a checkpoint was loaded."""
    goals.micro.forget()
    goals.rules.changed.clear()
    goals._settle()
