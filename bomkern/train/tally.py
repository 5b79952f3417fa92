"""What happened in the steps, counted on the device and read only when a line is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bomkern import MinGoalStats

from .goals import GOALS

REJECTED_IN_A_ROW = 50  # after so many, training stops
PER_GOAL = ("raw", "level", "share", "share_total", "starving", "longest", "blame")
PLAIN = ("loss", "taken", "steps", "rejected", "in_a_row")


class Tally:
    """Counters over steps, float64 on the device: `PER_GOAL` are [K], `PLAIN` are 0-dim.

    ``loss``, ``raw``, ``level``, ``share`` are sums over the accepted steps since the last `window`, ``taken`` is their
    number; ``share_total`` and ``steps`` over all accepted steps. ``starving`` and ``longest`` are the current and
    the longest run of accepted steps in which a goal owned no sample. ``rejected`` counts rejected steps, ``in_a_row``
    those since the last accepted one, ``blame`` how often each goal was at fault in them.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = {name: torch.zeros(len(GOALS), device=device, dtype=torch.float64) for name in PER_GOAL}
        self.values |= {name: torch.zeros((), device=device, dtype=torch.float64) for name in PLAIN}

    def add(self, ok: Tensor, loss: Tensor, raw: Tensor, stats: MinGoalStats, blame: Tensor) -> None:
        """Count one step. ok: 0-dim bool; raw: [K] batch means; blame: [K] bool, only read where not ok."""
        v = self.values
        share, zero = stats.share.double(), v["loss"].new_zeros(())
        for name, value in (("loss", loss), ("raw", raw), ("level", stats.level), ("share", share)):
            v[name].add_(torch.where(ok, value.detach().double(), zero))
        v["share_total"].add_(torch.where(ok, share, zero))
        for name in ("taken", "steps"):
            v[name].add_(ok)
        v["starving"].copy_(torch.where(ok, torch.where(share > 0, zero, v["starving"] + 1), v["starving"]))
        torch.maximum(v["longest"], v["starving"], out=v["longest"])
        v["rejected"].add_(~ok)
        v["in_a_row"].copy_(torch.where(ok, zero, v["in_a_row"] + 1))
        v["blame"].copy_(torch.where(ok, zero, v["blame"] + blame))

    def window(self) -> dict[str, Any]:
        """Means over the accepted steps since the last call, read from the device; empty if there was none."""
        names = ("raw", "level", "share")
        packed = torch.cat([*(self.values[name] for name in names), self.values["loss"][None]])
        *means, taken = torch.cat([packed, self.values["taken"][None]]).tolist()
        for name in (*names, "loss", "taken"):
            self.values[name].zero_()
        if not taken:
            return {}
        rows = [[x / taken for x in means[i :: len(GOALS)][:3]] for i in range(len(GOALS))]
        goals = {name: dict(zip(names, row, strict=True)) for name, row in zip(GOALS, rows, strict=True)}
        return {"loss": means[-1] / taken, "goals": goals}

    def stuck(self) -> str | None:
        """The goal at fault, if too many steps in a row were rejected."""
        in_a_row, *blame = torch.cat([self.values["in_a_row"][None], self.values["blame"]]).tolist()
        return GOALS[max(range(len(GOALS)), key=blame.__getitem__)] if in_a_row >= REJECTED_IN_A_ROW else None

    def totals(self) -> dict[str, Any]:
        """share and longest starvation per goal over all accepted steps, and how many were rejected."""
        share = (self.values["share_total"] / self.values["steps"].clamp(min=1)).tolist()
        return {
            "share": dict(zip(GOALS, share, strict=True)),
            "longest_starvation": dict(zip(GOALS, map(int, self.values["longest"].tolist()), strict=True)),
            "rejected_steps": int(self.values["rejected"]),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.values.items():
            tensor.copy_(state[name])
