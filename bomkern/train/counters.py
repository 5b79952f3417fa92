"""Counters of the trainer's steps, kept on the device and read only when a line is logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.devices import widest_float
from .nine_goals import GOALS

PER_GOAL = ("share", "starving", "longest", "blame")


class Tally:
    """Counters over steps, float64 on a device that has it: `PER_GOAL` are [K], ``steps`` is 0-dim.

    ``share`` and ``steps`` are sums over all accepted steps. ``starving`` and ``longest`` are the current and the
    longest run of accepted steps in which a goal owned no sample. ``blame`` counts how often each goal was at fault in
    the rejected steps since the last accepted one.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = widest_float(device)
        self.values = {name: torch.zeros(len(GOALS), device=device, dtype=dtype) for name in PER_GOAL}
        self.values["steps"] = torch.zeros((), device=device, dtype=dtype)

    def add(self, ok: Tensor, share: Tensor, blame: Tensor) -> None:
        """Count one step.

        Args:
            ok: 0-dim bool, whether the step was accepted.
            share: [K].
            blame: [K] bool, read only if the step was rejected.
        """
        v, zero = self.values, self.values["steps"].new_zeros(())
        v["share"].add_(torch.where(ok, share.to(zero.dtype), zero))
        v["steps"].add_(ok)
        v["starving"].copy_(torch.where(ok, torch.where(share > 0, zero, v["starving"] + 1), v["starving"]))
        torch.maximum(v["longest"], v["starving"], out=v["longest"])
        v["blame"].copy_(torch.where(ok, zero, v["blame"] + blame))

    def blamed(self) -> str:
        """Return the goal that was at fault most often."""
        return GOALS[int(self.values["blame"].argmax())]

    def totals(self) -> dict[str, Any]:
        """Return the share and the longest starvation of each goal over all accepted steps."""
        share = (self.values["share"] / self.values["steps"].clamp(min=1)).tolist()
        return {
            "share": dict(zip(GOALS, share, strict=True)),
            "longest_starvation": dict(zip(GOALS, map(int, self.values["longest"].tolist()), strict=True)),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.values.items():
            tensor.copy_(state[name])
