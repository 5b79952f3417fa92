"""The anchors of the goals of a `bomkern.GoalSet`: which of them are still to be given, and how they move."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import Ranks
from ..constraints import Constraint, write_ramp
from .policies import SMALLEST, Anchored, Policy

log = logging.getLogger("bomkern")
Buffers = Mapping[str, Tensor]  # those of a GoalSet, by name


def write_anchor(buffers: Buffers, k: int, ideal: float | Tensor, scale: float | Tensor) -> None:
    """Give column k an ideal and a scale, on the device."""
    slope = torch.exp(-buffers["log_nudge"][k]) / scale
    row = buffers["params"][k]
    row[0] = ideal
    row[1] = slope
    row[2] = torch.where(row[2] < 0, -slope, slope)  # MinimizeHard's other side mirrors the first


class Anchors:
    """The anchors of a `bomkern.GoalSet`, before training and while it goes on.

    Their values are buffers of the GoalSet, which the methods are given: ``params``, ``start`` (the params as they
    were first) and ``log_nudge`` (what a guard has added to the logarithm of each scale). Nothing here refers to a
    tensor, so that copies and moves of the module need no care.

    Args:
        policies: by column.
        curves: the code of each column's curve.
        ranks: the processes that share the batch.

    Attributes:
        waiting: the columns whose anchors are not all known yet.
    """

    def __init__(self, policies: dict[str, Policy], curves: list[int], ranks: Ranks) -> None:
        self.policies, self.curves, self.ranks = policies, curves, ranks
        self.waiting = [column for column, policy in policies.items() if policy.waits]
        self._known: dict[str, dict[str, float]] = {column: {} for column in self.waiting}
        self._alarmed: set[str] = set()

    def index(self, column: str) -> int:
        """Return the place of a column; a KeyError names those that there are."""
        columns = list(self.policies)
        if column not in columns:
            raise KeyError(f"no goal is called {column} (there are {', '.join(columns)})")
        return columns.index(column)

    def refuse(self) -> None:
        """Raise the error of a step that is made before all anchors are known."""
        column = self.waiting[0]
        waits, known = self.policies[column].waits, self._known[column]
        name, source = next((name, source) for name, source in waits.items() if name not in known)
        what = f"{source}={{{column!r}: ...}}" if isinstance(source, str) else "a batch"
        raise RuntimeError(f"the {name} of {column} is not known yet: call GoalSet.anchor with {what} first")

    def supply(self, buffers: Buffers, batch: Any, sources: Mapping[str, Any]) -> None:
        """Take in what the sources know; see `GoalSet.anchor`."""
        for source in sources:
            if source not in ("floor", "baseline", "probe"):
                raise TypeError(f"anchors come from floor, baseline or probe, got {source!r}")
        for column in list(self.waiting):
            policy, known = self.policies[column], self._known[column]
            for name, wanted in policy.waits.items():
                value: Any = None
                if callable(wanted):
                    value = wanted(batch) if batch is not None else None
                else:
                    found = sources.get(str(wanted), {})
                    value = (found.anchors(name) if hasattr(found, "anchors") else found).get(column)
                if value is not None:
                    known[name] = number = self._agreed(value, buffers["params"].device)
                    if not math.isfinite(number):
                        raise ValueError(f"the {name} of {column} must be finite, got {number}")
            if len(known) == len(policy.waits):
                self._complete(buffers, column)

    def _complete(self, buffers: Buffers, column: str) -> None:
        """Write the anchors of a column of which both are known now."""
        policy, k = self.policies[column], self.index(column)
        assert isinstance(policy, Anchored)
        both = {**policy.known, **self._known[column]}
        ideal, nadir = both["ideal"], both["nadir"]
        if not ideal < nadir:
            log.warning(
                "the nadir of %s, %g, is not above its ideal, %g: it will hold the gradient", column, nadir, ideal
            )
        write_anchor(buffers, k, ideal, max(nadir - ideal, SMALLEST))
        buffers["start"][k] = buffers["params"][k]
        self.waiting.remove(column)

    def _agreed(self, value: Any, device: torch.device) -> float:
        """Return a number, or the mean of a tensor, and of that the mean over the ranks."""
        number = float(value.detach().float().mean() if isinstance(value, Tensor) else value)
        own = torch.tensor(number, dtype=torch.float64, device=device)
        return float(self.ranks.gather(own).mean()) if self.ranks.size > 1 else number

    def move(self, buffers: Buffers, measured: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Move anchors towards what was measured; see `GoalSet.remeasure`."""
        for column, pair in measured.items():
            policy = self.policies.get(column)
            if not isinstance(policy, Anchored) or not policy.moving:
                raise ValueError(f"{column} is not a goal with Anchored(moving=True)")
            k = self.index(column)
            now = buffers["params"][k]
            ideal, nadir = (x.to(now).mean() if isinstance(x, Tensor) else now.new_full((), x) for x in pair)
            scale = torch.exp(-buffers["log_nudge"][k]) / now[1]
            old = torch.stack([now[0], now[0] + scale])
            new = self.ranks.gather(torch.stack([ideal, nadir])).mean(0)
            low, high = old.lerp(torch.where(new.isfinite(), new, old), policy.weight).unbind()
            least = 0.05 / buffers["start"][k, 1]  # anchors that meet would make the goal infinitely steep
            write_anchor(buffers, k, low, torch.maximum(high - low, least))

    def drift(self, buffers: Buffers) -> dict[str, float]:
        """Return how far moving anchors are from where they began; see `GoalSet.drift`."""
        found = {}
        for k, (column, policy) in enumerate(self.policies.items()):
            if isinstance(policy, Anchored) and policy.moving:
                (low, slope), (low0, slope0) = (buffers[name][k, :2].tolist() for name in ("params", "start"))
                found[column] = max(abs(low - low0), abs(low + 1 / slope - low0 - 1 / slope0)) * slope0
                if found[column] > policy.alarm and column not in self._alarmed:
                    self._alarmed.add(column)
                    log.warning("the anchors of %s have drifted %.2f of its scale", column, found[column])
        return found

    def replace(self, buffers: Buffers, column: str, constraint: Constraint) -> None:
        """Give a column another constraint of the same curve; no host sync."""
        k = self.index(column)
        if not isinstance(constraint, Constraint):
            raise TypeError(f"{column} must be a constraint, got {type(constraint).__name__}")
        if constraint.curve != self.curves[k]:
            raise ValueError(f"{column} cannot become {constraint!r}: its curve is fixed; make a new GoalSet")
        write_ramp(buffers["params"][k], constraint)
        buffers["log_nudge"][k] = 0  # which is part of the scale

    def read(self, buffers: Buffers) -> dict[str, tuple[float, float]]:
        """Return (ideal, scale) of every column."""
        rows = buffers["params"].tolist()
        return {
            column: (row[0], 1 / row[1] if row[1] else 0.0) for column, row in zip(self.policies, rows, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the buffers."""
        return {"waits": list(self.waiting), "given": {column: dict(self._known[column]) for column in self.waiting}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take in what `state` returned."""
        self.waiting = [column for column, policy in self.policies.items() if policy.waits and column in state["waits"]]
        self._known = {column: dict(state.get("given", {}).get(column, {})) for column in self.waiting}
