"""A model of the bottleneck rule in plain PyTorch and float64, slow and clear, which shares no code with bomkern.

A step is one or several micro-batches. A micro-batch is a list of parts, one for each process. A part maps a column to
its value, [B] or 0-dim, and its mask, [B] or 0-dim bool; a value of None is absent, and a mask of None is all True.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LINEAR, HARD, BARRIER = 0, 1, 2
Part = dict[str, tuple[Tensor | None, Tensor | None]]


@dataclass
class Column:
    """A column: its ramp (center, right, left, tail) and curve, and its policy.

    ``policy`` is None, or "calibrated" with (steps, level, margin), or "tracking" with (rate, level).
    """

    name: str
    goal: str
    ramp: list[float]
    curve: int
    policy: tuple[str, Any] | None = None
    state: list[float] = field(default_factory=lambda: [0.0, 0.0])
    nudge: float = 0.0
    seen: list[float] = field(default_factory=list)  # values of this step so far

    def deficit(self, x: Tensor) -> Tensor:
        center, right, left, tail = self.ramp
        r = torch.where(x > center, right * (x - center), left * (x - center))
        if self.curve == LINEAR:
            return r
        if self.curve == HARD:
            return torch.log1p(r * r)
        inside = r <= 1 - tail
        return torch.where(inside, -torch.log1p(-torch.where(inside, r, 0)), -math.log(tail) + (r - 1 + tail) / tail)

    def learn(self, steps: int) -> None:
        """Set the scale from the values of this step."""
        if self.policy is None:
            return
        kind, settings = self.policy
        values = [v for v in self.seen if math.isfinite(v)]
        if kind == "calibrated":
            until, level, margin = settings
            if steps >= until or not values:
                return
            found = np.quantile(np.array(values), level)
            so_far, count = self.state
            so_far = max(so_far, found) if level == 1 else so_far + (found - so_far) / (count + 1)
            self.state = [so_far, count + 1]
            scale = max(so_far * margin, 1e-6)
        else:
            if not values:
                return
            rate, level = settings
            found = np.quantile(np.array(values), level)
            self.state = [self.state[0] + rate * (found - self.state[0]), self.state[1] + rate * (1 - self.state[1])]
            scale = max(self.state[0] / self.state[1], 1e-6)
        slope = math.exp(-self.nudge) / scale
        self.ramp[:3] = [0.0, slope, -slope if self.ramp[2] < 0 else slope]


class Micro(NamedTuple):
    """What a micro-batch gives: the loss and bottlenecks of all parts, and d loss / d value by part and column."""

    loss: Tensor
    bottleneck: Tensor
    gradients: list[dict[str, Tensor]]


class TiedError(Exception):
    """Two goals are as bad as each other, so that rounding decides which of them is the bottleneck."""


class PlainRule:
    """The state of the rule. ``begin``, then ``micro`` for each micro-batch, then ``end``."""

    def __init__(
        self,
        columns: list[Column],
        reduction: str = "mean",
        temperature: float = 0.0,
        spill: tuple[float, float] | None = None,  # ratio, rate
        guard: tuple[float, float, float, float] | None = None,  # low, high, rate, weight
    ) -> None:
        self.columns, self.reduction, self.temperature = columns, reduction, temperature
        self.spill, self.guard = spill, guard
        self.goals = list(dict.fromkeys(column.goal for column in columns))
        count = len(self.goals)
        self.members = [[k for k, c in enumerate(columns) if c.goal == goal] for goal in self.goals]
        self.average, self.multipliers = [0.0] * count, [1 / count] * count
        self.guarded = [-1.0] * count
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}

    STATE = ("columns", "average", "multipliers", "guarded")

    def begin(self) -> None:
        self._before = {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}
        self._found: list[dict[str, Any]] = []
        self._so_far: list[list[float]] = [[] for _ in self.columns]

    def micro(self, parts: list[Part]) -> Micro:
        self.columns = copy.deepcopy(self._before["columns"])
        for k, column in enumerate(self.columns):
            for part in parts:
                value, mask = part[column.name]
                if value is not None:
                    kept = value if mask is None else value[mask.expand(value.shape)]
                    self._so_far[k] += kept.reshape(-1).tolist()
            column.seen = self._so_far[k]
            column.learn(self.steps)
        return self._serve(*self._laid_out(parts))

    def again(self, parts: list[Part]) -> Micro:
        """Evaluate a closure again: nothing is learnt, and nothing recorded."""
        found = list(self._found)
        result = self._serve(*self._laid_out(parts))
        self._found = found
        return result

    def finite_so_far(self) -> bool:
        return all(each["finite"] for each in self._found)

    def reorder(self, columns: list[int], goals: list[int]) -> None:
        """Put columns and goals into another order, between two steps."""
        self.columns = [self.columns[k] for k in columns]
        self.goals, self.average, self.multipliers, self.guarded = (
            [values[g] for g in goals] for values in (self.goals, self.average, self.multipliers, self.guarded)
        )
        self.members = [[k for k, c in enumerate(self.columns) if c.goal == goal] for goal in self.goals]

    def _laid_out(self, parts: list[Part]) -> tuple[list[dict[str, Tensor]], list[Tensor], Tensor]:
        """Return the leaves of each part, the values of each column over all samples, and their presence, [B, K]."""
        leaves: list[dict[str, Tensor]] = []
        values: list[list[Tensor]] = [[] for _ in self.columns]
        masks: list[list[Tensor]] = [[] for _ in self.columns]
        for part in parts:
            given = [(v, m) for v, m in part.values()]
            batch = max([len(t) for pair in given for t in pair if t is not None and t.dim()], default=1)
            own = {}
            for k, column in enumerate(self.columns):
                value, mask = part[column.name]
                here = torch.tensor(value is not None) if mask is None else mask & (value is not None)
                here = here.expand(batch)
                if value is not None:
                    own[column.name] = value = value.detach().double().requires_grad_()
                    wide = value.expand(batch)
                else:
                    wide = torch.zeros(batch, dtype=torch.float64)
                values[k].append(torch.where(here, wide, 0.0))  # a masked value enters nothing
                masks[k].append(here)
            leaves.append(own)
        return leaves, [torch.cat(v) for v in values], torch.stack([torch.cat(m) for m in masks], 1)

    def _serve(self, leaves: list[dict[str, Tensor]], x: list[Tensor], present: Tensor) -> Micro:
        has = torch.stack([present[:, ks].any(1) for ks in self.members], 1)  # [B, G]
        counted, by_goal = has.any(1), has.sum(0).double()
        n = int(counted.sum())
        values = torch.stack(x, 1).detach()
        every, winner, per_sample, shares = self._judged(values, present, has)
        if _tied(torch.where(has, every, -torch.inf)):
            raise TiedError
        finite = per_sample.isfinite() | ~counted
        # The gradient is that of the finite samples. The others' values are put aside, because NaN times 0 is NaN.
        _, _, live, _ = self._judged(torch.stack([torch.where(finite, v, 0.5) for v in x], 1), present, has)
        live = torch.where(finite, live, 0)
        share = shares.sum(0) / max(n, 1)
        if self.reduction == "min":
            judged = torch.where(counted, per_sample.nan_to_num(nan=torch.inf), -torch.inf)
            row = int(np.argmax(judged.numpy()))
            loss, total, share = per_sample[row], live[row], shares[row]
        elif self.reduction == "none":
            loss, total = per_sample, live.sum()
        else:
            parts = max(n, 1) if self.reduction == "mean" else 1
            loss, total = per_sample.sum() / parts, live.sum() / parts
        wanted = [leaf for part in leaves for leaf in part.values()]
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True) if wanted else ()
        each = iter(grads)
        gradients = [{name: next(each) for name in part} for part in leaves]
        columns, shown = present.sum(0).double(), torch.where(has, every, -torch.inf)
        self._found.append(
            {
                "n": n, "by_goal": by_goal, "columns": columns, "share": share, "finite": bool(finite.all()),
                "loss": float(loss.sum() / max(n, 1) if self.reduction == "none" else loss),
                "level": torch.where(has, torch.exp(-shown.clamp(min=0)), 0).sum(0),
                "deficit": torch.where(has, shown, 0).sum(0),
                "raw": torch.where(present, values, 0).sum(0),
                "highest": torch.where(present & values.isfinite(), values, -torch.inf).amax(0),
            }
        )  # fmt: skip
        return Micro(loss, torch.where(counted, winner, -1), gradients)

    def _judged(self, x: Tensor, present: Tensor, has: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each goal's deficit [B, G], the worst goal, the loss of each sample [B], and the shares [B, G]."""
        count = present.to(x.dtype)
        single = torch.stack([column.deficit(v) for column, v in zip(self.columns, x.unbind(1), strict=True)], 1)
        single = torch.where(present, single, 0)
        every = torch.stack([single[:, ks].sum(1) / count[:, ks].sum(1).clamp(min=1) for ks in self.members], 1)
        shown = torch.where(has, every, -torch.inf).detach()
        winner = torch.from_numpy(np.where(shown.isnan().numpy(), np.inf, shown.numpy()).argmax(1))
        counted, by_goal = has.any(1), has.sum(0).double()
        shares = torch.nn.functional.one_hot(winner, len(self.goals)).double() * counted[:, None]
        if self.spill:
            weight = torch.tensor(self.multipliers, dtype=torch.float64)
            if not bool(has.all()):
                there = by_goal > 0
                weight = (
                    weight / weight[there].sum().clamp(min=1e-30) * int(counted.sum()) / by_goal.clamp(min=1) * there
                )
            per_sample = torch.where(has, weight * every, 0).sum(1)
            # Of the whole batch, because a goal's weight is spread over the samples that have it.
            total = (weight * by_goal).sum().clamp(min=1e-30)
            shares = torch.where(per_sample.isfinite()[:, None], weight * by_goal / total, shares) * counted[:, None]
        elif self.temperature:
            soft = torch.where(counted[:, None], torch.where(has, every / self.temperature, -torch.inf), 0)
            per_sample = self.temperature * soft.logsumexp(1)
            shares = torch.where(per_sample.isfinite()[:, None], soft.detach().softmax(1), shares) * counted[:, None]
        else:
            per_sample = every.gather(1, winner[:, None])[:, 0]
        return every, winner, torch.where(counted, per_sample, 0), shares

    def end(self, ok: bool = True) -> dict[str, Any]:
        """End the step, and return its record; take it back unless ``ok``."""
        found = self._found
        n = sum(each["n"] for each in found)
        record: dict[str, Any] = {"finite": float(ok and all(each["finite"] for each in found))}
        counts = {
            "level": sum(e["by_goal"] for e in found), "deficit": sum(e["by_goal"] for e in found),
            "raw": sum(e["columns"] for e in found),
        }  # fmt: skip
        for name, count in counts.items():
            record[name] = torch.where(count > 0, sum(e[name] for e in found) / count, torch.nan)
        record["highest"] = torch.stack([e["highest"] for e in found]).amax(0)
        if self.reduction == "min":
            worst = int(np.argmax([e["loss"] if e["n"] else -math.inf for e in found]))
            record["share"], record["loss"] = found[worst]["share"], found[worst]["loss"]
        else:
            record["share"] = sum(e["share"] * e["n"] for e in found) / max(n, 1)
            scale = [1.0 if self.reduction == "sum" else e["n"] / max(n, 1) for e in found]
            record["loss"] = sum(e["loss"] * s for e, s in zip(found, scale, strict=True))
        record["ideal"] = [column.ramp[0] for column in self.columns]
        record["slope"] = [column.ramp[1] for column in self.columns]
        self.history.append(record)
        self.steps += 1
        if not ok:
            for name, value in self._before.items():
                setattr(self, name, value)
            return record
        if self.spill:
            ratio, rate = self.spill
            for g, deficit in enumerate(record["deficit"].tolist()):
                if math.isfinite(deficit):
                    self.average[g] += rate * (deficit - self.average[g])
            order = sorted(range(len(self.goals)), key=lambda g: -self.average[g])
            total = sum(ratio**p for p in range(len(self.goals)))
            for place, g in enumerate(order):
                self.multipliers[g] = ratio**place / total
        if self.guard:
            low, high, rate, weight = self.guard
            for g, share in enumerate(record["share"].tolist()):
                if not counts["level"][g]:
                    continue
                before = self.guarded[g]
                self.guarded[g] = share if before < 0 else before + weight * (share - before)
                nudge = rate * ((self.guarded[g] > high) - (self.guarded[g] < low))
                for k in self.members[g]:
                    column = self.columns[k]
                    applied = min(7.0, max(-7.0, column.nudge + nudge)) - column.nudge
                    column.nudge += applied
                    column.ramp[1] *= math.exp(-applied)
                    column.ramp[2] *= math.exp(-applied)
        return record


def _tied(deficits: Tensor) -> bool:
    """Return whether rounding may decide on the worst goal of a sample, [B, G]; flat sides tie at exactly 0."""
    if deficits.shape[1] < 2:
        return False
    worst, next_worst = deficits.topk(2).values.unbind(1)
    near = (worst - next_worst).abs() < 1e-4 * worst.abs().clamp(min=1)
    return bool((near & (worst != 0)).any())
