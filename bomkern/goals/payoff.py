"""`Payoff`: the table that `bomkern.probe` makes, the anchors that follow from it, and its cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Payoff(NamedTuple):
    """The payoff table (Benayoun et al. 1971, "Linear programming with multiple objective functions: STEM").

    Attributes:
        columns: K names.
        table: [K, K] float32 on the host; row i holds all raw values after training on goal i alone, NaN where they
            are not finite.
        updates: number of training steps in all runs.
        maximize: names of the columns of which larger values are better.
        start: K raw values of the untrained model.
        ideals, nadirs: K anchors that `probe` estimated; empty in a table that was made otherwise.
        lengths: K numbers of steps, one for each run.
        seconds: duration of all runs.
        training: steps of the training that follows, if `probe` was told.
        unsettled: names of the goals that had not settled at the end of their own runs.
        unmoved: names of the goals that no run moved by more than noise, whose scales are guesses.
        left_out: names of the goals whose own runs gave no finite value, and are in no statistic.
    """

    columns: list[str]
    table: Tensor
    updates: int
    maximize: tuple[str, ...] = ()
    start: tuple[float, ...] = ()
    ideals: tuple[float, ...] = ()
    nadirs: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()
    seconds: float = 0.0
    training: int | None = None
    unsettled: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def anchors(self, which: str) -> dict[str, float]:
        """Return "ideal" or "nadir" by column.

        Without estimates they are the diagonal of the table, and the worst entry of each column.
        """
        values = self.ideals if which == "ideal" else self.nadirs
        if not values:
            falls = torch.tensor([name in self.maximize for name in self.columns])
            worst = torch.where(falls, self.table.amin(0), self.table.amax(0))
            values = tuple((self.table.diagonal() if which == "ideal" else worst).tolist())
        return dict(zip(self.columns, values, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; fields that are empty are left out."""
        told = {"goals": self.columns, "table": self.table.tolist(), "updates": self.updates}
        more = {name: getattr(self, name) for name in self._fields[len(told) :]}
        return told | {n: list(v) if isinstance(v, tuple) else v for n, v in more.items() if v}

    def __str__(self) -> str:
        width = max(10, *map(len, self.columns))
        rows = ["trained on".ljust(width) + "".join(f"  {name:>{width}}" for name in self.columns)]
        told = list(zip(self.columns, self.table.tolist(), strict=True))
        told += [(name, values) for name, values in (("ideal", self.ideals), ("nadir", self.nadirs)) if values]
        for name, row in told:
            rows.append(name.ljust(width) + "".join(f"  {value:>{width}.4g}" for value in row))
        return "\n".join([*rows, self.cost(), *self.doubts()])

    def cost(self) -> str:
        """Return the updates, of each run too, the seconds, and the part of the training that follows."""
        each = f" ({', '.join(map(str, self.lengths))})" if self.lengths else ""
        took = f" in {self.seconds:.1f} s" if self.seconds else ""
        part = f", {self.updates / self.training:.0%} of {self.training} training steps" if self.training else ""
        return f"{self.updates} updates{each}{took}{part}"

    def doubts(self) -> list[str]:
        """Return a sentence for each reason not to trust the anchors of some goals."""
        reasons = (
            (self.unsettled, "not settled at the end of its own run: probe longer, or name its ideal"),
            (self.unmoved, "moved by no run, so its scale is a guess: name its ideal and nadir, or probe longer"),
            (self.left_out, "not finite after training on it alone; that run is left out: lower the learning rate"),
        )
        return [f"{', '.join(names)}: {why}" for names, why in reasons if names]
