"""The ring of records on the device, and the history that it is emptied into."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.decorators import fake
from ..common.host_copy import HostCopy, capturing
from ..common.torch_internals import FullPrecisionBuffers, buffers_of
from ..dispatch.schemas import library
from ..dispatch.select import keeper
from .history import CAPACITY, History, Rows
from .record import Layout

ROWS = 128  # records kept on the device before they are copied to the host


class _Count:
    """Steps that the host knows of, whose records it has sent for, and has taken in. Outside the module, whose
    ``__setattr__`` would cost more than the ring."""

    __slots__ = ("known", "sent", "taken")

    def __init__(self, steps: int = 0) -> None:
        self.known = self.sent = self.taken = steps


class Window(NamedTuple):
    """Steps since the last call of `Monitor.take_mean`.

    Attributes:
        steps: how many there were.
        rejected: how many of them had no finite loss, or were taken back.
        mean: float64 means over the others by part of a record; empty where there are none.
    """

    steps: int
    rejected: int
    mean: dict[str, Tensor]


_handles = itertools.count()
_handled: weakref.WeakValueDictionary[int, Monitor] = weakref.WeakValueDictionary()


class Monitor(FullPrecisionBuffers):
    """The ring on the device, and the history that it is emptied into every `ROWS` steps, without waiting.

    Steps are counted on the device, so that those of a replayed CUDA graph, of which the host knows nothing, are kept
    too: the last `ROWS` of them before the history is read.

    Attributes:
        ring: [ROWS, size]. place: [1] int64, training steps so far, whose remainder is the row of the next record.
    """

    ring: Tensor
    place: Tensor

    def __init__(self, layout: Layout, impl: str | None = None) -> None:
        super().__init__()
        self.layout, self.impl, self._count, self._history = layout, impl, _Count(), History(layout)
        self._finite = layout.at.finite
        self._copy: tuple[HostCopy, HostCopy, int] | None = None  # the ring, the place, and what was known then
        # Rows on the host that `take` has not returned yet.
        self._fresh = Rows(torch.empty(0, layout.size, dtype=torch.float32))
        self.register_buffer("ring", torch.zeros(ROWS, layout.size, dtype=torch.float32), persistent=False)
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64), persistent=False)
        self._register()

    def _register(self) -> None:
        """Take a number, by which an op finds this monitor where a compiled graph runs."""
        self._handle = next(_handles)
        _handled[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()  # a copy has its own

    @property
    def steps(self) -> int:
        """Added so far, those of a replayed CUDA graph once the history has been read."""
        return self._count.known

    def add(
        self,
        record: Tensor,
        deficit: Tensor | None = None,
        by_rank: Tensor | None = None,
        rate: float = 0.0,
        spill: Sequence[Tensor] = (),
    ) -> None:
        """Keep the record of a step, [size]; the rest is of `Spill`, see `reference.goal_set_keep`."""
        held = buffers_of(self)
        ring, place = held["ring"], held["place"]
        keep = keeper(ring.device.type, self.impl)
        if torch.compiler.is_compiling():
            torch.ops.bomkern.goal_set_notice(place, self._handle)  # which is called when the rest runs
        elif not capturing(ring.device):  # what is captured has not happened yet; its replays are counted on the device
            self.notice()
        keep(record, ring, place, deficit, by_rank, rate, spill)

    def notice(self) -> None:
        """A record is about to be put into the ring: send the ring to the host where it is full."""
        count = self._count
        if count.known - count.sent == ROWS:
            self._send()
        count.known += 1

    def reject(self, ok: Tensor) -> None:
        """Count the last step as one without a finite loss where ``ok``, 0-dim bool, is False."""
        count = self._count
        inside = count.known > count.sent or capturing(self.ring.device)
        if inside or int(HostCopy(self.place).wait()) > count.taken:  # replayed steps, which the host does not know
            last = (self.place - 1) % len(self.ring)
            finite = self.ring[:, self._finite]
            finite.index_copy_(0, last, finite.index_select(0, last) * ok)
        elif count.known and not ok:  # the history has been read since the step: its record is on the host
            self._history.reject_last()
            fresh = self._fresh.rows().clone()
            fresh[-1:, self._finite] = 0
            self._fresh = Rows(fresh)

    def _send(self) -> None:
        """Send the ring to the host, and take in what was sent the time before."""
        count = self._count
        arrived, self._copy = self._copy, (HostCopy(self.ring), HostCopy(self.place), count.known)
        count.sent = count.known
        if arrived is not None:
            self._arrive(*arrived)

    def _arrive(self, ring: HostCopy, place: HostCopy, known: int) -> None:
        rows, until, count = ring.wait(), int(place.wait()), self._count
        last = torch.arange(max(count.taken, until - len(rows)), until) % len(rows)
        records = rows.index_select(0, last)  # rows[last] would wake all threads for it
        count.taken, replayed = until, max(0, until - known)
        count.known, count.sent = count.known + replayed, count.sent + replayed
        self._history.append(records)
        self._fresh.add(records.float())
        if self._fresh.count > 2 * CAPACITY:
            self._fresh = Rows(self._fresh.rows()[-CAPACITY:])

    def take(self) -> Tensor:
        """The records since the last call, at most `CAPACITY`, [n, size] on the host. Waits for the device."""
        _ = self.history
        fresh = self._fresh.rows()[-CAPACITY:]
        self._fresh = Rows(fresh[:0])
        return fresh

    def take_mean(self) -> Window:
        """Take the records since the last call, and return the means of their parts. Waits for the device."""
        records = self.take().double()
        finite = self.layout.parts(records)["finite"] > 0
        mean = self.layout.parts(records[finite].mean(0)) if finite.any() else {}
        return Window(len(records), len(records) - int(finite.sum()), mean)

    def last_mean(self, part: str, steps: int) -> Tensor:
        """Mean of a part over the last ``steps`` steps of the history, at least one row; NaN where it has none."""
        history = self.history
        return history[part][-max(1, steps // history.stride) :].nanmean(0)

    @property
    def history(self) -> History:
        """All steps so far. Reading it waits for the device."""
        while self._copy is not None or int(HostCopy(self.place).wait()) != self._count.taken:
            if self._copy is None:
                self._send()
            else:
                arrived, self._copy = self._copy, None
                self._arrive(*arrived)
        return self._history

    def __getstate__(self) -> dict[str, Any]:
        _ = self.history  # rows on their way to the host come with an event, which cannot be copied or pickled
        return self.__dict__.copy()

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, **self.history.state_dict(), "fresh": self._fresh.rows()[-CAPACITY:]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._count, self._copy = _Count(state["steps"]), None
        self.place.fill_(state["steps"])
        self._history.load_state_dict(state)
        self._fresh = Rows(state["fresh"].clone())


@torch.library.impl(library, "goal_set_notice", "CompositeExplicitAutograd")
def _notice(place: Tensor, handle: int) -> None:
    """Runs where a compiled graph runs, not where it is traced; in a capture, for nothing, as in `Monitor.add`."""
    if not capturing(place.device) and (monitor := _handled.get(handle)) is not None:
        monitor.notice()


fake("goal_set_notice", library)(lambda place, handle: None)
