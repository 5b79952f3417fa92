"""The anchors of the goals of a `bomkern.GoalSet`: take in those that are still unknown, and move them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_number
from ..common.process_group import Ranks
from ..constraints import Constraint, ConstraintTable, write_ramp
from .policies import SMALLEST, SOURCES, Anchor, Anchored, Policy

log = logging.getLogger("bomkern")
Buffers = Mapping[str, Tensor]  # the buffers of a GoalSet, by name


def write_anchor(buffers: Buffers, k: int, ideal: float | Tensor, scale: float | Tensor) -> None:
    """Write an ideal and a scale > 0 into the parameters of column k, on the device.

    Each side keeps its sign: a rising side rises, a falling side falls, and a flat side stays flat.
    """
    slope = torch.exp(-buffers["log_nudge"][k]) / scale
    row = buffers["params"][k]
    row[0] = ideal
    row[1:3] = row[1:3].sign() * slope


class Anchors:
    """The anchors of a `bomkern.GoalSet`, before and during training.

    Their values are buffers of the GoalSet, which are passed to the methods: ``params``, ``start`` (the first
    ``params``) and ``log_nudge`` (the sum of the guard's changes of each log scale). This object holds no tensor, so
    copies and moves of the module need no care.

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
        """Return the index of a column. The KeyError of an unknown one lists all names."""
        columns = list(self.policies)
        if column not in columns:
            raise KeyError(f"no goal is called {column} (there are {', '.join(columns)})")
        return columns.index(column)

    def refuse(self) -> None:
        """Raise the error of a step before all anchors are known."""
        column = self.waiting[0]
        name, source = next(iter(self.so_far(column)[1].items()))
        what = f"{source}={{{column!r}: ...}}" if isinstance(source, str) else "a batch"
        raise RuntimeError(f"the {name} of {column} is not known yet: call GoalSet.anchor with {what} first")

    def so_far(self, column: str) -> tuple[dict[str, float], dict[str, Anchor]]:
        """Return the anchors of a column that are known, and the sources of the others."""
        policy = self.policies[column]
        assert isinstance(policy, Anchored)
        known = {**policy.known, **self._known.get(column, {})}
        return known, {name: source for name, source in policy.waits.items() if name not in known}

    def supply(self, buffers: Buffers, batch: Any, sources: Mapping[str, Any]) -> None:
        """Take in anchors from a batch or from sources; see `GoalSet.anchor`."""
        for source in sources:
            if source not in SOURCES:
                raise TypeError(f"anchors come from floor, baseline or probe, got {source!r}")
        for column in list(self.waiting):
            policy, known = self.policies[column], self._known[column]
            for name, wanted in policy.waits.items():
                value: Any = None
                if callable(wanted):
                    value = wanted(batch) if batch is not None else None
                else:
                    values = sources.get(str(wanted), {})
                    value = (values.anchors(name) if hasattr(values, "anchors") else values).get(column)
                if value is not None:
                    known[name] = number = self._agreed(value, buffers["params"].device)
                    if not math.isfinite(number):
                        raise ValueError(f"the {name} of {column} must be finite, got {number}")
            if len(known) == len(policy.waits):
                self._complete(buffers, column)

    def _complete(self, buffers: Buffers, column: str) -> None:
        """Write the anchors of a column once both are known."""
        policy = self.policies[column]
        assert isinstance(policy, Anchored)
        ideal, nadir, away = self._write(buffers, column)
        if not away > 0:
            side, other = ("below", False) if policy.maximize else ("above", True)
            fix = f"; if it is on purpose, write Anchored(..., maximize={other})" if away < 0 else ""
            text = "the nadir of %s, %g, is not %s its ideal, %g: it will hold the gradient%s"
            log.warning(text, column, nadir, side, ideal, fix)
        k = self.index(column)
        buffers["start"][k] = buffers["params"][k]
        self.waiting.remove(column)

    def _write(self, buffers: Buffers, column: str) -> tuple[float, float, float]:
        """Write the known anchors of a column; return the ideal, the nadir, and how much worse the nadir is."""
        policy = self.policies[column]
        assert isinstance(policy, Anchored)
        both, _ = self.so_far(column)
        ideal, nadir = both["ideal"], both["nadir"]
        away = ideal - nadir if policy.maximize else nadir - ideal
        write_anchor(buffers, self.index(column), ideal, max(away, SMALLEST))
        return ideal, nadir, away

    def first_params(self) -> Tensor:
        """Return the parameters before the first step, [K, 4] float32 on the host, with the anchors known so far."""
        params = ConstraintTable([policy.constraint for policy in self.policies.values()], "cpu").params
        buffers = {"params": params, "log_nudge": params.new_zeros(len(params))}
        for column in self._known:
            if column not in self.waiting:
                self._write(buffers, column)
        return params

    def restart(self) -> None:
        """Return to the state before the first step. Anchors that `GoalSet.anchor` supplied stay known."""
        self._alarmed.clear()
        self.waiting = [c for c, p in self.policies.items() if p.waits and len(self._known[c]) < len(p.waits)]

    def _agreed(self, value: Any, device: torch.device) -> float:
        """Return the mean over the ranks of a number, or of the mean of a tensor."""
        number = float(value.detach().float().mean() if isinstance(value, Tensor) else value)
        if self.ranks.size == 1:
            return number
        # Two float32 hold 48 bits: not every device has float64.
        high = torch.tensor(number, dtype=torch.float32, device="cpu")
        low = torch.tensor(number - float(high) if high.isfinite() else 0.0, dtype=torch.float32, device="cpu")
        gathered = self.ranks.gather(torch.stack([high, low]).to(device)).tolist()
        return sum(float(part) for pair in gathered for part in pair) / self.ranks.size

    def move(self, buffers: Buffers, measured: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Move anchors towards measured values; see `GoalSet.remeasure`."""
        for column, pair in measured.items():
            policy = self.policies.get(column)
            if not isinstance(policy, Anchored) or not policy.moving:
                raise ValueError(f"{column} is not a goal with Anchored(moving=True)")
            k = self.index(column)
            now = buffers["params"][k]
            ideal, nadir = (
                x.to(now).mean() if isinstance(x, Tensor) else now.new_full((), check_number(column, x)) for x in pair
            )
            scale = torch.exp(-buffers["log_nudge"][k]) / now[1]  # below 0 for a goal to maximize
            old = torch.stack([now[0], now[0] + scale])
            new = self.ranks.gather(torch.stack([ideal, nadir])).mean(0)
            ideal, nadir = old.lerp(torch.where(new.isfinite(), new, old), policy.weight).unbind()
            least = 0.05 / buffers["start"][k, 1].abs()  # a scale of 0 would make the goal infinitely steep
            write_anchor(buffers, k, ideal, torch.maximum((nadir - ideal) * now[1].sign(), least))

    def drift(self, buffers: Buffers) -> dict[str, float]:
        """Return the distance of moving anchors from their first values; see `GoalSet.drift`."""
        drifts = {}
        for k, (column, policy) in enumerate(self.policies.items()):
            if isinstance(policy, Anchored) and policy.moving:
                (low, slope), (low0, slope0) = (buffers[name][k, :2].tolist() for name in ("params", "start"))
                drifts[column] = max(abs(low - low0), abs(low + 1 / slope - low0 - 1 / slope0)) * abs(slope0)
                if drifts[column] > policy.alarm and column not in self._alarmed:
                    self._alarmed.add(column)
                    log.warning("the anchors of %s have drifted %.2f of its scale", column, drifts[column])
        return drifts

    def replace(self, buffers: Buffers, column: str, constraint: Constraint) -> None:
        """Replace the constraint of a column by another one of the same curve; no host sync."""
        k = self.index(column)
        if not isinstance(constraint, Constraint):
            raise TypeError(f"{column} must be a constraint, got {type(constraint).__name__}")
        if constraint.curve != self.curves[k]:
            raise ValueError(f"{column} cannot become {constraint!r}: its curve is fixed; make a new GoalSet")
        write_ramp(buffers["params"][k], constraint)
        buffers["log_nudge"][k] = 0  # the new scale contains no nudge

    def read(self, buffers: Buffers) -> dict[str, tuple[float, float]]:
        """Return (ideal, scale) of every column. The scale is positive, whichever side is worse."""
        found = {}
        for column, (ideal, right, left, _) in zip(self.policies, buffers["params"].tolist(), strict=True):
            slope = abs(right or left)
            found[column] = ideal, 1 / slope if slope else 0.0
        return found

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds beside the buffers."""
        return {"waits": list(self.waiting), "given": {column: dict(known) for column, known in self._known.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load a state that `state` returned, of the columns in ``state["from"]``; others stay as they are."""
        waits = {*state["waits"], *(column for column in self.waiting if column not in state["from"])}
        self.waiting = [column for column, policy in self.policies.items() if policy.waits and column in waits]
        for column in state["from"]:
            if column in self._known:
                self._known[column] = dict(state["given"].get(column, {}))
