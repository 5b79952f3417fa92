"""What happened in the steps, counted on the device and read only when a line is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bomkern import MinGoalStats

from .goals import GOALS

REJECTED_IN_A_ROW = 50  # after so many, training stops


class Tally:
    """Counters over steps, all tensors on the device. K goals.

    Attributes:
        loss, raw, level, share, taken: sums over the accepted steps since the last `window`, and their number.
        share_total, steps: sum of the shares of all accepted steps, and their number.
        starving, longest: [K] current and longest run of accepted steps in which a goal owned no sample.
        rejected, in_a_row: rejected steps, all and since the last accepted one.
        blame: [K] how often each goal was at fault in the current run of rejected steps.
    """

    def __init__(self, device: torch.device) -> None:
        count = len(GOALS)
        self.values = {name: torch.zeros(count, device=device, dtype=torch.float64) for name in ("raw", "level", "share", "blame")}
        self.values |= {name: torch.zeros(count, device=device, dtype=torch.float64) for name in ("share_total", "starving", "longest")}
        self.values |= {
            name: torch.zeros((), device=device, dtype=torch.float64) for name in ("loss", "taken", "steps", "rejected", "in_a_row")
        }

    def add(self, ok: Tensor, loss: Tensor, raw: Tensor, stats: MinGoalStats, blame: Tensor) -> None:
        """Count one step. ok: 0-dim bool; raw: [K] batch means; blame: [K] bool, only read where not ok."""
        v = self.values
        share = stats.share.double()
        zero = v["loss"].new_zeros(())
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

    def window(self) -> dict[str, Any] | None:
        """Means over the accepted steps since the last call, read from the device; None if there was none."""
        v = self.values
        packed = torch.cat([v["raw"], v["level"], v["share"], v["loss"][None], v["taken"][None]]).tolist()
        for name in ("loss", "raw", "level", "share", "taken"):
            v[name].zero_()
        taken, k = packed[-1], len(GOALS)
        if not taken:
            return None
        mean = [x / taken for x in packed[:-1]]
        goals = {
            name: {"raw": mean[i], "level": mean[k + i], "share": mean[2 * k + i]} for i, name in enumerate(GOALS)
        }
        return {"loss": mean[3 * k], "goals": goals}

    def stuck(self) -> str | None:
        """The goal at fault, if too many steps in a row were rejected."""
        v = self.values
        packed = torch.cat([v["in_a_row"][None], v["blame"]]).tolist()
        if packed[0] < REJECTED_IN_A_ROW:
            return None
        return GOALS[max(range(len(GOALS)), key=lambda i: packed[1 + i])]

    def totals(self) -> dict[str, Any]:
        """share and longest starvation per goal over all accepted steps, and how many were rejected."""
        v = {name: tensor.tolist() for name, tensor in self.values.items()}
        steps = max(1.0, v["steps"])
        return {
            "share": {name: v["share_total"][i] / steps for i, name in enumerate(GOALS)},
            "longest_starvation": {name: int(v["longest"][i]) for i, name in enumerate(GOALS)},
            "rejected_steps": int(v["rejected"]),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.values.items():
            tensor.copy_(state[name])
