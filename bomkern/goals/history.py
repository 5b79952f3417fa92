"""What happened in the steps of a `bomkern.GoalSet`: a ring of records on the device, and their history on the host."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch import Tensor

from ..common.decorators import fake
from ..common.files import load_plain
from ..common.host_copy import HostCopy, capturing
from ..common.torch_internals import FullPrecisionBuffers, buffers_of
from ..dispatch.schemas import _library, record_size
from ..dispatch.select import keeper
from .record import record_parts

ROWS = 128  # records kept on the device before they are copied to the host
CAPACITY = 4096  # rows of a history; when it is full, neighbours are joined and each row stands for twice the steps


class Layout:
    """Whose numbers a record holds.

    Attributes:
        goals: G names.
        columns: K names: a goal's own, or "goal.member".
        owner: the goal's index of each column.
        constraints: how each column's constraint or policy prints.
        most: the largest share that a goal can hold: less than 1 where the rule gives every goal a part.
    """

    def __init__(
        self,
        goals: Sequence[str],
        columns: Sequence[str],
        owner: Sequence[int],
        constraints: Sequence[str],
        most: float = 1.0,
    ) -> None:
        self.most = most
        self.goals, self.columns = list(goals), list(columns)
        self.owner, self.constraints = list(owner), list(constraints)

    @property
    def size(self) -> int:
        return record_size(len(self.goals), len(self.columns))

    def parts(self, records: Tensor) -> dict[str, Tensor]:
        """See `record.record_parts`; ``scale`` in place of ``slope``."""
        found = record_parts(records, len(self.goals), len(self.columns))
        found["scale"] = 1 / found.pop("slope")
        return found

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class _Pile:
    """Rows [n, size] that are put together only when somebody looks at them."""

    def __init__(self, rows: Tensor) -> None:
        self.parts, self.count = [rows], len(rows)

    def add(self, rows: Tensor) -> None:
        self.parts.append(rows)
        self.count += len(rows)

    def rows(self) -> Tensor:
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]


class History:
    """Every step's record, in at most `CAPACITY` rows on the host.

    Indexing by the name of a part gives a float32 tensor with one row per ``stride`` steps: ``history["share"]`` is
    [T, G], ``"level"`` and ``"deficit"`` too; ``"raw"``, ``"highest"``, ``"ideal"`` and ``"scale"`` are [T, K];
    ``"loss"`` and ``"finite"`` [T]. A row that stands for several steps holds their means (of ``highest`` the largest),
    over those whose loss was finite; ``finite`` is the fraction that was.

    Attributes:
        layout: the names.
        stride: steps per row.
        first: steps done before the first row.
    """

    def __init__(self, layout: Layout, first: int = 0, stride: int = 1) -> None:
        self.layout, self.first, self.stride = layout, first, stride
        self._rows = torch.empty(0, layout.size, dtype=torch.float32)
        self._open = torch.empty(0, layout.size, dtype=torch.float32)  # steps that do not make up a row yet

    @property
    def _rows(self) -> Tensor:
        return self._pile.rows()

    @_rows.setter
    def _rows(self, rows: Tensor) -> None:
        self._pile = _Pile(rows)

    @classmethod
    def from_rows(cls, layout: Layout, rows: Tensor, first: int = 0, stride: int = 1) -> History:
        """A history of these records, [T, size], each standing for ``stride`` steps."""
        history = cls(layout, first, stride)
        history._rows = rows.float()
        return history

    def first_rows(self, count: int) -> History:
        """The history as it was when it had this many rows, of the stride of now."""
        return self.from_rows(self.layout, self._rows[:count], self.first, self.stride)

    def append(self, records: Tensor) -> None:
        """Take in the records of the next steps, [n, size], on the host."""
        rows = torch.cat([self._open, records.float()])
        whole = len(rows) // self.stride * self.stride
        self._pile.add(self._join(rows[:whole], self.stride))
        self._open = rows[whole:].clone()
        while len(self) >= CAPACITY:
            even = len(self._rows) // 2 * 2
            if even < len(self._rows):
                # The odd row waits as the steps it stands for, which its mean is as good as.
                self._open = torch.cat([self._rows[even:].repeat(self.stride, 1), self._open])
            self._rows = self._join(self._rows[:even], 2)
            self.stride *= 2

    def reject_last(self) -> None:
        """Count the last step as one whose loss was not finite."""
        name, part = ("_open", 1.0) if len(self._open) else ("_rows", 1 / self.stride)
        rows = getattr(self, name).clone()
        rows[-1:, -1] = (rows[-1:, -1] - part).clamp(min=0)
        setattr(self, name, rows)

    def _join(self, rows: Tensor, every: int) -> Tensor:
        if every == 1:
            return rows
        blocks = rows.unflatten(0, (-1, every))
        finite = blocks[..., -1]
        weight = (finite / finite.sum(1, keepdim=True).clamp(min=1e-9))[..., None]
        joined = torch.where(weight > 0, blocks * weight, 0).sum(1)
        joined = torch.where(finite.sum(1)[:, None] > 0, joined, torch.nan)
        self.layout.parts(joined)["highest"].copy_(self.layout.parts(blocks)["highest"].amax(1))
        joined[:, -1] = finite.mean(1)
        return joined

    def __len__(self) -> int:
        return self._pile.count

    def __getitem__(self, part: str) -> Tensor:
        return self.layout.parts(self._rows)[part]

    @property
    def steps(self) -> Tensor:
        """[T] int64: the number of steps done at the end of each row."""
        return self.first + self.stride * torch.arange(1, len(self._rows) + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "stride": self.stride, "rows": self._rows, "open": self._open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.stride = state["first"], state["stride"]
        self._rows, self._open = state["rows"].clone(), state["open"].clone()

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write it to a file that `load` reads; plain numbers and tensors, no code."""
        torch.save({"layout": self.layout.to_dict(), **self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote, running nothing. Raises OSError, or ValueError for another kind of file."""
        state = load_plain(path)
        try:
            history = cls(Layout(**state["layout"]))
            history.load_state_dict(state)
        except (KeyError, TypeError, AttributeError) as why:
            raise ValueError(f"{os.fspath(path)} is not a history of bomkern ({type(why).__name__})") from why
        return history

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {self.stride} steps, goals {', '.join(self.layout.goals)})"


class GoalOutput:
    """What a `GoalSet` says of one step. Everything is on the device, and read or computed only when asked for.

    Attributes:
        loss: 0-dim, or [B] for ``reduction="none"``; has gradient.
        bottleneck: [B] int64, the index in `GoalSet.names` of each sample's worst goal.
        record: the step's numbers in one tensor; ``out["share"]`` and the other parts of `History` are views of it.
        walked: None without `bomkern.lazy` goals; else the part of their backward that this step walks, weighed by
            measured times.
    """

    __slots__ = ("_layout", "bottleneck", "loss", "record", "walked")

    def __init__(
        self, loss: Tensor, bottleneck: Tensor, record: Tensor, layout: Layout, walked: float | None = None
    ) -> None:
        self.loss, self.bottleneck, self.record, self._layout, self.walked = loss, bottleneck, record, layout, walked

    def __getitem__(self, part: str) -> Tensor:
        return self._layout.parts(self.record)[part]

    @property
    def share(self) -> Tensor:
        """[G]: who got the gradient, as a fraction of the samples taken into the loss."""
        return self["share"]

    @property
    def level(self) -> Tensor:
        """[G]: mean score, the water level."""
        return self["level"]

    @property
    def finite(self) -> Tensor:
        """0-dim bool: whether every sample's loss is finite."""
        return self["finite"] > 0

    def __repr__(self) -> str:
        return f"GoalOutput(loss={self.loss!r}, goals {', '.join(self._layout.goals)})"


class _Count:
    """Steps that the host knows of, whose records it has sent for, and has taken in. Outside the module, whose
    ``__setattr__`` would cost more than the ring."""

    __slots__ = ("known", "sent", "taken")

    def __init__(self, steps: int = 0) -> None:
        self.known = self.sent = self.taken = steps


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
        self._copy: tuple[HostCopy, HostCopy, int] | None = None  # the ring, the place, and what was known then
        # Rows on the host that `take` has not returned yet.
        self._fresh = _Pile(torch.empty(0, layout.size, dtype=torch.float32))
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
            finite = self.ring[:, -1]
            finite.index_copy_(0, last, finite.index_select(0, last) * ok)
        elif count.known and not ok:  # the history has been read since the step: its record is on the host
            self._history.reject_last()
            fresh = self._fresh.rows().clone()
            fresh[-1:, -1] = 0
            self._fresh = _Pile(fresh)

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
            self._fresh = _Pile(self._fresh.rows()[-CAPACITY:])

    def take(self) -> Tensor:
        """The records since the last call, at most `CAPACITY`, [n, size] on the host. Waits for the device."""
        _ = self.history
        fresh = self._fresh.rows()[-CAPACITY:]
        self._fresh = _Pile(fresh[:0])
        return fresh

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
        self._fresh = _Pile(state["fresh"].clone())


@torch.library.impl(_library, "goal_set_notice", "CompositeExplicitAutograd")
def _notice(place: Tensor, handle: int) -> None:
    """Runs where a compiled graph runs, not where it is traced; in a capture, for nothing, as in `Monitor.add`."""
    if not capturing(place.device) and (monitor := _handled.get(handle)) is not None:
        monitor.notice()


fake("goal_set_notice", _library)(lambda place, handle: None)
