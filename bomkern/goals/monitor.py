"""The ring of records on the device, which is copied into the history on the host."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.decorators import fake
from ..common.host_copy import HostCopy, capturing
from ..common.torch_internals import FullPrecisionBuffers, buffers_of, mark_constant
from ..dispatch.schemas import library
from ..dispatch.select import keeper
from ..ops.without_graph import columns_without
from .history import CAPACITY, History, Rows
from .record import Layout
from .row_counts import RowCounts
from .saved import pack_history, unpack_history
from .without_graph import WithoutGraph

ON_DEVICE = -1  # stands for a number of samples that the device holds
ROWS = 128  # records kept on the device before they are copied to the host


class _Count:
    """Counts of steps on the host: those that it knows of, and those whose records were sent for and taken in.

    They are kept outside the module, because its ``__setattr__`` would cost more than the ring.
    """

    __slots__ = ("known", "sent", "taken")

    def __init__(self, steps: int = 0) -> None:
        self.known = self.sent = self.taken = steps


class Window(NamedTuple):
    """Means over the steps since the last call of `Monitor.take_mean`.

    Attributes:
        steps: number of steps.
        rejected: number of steps that had no finite loss, or were taken back.
        mean: float64 means over the other steps by part of a record; empty if there are none. A goal's level, deficit
            and raw value are means over the steps in which a sample had it, NaN if there are none.
    """

    steps: int
    rejected: int
    mean: dict[str, Tensor]


_handles = itertools.count()
_handled: weakref.WeakValueDictionary[int, Monitor] = weakref.WeakValueDictionary()


class Monitor(FullPrecisionBuffers):
    """A ring of records on the device, which is copied into a history on the host every `ROWS` steps, without a sync.

    The device counts the steps, so the records of a replayed CUDA graph are kept too, although the host does not see
    its steps. If there are more than `ROWS` of them before the history is read, the last `ROWS` are kept.

    Attributes:
        ring: [ROWS, size].
        place: [1] int64, training steps so far; the next record goes into row ``place % ROWS``.
        ring_rows: [ROWS, K], the number of samples that each record rests on, where the host does not know it.
    """

    ring: Tensor
    place: Tensor
    ring_rows: Tensor

    def __init__(self, layout: Layout, impl: str | None = None) -> None:
        super().__init__()
        self.layout, self.impl, self._count, self._history = layout, impl, _Count(), History(layout)
        self._finite = layout.at.finite
        self.without_graph = WithoutGraph(layout.goals, layout.owner)
        # The ring, its numbers of samples if there are any, the place, and the steps known then.
        self._copy: tuple[HostCopy, HostCopy | None, HostCopy, int] | None = None
        self._rows = RowCounts()
        # Rows on the host that `take` has not returned yet.
        self._fresh = Rows(layout.counted(torch.empty(0, layout.size, dtype=torch.float32, device="cpu")))
        self.register_buffer("ring", torch.zeros(ROWS, layout.size, dtype=torch.float32), persistent=False)
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64), persistent=False)
        counts = torch.zeros(ROWS, len(layout.columns), dtype=torch.float32)
        self.register_buffer("ring_rows", counts, persistent=False)
        self._register()

    def reset_parameters(self) -> None:
        """Forget all steps. FSDP calls this after it has moved a module from the meta device."""
        self._count, self._copy, self._history = _Count(), None, History(self.layout)
        self._fresh = Rows(self._fresh.rows()[:0])
        self._rows.restart()
        self.ring.zero_()
        self.ring_rows.zero_()
        self.place.zero_()

    def _register(self) -> None:
        """Take a handle, by which an op finds this monitor when a compiled graph runs."""
        self._handle = next(_handles)
        _handled[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()  # a copy has its own handle

    @property
    def steps(self) -> int:
        """The number of steps so far. Steps of a replayed CUDA graph count once the history has been read."""
        return self._count.known

    def add(
        self,
        record: Tensor,
        rows: Tensor | int,
        deficit: Tensor | None = None,
        by_order: Tensor | None = None,
        rate: float = 0.0,
        spill: Sequence[Tensor] = (),
        relative: bool = False,
        follow: float = 1.0,
    ) -> None:
        """Keep the record of a step, [size], and the number of samples that it rests on, [K] or one for all columns.

        The other arguments are for `Spill`, see `reference.goal_set_keep`.
        """
        buffers = buffers_of(self)
        ring, place = buffers["ring"], buffers["place"]
        if ring.is_meta and not record.is_meta:
            raise RuntimeError("a part of this GoalSet is on the meta device: call its to_empty(device=...) first")
        keep = keeper(ring.device.type, self.impl)
        known = rows if not isinstance(rows, Tensor) else ON_DEVICE
        if torch.compiler.is_compiling():
            torch.ops.bomkern.goal_set_notice(place, self._handle, known)  # calls `notice` each time the graph runs
        elif capturing(ring.device):  # a capture runs nothing; its replays are counted on the device
            self._rows.note_captured(None if known == ON_DEVICE else known)
        else:
            self.notice(known)
        if isinstance(rows, Tensor):  # after the ring was sent, which it may overwrite
            counts = buffers["ring_rows"]
            counts.index_copy_(0, place % len(counts), rows.to(counts.dtype)[None])
        keep(record, ring, place, deficit, by_order, rate, spill, relative, follow)

    def notice(self, rows: int) -> None:
        """Count a record that is about to be put into the ring, and send the ring to the host if it is full.

        Args:
            rows: the number of samples that the record rests on, or `ON_DEVICE`.
        """
        count, known = self._count, None if rows == ON_DEVICE else rows
        if count.known - count.sent == ROWS:
            self._send()
        if self.without_graph.found and count.known:
            self._tell()
        self._rows.note(count.known, known)
        count.known += 1

    def check_graphs(self, goals: Sequence[Any]) -> None:
        """Look for goals without a graph among the raw values of a step, by column: in the first steps only."""
        if torch.compiler.is_compiling():
            _trace(self._handle, columns_without(goals) if torch.is_grad_enabled() else 0)
        elif self.without_graph.left:
            self.without_graph.look(goals)

    def _tell(self) -> None:
        """Warn of goals without a graph, with their share of the steps in the ring."""
        at, done = self.layout.at, min(self._count.known, len(self.ring))
        self.without_graph.tell(self.ring[:done, at.share : at.level])

    def reject(self, ok: Tensor) -> None:
        """Count the last step as one without a finite loss if ``ok``, 0-dim bool, is False."""
        count = self._count
        in_ring = count.known > count.sent or capturing(self.ring.device)
        if in_ring or int(HostCopy(self.place).wait()) > count.taken:  # replayed steps, which the host does not know
            last = (self.place - 1) % len(self.ring)
            finite = self.ring[:, self._finite]
            finite.index_copy_(0, last, finite.index_select(0, last) * ok)
        elif count.known and not ok:  # the history has been read since the step: its record is on the host
            self._history.reject_last()
            fresh = self._fresh.rows().clone()
            fresh[-1:, self._finite] = 0
            self._fresh = Rows(fresh)

    def _send(self) -> None:
        """Start to copy the ring to the host, and take in the copy that was started before."""
        count = self._count
        counts = HostCopy(self.ring_rows) if self._rows.on_device else None
        arrived, self._copy = self._copy, (HostCopy(self.ring), counts, HostCopy(self.place), count.known)
        count.sent = count.known
        if arrived is not None:
            self._arrive(*arrived)

    def _arrive(self, ring: HostCopy, counts: HostCopy | None, place: HostCopy, known: int) -> None:
        """Append the new records of a copy to the history. ``known``: the steps that the host knew of at that time."""
        rows, until, count = ring.wait(), int(place.wait()), self._count
        first = max(count.taken, until - len(rows))
        last = torch.arange(first, until, device="cpu") % len(rows)
        records = rows.index_select(0, last).float()  # rows[last] would wake all threads
        seen = None if counts is None else counts.wait().index_select(0, last)
        records = self.layout.counted(records, self._rows.take(first, until, known, seen, len(self.layout.columns)))
        count.taken, replayed = until, max(0, until - known)
        count.known, count.sent = count.known + replayed, count.sent + replayed
        self._history.append(records)
        self.without_graph.look_again()
        if self.without_graph.found and until:
            self._tell()
        self._fresh.add(records)
        if self._fresh.count > 2 * CAPACITY:
            self._fresh = Rows(self._fresh.rows()[-CAPACITY:])

    def take(self) -> Tensor:
        """Return the records since the last call, at most `CAPACITY`, [n, size] on the host. Waits for the device."""
        return self._take()[:, : self.layout.size]

    def _take(self) -> Tensor:
        """Return what `take` does, with the numbers of samples behind."""
        _ = self.history
        fresh = self._fresh.rows()[-CAPACITY:]
        self._fresh = Rows(fresh[:0])
        return fresh

    def take_mean(self) -> Window:
        """Take the records since the last call, and return the means of their parts. Waits for the device."""
        records = self._take().double()
        finite = self.layout.parts(records)["finite"] > 0
        mean = self.layout.parts(records[finite].nanmean(0)) if finite.any() else {}
        return Window(len(records), len(records) - int(finite.sum()), mean)

    def last_mean(self, part: str, steps: int) -> Tensor:
        """Return the mean of a part over the last ``steps`` steps of the history, at least one row; NaN without one."""
        history = self.history
        return history[part][-max(1, steps // history.stride) :].nanmean(0)

    def _holds_more(self) -> bool:
        """Return whether the ring holds records that the history lacks; on the meta device it holds nothing."""
        try:
            return int(HostCopy(self.place).wait()) != self._count.taken
        except NotImplementedError:
            if not self.place.is_meta:
                raise
            return False

    @property
    def history(self) -> History:
        """All steps so far. Reading it waits for the device."""
        while self._copy is not None or self._holds_more():
            if self._copy is None:
                self._send()
            else:
                arrived, self._copy = self._copy, None
                self._arrive(*arrived)
        return self._history

    def __getstate__(self) -> dict[str, Any]:
        _ = self.history  # a copy under way holds an event, which cannot be copied or pickled
        return self.__dict__.copy()

    def get_extra_state(self) -> Tensor:
        history = self.history.state_dict()  # first, as it counts the steps of replayed graphs
        fresh, counts = self._fresh.rows()[-CAPACITY:].tensor_split([self.layout.size], -1)
        return pack_history(self.layout, {"steps": self.steps, **history, "fresh": fresh, "fresh_counts": counts})

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        if isinstance(state, Tensor):  # else of an older bomkern, or of other goals
            state = unpack_history(state)
        if state["rows"].shape[1:] != (self.layout.size,):
            raise ValueError(f"the history has rows {list(state['rows'].shape)}, not of {self.layout.size} numbers")
        self._count, self._copy = _Count(state["steps"]), None
        self.place.fill_(state["steps"])
        self._history.load_state_dict(state)
        self._fresh = Rows(self.layout.counted(state["fresh"].clone(), state.get("fresh_counts")))
        self._rows.restart()


@torch.library.impl(library, "goal_set_notice", "CompositeExplicitAutograd")
def _notice(place: Tensor, handle: int, rows: int) -> None:
    """Call `Monitor.notice` when a compiled graph runs, not when it is traced. In a capture, note the samples alone."""
    monitor = _handled.get(handle)
    if monitor is not None and capturing(place.device):
        monitor._rows.note_captured(None if rows == ON_DEVICE else rows)
    elif monitor is not None:
        monitor.notice(rows)


def _trace(handle: int, without: int) -> None:
    """Note the columns without a graph in a monitor; torch.compile runs this function once, instead of tracing it."""
    if without and (monitor := _handled.get(handle)) is not None:
        monitor.without_graph.note(without)


mark_constant(_trace)
fake("goal_set_notice", library)(lambda place, handle, rows: None)
