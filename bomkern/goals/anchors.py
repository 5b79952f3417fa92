"""The columns of a `bomkern.GoalSet`: their policies, and the anchors that they are measured against."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.process_group import Ranks
from ..common.torch_internals import FullPrecisionBuffers
from ..constraints import Constraint, write_ramp
from .policies import SMALLEST, Anchored, Policy

log = logging.getLogger("bomkern")


class Columns(FullPrecisionBuffers):
    """What a `bomkern.GoalSet` is told of its goals' anchors, before training and while it goes on.

    Attributes:
        policies: by column. params: [K, 4] their constraints' parameters; start: as they were first.
        log_nudge: [K], what a guard has added to the logarithm of each scale.
    """

    params: Tensor
    start: Tensor
    log_nudge: Tensor

    policies: dict[str, Policy]
    curves: list[int]
    _ranks: Ranks

    def _await_anchors(self) -> None:
        """Before the first step, when the policies are known."""
        self._waits = [column for column, policy in self.policies.items() if policy.waits]
        self._given: dict[str, dict[str, float]] = {c: {} for c in self._waits}  # anchors found so far
        self._alarmed: set[str] = set()

    def _place(self, k: int, ideal: float | Tensor, scale: float | Tensor) -> None:
        """Give column k an ideal and a scale, on the device."""
        slope = torch.exp(-self.log_nudge[k]) / scale
        row = self.params[k]
        row[0] = ideal
        row[1] = slope
        row[2] = torch.where(row[2] < 0, -slope, slope)  # MinimizeHard's other side mirrors the first

    def _refuse_unanchored(self) -> None:
        column = self._waits[0]
        waits, given = self.policies[column].waits, self._given[column]
        name, source = next((name, source) for name, source in waits.items() if name not in given)
        what = f"{source}={{{column!r}: ...}}" if isinstance(source, str) else "a batch"
        raise RuntimeError(f"the {name} of {column} is not known yet: call GoalSet.anchor with {what} first")

    def anchor(self, batch: Any = None, **sources: Any) -> None:
        """Supply the anchors that `Anchored` policies wait for, before the first step.

        Args:
            batch: what functions given as ideal or nadir are called with.
            sources: ``floor=``, ``baseline=`` or ``probe=``: a mapping from goals (of a group's member
                "group.member") to numbers or 0-dim tensors; for ``probe`` what `bomkern.probe` returned.
        """
        for source in sources:
            if source not in ("floor", "baseline", "probe"):
                raise TypeError(f"anchors come from floor, baseline or probe, got {source!r}")
        for column in list(self._waits):
            policy, known = self.policies[column], self._given[column]
            for name, wanted in policy.waits.items():
                value: Any = None
                if callable(wanted):
                    value = wanted(batch) if batch is not None else None
                else:
                    found = sources.get(str(wanted), {})
                    value = (found.anchors(name) if hasattr(found, "anchors") else found).get(column)
                if value is not None:
                    known[name] = number = self._agreed(value)
                    if not math.isfinite(number):
                        raise ValueError(f"the {name} of {column} must be finite, got {number}")
            if len(known) == len(policy.waits):
                assert isinstance(policy, Anchored)
                both = {**policy.known, **known}
                ideal, nadir, k = both["ideal"], both["nadir"], self._column(column)
                if not ideal < nadir:
                    log.warning(
                        "the nadir of %s, %g, is not above its ideal, %g: it will hold the gradient",
                        column,
                        nadir,
                        ideal,
                    )
                self._place(k, ideal, max(nadir - ideal, SMALLEST))
                self.start[k] = self.params[k]
                self._waits.remove(column)

    def _agreed(self, value: Any) -> float:
        """A number, or the mean of a tensor, and the mean over the ranks."""
        number = float(value.detach().float().mean() if isinstance(value, Tensor) else value)
        own = torch.tensor(number, dtype=torch.float64, device=self.params.device)
        return float(self._ranks.gather(own).mean()) if self._ranks.size > 1 else number

    @torch.no_grad()
    def remeasure(self, measured: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Move the anchors of goals with ``moving=True`` towards what was measured on held-out samples; no host sync.

        Args:
            measured: by column, raw values [n] or 0-dim of what is ideal and of what is no better than nothing.
                What is not finite moves nothing.
        """
        for column, pair in measured.items():
            policy = self.policies.get(column)
            if not isinstance(policy, Anchored) or not policy.moving:
                raise ValueError(f"{column} is not a goal with Anchored(moving=True)")
            k = list(self.policies).index(column)
            now = self.params[k]
            ideal, nadir = (x.to(now).mean() if isinstance(x, Tensor) else now.new_full((), x) for x in pair)
            scale = torch.exp(-self.log_nudge[k]) / now[1]
            old = torch.stack([now[0], now[0] + scale])
            new = self._ranks.gather(torch.stack([ideal, nadir])).mean(0)
            low, high = old.lerp(torch.where(new.isfinite(), new, old), policy.weight).unbind()
            least = 0.05 / self.start[k, 1]  # anchors that meet would make the goal infinitely steep
            self._place(k, low, torch.maximum(high - low, least))

    def drift(self) -> dict[str, float]:
        """How far the anchors of each moving goal are from where they began, in units of its first scale.

        Reads from the device. The first drift of a goal beyond its policy's ``alarm`` is also logged as a warning.
        """
        found = {}
        for k, (column, policy) in enumerate(self.policies.items()):
            if isinstance(policy, Anchored) and policy.moving:
                (low, slope), (low0, slope0) = self.params[k, :2].tolist(), self.start[k, :2].tolist()
                found[column] = max(abs(low - low0), abs(low + 1 / slope - low0 - 1 / slope0)) * slope0
                if found[column] > policy.alarm and column not in self._alarmed:
                    self._alarmed.add(column)
                    log.warning("the anchors of %s have drifted %.2f of its scale", column, found[column])
        return found

    def __setitem__(self, column: str, constraint: Constraint) -> None:
        """Give a goal another constraint of the same curve; no host sync."""
        k = self._column(column)
        if not isinstance(constraint, Constraint):
            raise TypeError(f"{column} must be a constraint, got {type(constraint).__name__}")
        if constraint.curve != self.curves[k]:
            raise ValueError(f"{column} cannot become {constraint!r}: its curve is fixed; make a new GoalSet")
        write_ramp(self.params[k], constraint)
        self.log_nudge[k] = 0  # which is part of the scale

    def anchors(self) -> dict[str, tuple[float, float]]:
        """(ideal, scale) of every column, read from the device."""
        rows = self.params.tolist()
        return {
            column: (row[0], 1 / row[1] if row[1] else 0.0) for column, row in zip(self.policies, rows, strict=True)
        }

    def _column(self, name: str) -> int:
        columns = list(self.policies)
        if name not in columns:
            raise KeyError(f"no goal is called {name} (there are {', '.join(columns)})")
        return columns.index(name)

    def get_extra_state(self) -> dict[str, Any]:
        return {"waits": list(self._waits), "given": {column: dict(self._given[column]) for column in self._waits}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._waits = [column for column, policy in self.policies.items() if policy.waits and column in state["waits"]]
        self._given = {column: dict(state.get("given", {}).get(column, {})) for column in self._waits}
