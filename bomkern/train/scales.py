"""Where the scale and the ideal of each goal come from: the three presets of ``--scales``."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import ConstraintTable, Minimize

from .goals import GOALS, anchors

MARGIN = 1.1  # over the largest value so far, while the largest is still being looked for
SMALLEST = 1e-6  # a scale is greater than 0
# The hand-set scales of the diagnosis that bomkern began with; the other goals calibrate themselves.
DIAGNOSIS = {"realism": 2.0, "consistency": 500.0, "capacity": 0.4}


class Scales:
    """A `Minimize` constraint for each of the nine goals, in device memory, calibrated without a host sync.

    - ``anchored``: ideal and nadir of `goals.anchors`, ``scale = nadir - ideal``. Every goal has both before the first
      step, the image goals because their raw values are fractions of what trivial answers cost (`goals.Trivial`), so
      nothing is calibrated against networks, or an adversary, that have not trained.
    - ``auto``: ideal 0; the scale is the largest raw value of the first ``calibration_steps`` steps, and until they are
      over 1.1 times the largest so far.
    - ``diagnosis``: auto, but with the fixed scales of `DIAGNOSIS`.

    Attributes:
        table: what `bomkern.min_goal_loss` takes.
        largest: [K] the largest finite raw value so far.
    """

    def __init__(self, preset: str, batch_size: int, calibration_steps: int, device: torch.device) -> None:
        self.preset, self.calibration_steps = preset, calibration_steps
        known = anchors(batch_size)
        if preset == "anchored":
            start = [Minimize(known[name].nadir - known[name].ideal, known[name].ideal) for name in GOALS]
        elif preset == "auto":
            start = [Minimize(1.0) for _ in GOALS]
        else:
            start = [Minimize(DIAGNOSIS.get(name, 1.0)) for name in GOALS]
        self.table = ConstraintTable(start, device)
        fixed = [preset == "anchored" or (preset == "diagnosis" and name in DIAGNOSIS) for name in GOALS]
        self.fixed = torch.tensor(fixed, device=device)
        self.largest = torch.full((len(GOALS),), SMALLEST, device=device)
        self._before = (self.table.params.clone(), self.largest.clone())

    def calibrating(self, step: int) -> bool:
        return self.preset != "anchored" and step < self.calibration_steps

    def observe(self, highest: Tensor, step: int) -> None:
        """Take in the [K] largest raw values of a calibration step, before its loss."""
        self._before = (self.table.params.clone(), self.largest.clone())
        torch.fmax(self.largest, highest, out=self.largest)
        margin = MARGIN if step + 1 < self.calibration_steps else 1.0
        slope = torch.where(self.fixed, self.table.params[:, 1], 1 / (self.largest * margin))
        self.table.params[:, 1] = slope
        self.table.params[:, 2] = slope

    def settle(self, ok: Tensor, step: int) -> None:
        """Undo `observe` where the step was rejected (``ok``, a 0-dim bool, is False)."""
        if not self.calibrating(step):
            return
        for now, before in zip((self.table.params, self.largest), self._before, strict=True):
            now.copy_(torch.where(ok, now, before))

    def values(self) -> dict[str, dict[str, float]]:
        """Ideal and scale of each goal, read from the device."""
        rows = self.table.params.tolist()
        return {name: {"ideal": row[0], "scale": 1 / row[1]} for name, row in zip(GOALS, rows, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"params": self.table.params, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.table.params.copy_(state["params"])
        self.largest.copy_(state["largest"])
