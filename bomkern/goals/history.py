"""The history of the steps of a `bomkern.GoalSet`, on the host, and the output of one step."""

from __future__ import annotations

import os
from typing import IO, Any

import torch
from torch import Tensor

from ..common.files import load_plain
from .constraint_info import ConstraintInfo
from .record import Layout

CAPACITY = 4096  # rows of a history; when it is full, pairs of rows are joined and the stride doubles


class Rows:
    """Rows [n, size] that are concatenated only when they are read."""

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
    """The records of all steps, in at most `CAPACITY` rows on the host.

    Indexing by the name of a part gives a float32 tensor with one row per ``stride`` steps. ``history["share"]``,
    ``"level"`` and ``"deficit"`` are [T, G]; ``"raw"``, ``"highest"``, ``"ideal"`` and ``"scale"`` are [T, K];
    ``"loss"`` and ``"finite"`` are [T]. The scale is positive, whichever side of the ideal is worse. A row of several
    steps holds the means over the steps with a finite loss. Two parts differ: ``highest`` is the largest of them, and
    ``finite`` is the fraction of the steps with a finite loss. The level, deficit and raw value of a goal that no
    sample of a step had are NaN; such steps are in no mean of them.

    ``"rows"``, [T, K], is the number of samples in a step on which the raw value of each column rests, and so its
    goal's level and deficit, over all ranks. It is NaN for steps of an older bomkern, and where replayed CUDA graphs
    and other steps differ in it.

    Attributes:
        layout: names of the goals and columns, see `Layout`.
        stride: steps per row.
        first: steps done before the first row.
    """

    def __init__(self, layout: Layout, first: int = 0, stride: int = 1) -> None:
        self.layout, self.first, self.stride = layout, first, stride
        # On the host, whatever torch's default device is.
        width = layout.size + len(layout.columns)  # records of `Layout.counted`
        self._rows = torch.empty(0, width, dtype=torch.float32, device="cpu")
        self._open = self._rows.clone()  # steps that do not fill a row yet

    @property
    def _rows(self) -> Tensor:
        return self._kept.rows()

    @_rows.setter
    def _rows(self, rows: Tensor) -> None:
        self._kept = Rows(rows)

    @classmethod
    def from_rows(cls, layout: Layout, rows: Tensor, first: int = 0, stride: int = 1) -> History:
        """Make a history of records [T, size], each of which stands for ``stride`` steps."""
        history = cls(layout, first, stride)
        history._rows = layout.counted(rows.float())
        return history

    def first_rows(self, count: int) -> History:
        """Return a history of the first ``count`` rows, with the current stride."""
        return self.from_rows(self.layout, self._rows[:count], self.first, self.stride)

    def append(self, records: Tensor) -> None:
        """Append the records of the next steps, [n, size] or those of `Layout.counted`, on the host."""
        rows = torch.cat([self._open, self.layout.counted(records.float())])
        whole = len(rows) // self.stride * self.stride
        self._kept.add(self._join(rows[:whole], self.stride))
        self._open = rows[whole:].clone()
        while len(self) >= CAPACITY:
            even = len(self._rows) // 2 * 2
            if even < len(self._rows):
                # The odd row becomes open steps again, each of them equal to its mean.
                self._open = torch.cat([self._rows[even:].repeat(self.stride, 1), self._open])
            self._rows = self._join(self._rows[:even], 2)
            self.stride *= 2

    def reject_last(self) -> None:
        """Count the last step as one whose loss was not finite."""
        name, part = ("_open", 1.0) if len(self._open) else ("_rows", 1 / self.stride)
        rows = getattr(self, name).clone()
        finite = rows[-1:, self.layout.at.finite]
        finite.copy_((finite - part).clamp(min=0))
        setattr(self, name, rows)

    def _join(self, rows: Tensor, every: int) -> Tensor:
        """Join each ``every`` rows into one, as the class says."""
        if every == 1:
            return rows
        blocks = rows.unflatten(0, (-1, every))
        finite = blocks[..., self.layout.at.finite]
        weight = torch.where(blocks.isnan(), 0, finite[..., None])  # NaN: no sample had the goal
        total = weight.sum(1, keepdim=True)
        weight = weight / total.clamp(min=1e-9)
        joined = torch.where(weight > 0, blocks * weight, 0).sum(1)
        joined = torch.where(total[:, 0] > 0, joined, torch.nan)
        self.layout.parts(joined)["highest"].copy_(self.layout.parts(blocks)["highest"].amax(1))
        joined[:, self.layout.at.finite] = finite.mean(1)
        return joined

    def __len__(self) -> int:
        return self._kept.count

    def __getitem__(self, part: str) -> Tensor:
        return self.layout.parts(self._rows)[part]

    @property
    def steps(self) -> Tensor:
        """The number of steps done at the end of each row, [T] int64."""
        return self.first + self.stride * torch.arange(1, len(self._rows) + 1, device="cpu")

    def state_dict(self) -> dict[str, Any]:
        (rows, counts), (opened, open_counts) = (
            x.tensor_split([self.layout.size], -1) for x in (self._rows, self._open)
        )
        state = {"first": self.first, "stride": self.stride, "rows": rows, "open": opened}
        return {**state, "counts": counts, "open_counts": open_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.stride = state["first"], state["stride"]
        counted = self.layout.counted
        self._rows = counted(state["rows"].clone(), state.get("counts"))  # an older bomkern has saved no counts
        self._open = counted(state["open"].clone(), state.get("open_counts"))

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the history to a file that `load` reads. It holds plain numbers and tensors, no code."""
        # These stand beside the layout, because older versions take each key of the layout for an argument.
        more: dict[str, Any] = {"constraints": [constraint.to_dict() for constraint in self.layout.constraints]}
        more["least"] = self.layout.least
        torch.save({"layout": self.layout.to_dict(), **more, **self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read a file that `save` wrote, without running code. Raises OSError, or ValueError for any other file."""
        state = load_plain(path)
        try:
            layout = {**state["layout"], "least": state.get("least", 0.0)}
            if "constraints" in state:
                layout["constraints"] = [ConstraintInfo.from_dict(given) for given in state["constraints"]]
            history = cls(Layout(**layout))
            history.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, ValueError) as why:
            raise ValueError(f"{os.fspath(path)} is not a history of bomkern ({type(why).__name__})") from why
        return history

    def __repr__(self) -> str:
        return f"History({len(self)} rows of {self.stride} steps, goals {', '.join(self.layout.goals)})"


class GoalOutput:
    """The output of a `GoalSet` for one step. Everything is on the device, and computed or read only on request.

    Attributes:
        loss: 0-dim, or [B] for ``reduction="none"``; differentiable.
        bottleneck: [B] int64, the index in `GoalSet.names` of each sample's worst goal; -1 for one without any goal.
        record: the step's numbers in one tensor; ``out["share"]`` and the other parts of `History` are views of it.
        walked: the fraction of the backward of `bomkern.lazy` goals that runs in this step, weighted by measured times;
            None without lazy goals.
        watched: the output for the goals of ``GoalSet(monitor=)``, whose loss has no meaning; None if there are none.
    """

    __slots__ = ("_layout", "_rows", "bottleneck", "loss", "record", "walked", "watched")

    def __init__(
        self,
        loss: Tensor,
        bottleneck: Tensor,
        record: Tensor,
        layout: Layout,
        walked: float | None = None,
        watched: GoalOutput | None = None,
        rows: Tensor | int = 0,
    ) -> None:
        self.loss, self.bottleneck, self.record, self._layout, self.walked = loss, bottleneck, record, layout, walked
        self.watched, self._rows = watched, rows

    def __getitem__(self, part: str) -> Tensor:
        return self.rows if part == "rows" else self._layout.parts(self.record)[part]

    @property
    def rows(self) -> Tensor:
        """The number of samples on which each raw value rests, and so its goal's level and deficit: [K] int64.

        It is the batch over all ranks, less the samples that a mask or a budget of `Spill` leaves out. Of micro-batches
        it is the sum over the step so far. A goal of the whole batch (0-dim) counts as all samples.
        """
        if isinstance(self._rows, Tensor):
            return self._rows.to(torch.int64)
        return self.record.new_full((len(self._layout.columns),), self._rows, dtype=torch.int64)

    @property
    def share(self) -> Tensor:
        """The share of the gradient that each goal gets, as a fraction of the samples in the loss, [G]."""
        return self["share"]

    @property
    def level(self) -> Tensor:
        """The mean score of each goal, its water level in [0, 1], [G]; NaN for a goal that no sample has."""
        return self["level"]

    @property
    def finite(self) -> Tensor:
        """Whether every sample's loss is finite, 0-dim bool."""
        return self["finite"] > 0

    def __repr__(self) -> str:
        return f"GoalOutput(loss={self.loss!r}, goals {', '.join(self._layout.goals)})"
