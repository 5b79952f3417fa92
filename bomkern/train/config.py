"""Settings of a run. Nothing heavy is imported here, because the command line reads its defaults from this file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

SCALES = ("anchored", "moving", "probed", "auto", "diagnosis")
LEAST_BATCH = 4  # samples per process: some goals compare samples with one another
SPILL = 0.5  # the default ratio, see bomkern.Spill
BUDGET = 2.0  # the default row budget of a spill
REDUCTIONS = ("mean", "min")
IMAGE_SIZES = (32, 64, 128, 256)
PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
# Settings that may differ between a run and its continuation; all others must not.
FREE = (
    "out",
    "steps",
    "epochs",
    "device",
    "devices",
    "strategy",
    "impl",
    "compile",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "overwrite",
    "resume",
)


class TrainError(Exception):
    """The run cannot start or go on; the message is one line for the user."""


@dataclass
class Config:
    """Settings of a training run, named as the options of ``bomkern train``."""

    out: str = "runs/demo"
    data: str | None = None
    steps: int | None = None  # None and no epochs: 1000
    epochs: float | None = None
    batch_size: int = 32  # per process at the start of the run
    image_size: int = 32
    seed: int = 0
    scales: str = "anchored"
    calibration_steps: int = 50
    reduction: str = "mean"
    temperature: float = 0.0
    # A ratio or "auto". None: `SPILL` with anchored scales and neither a temperature nor the global minimum.
    spill: float | str | None = None
    budget: float = BUDGET  # goal rows of a step in batches, with a spill; 0: every goal takes all rows
    probe: int | str = 0  # steps of a run, or "auto"
    lr: float = 1e-3
    discriminator_lr: float = 3e-4
    structure: int = 48
    appearance: int = 16
    width: int = 32
    device: str = "auto"
    devices: int | None = None  # processes on this machine; None: as many as torchrun started, or 1
    strategy: str = "auto"
    precision: str = "32-true"
    impl: str | None = None
    compile: bool = False
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 200
    overwrite: bool = False
    resume: bool = False

    @property
    def spill_ratio(self) -> float | str:
        """Ratio of each goal's weight to that of the next worse one, or "auto"; 0 for the minimum alone."""
        if self.spill is not None:
            return self.spill
        anchored = self.scales in ("anchored", "moving", "probed")
        return SPILL if anchored and self.reduction == "mean" and self.temperature == 0 else 0.0

    @property
    def row_budget(self) -> float | None:
        """Budget of rows for `bomkern.Spill`; None for all rows."""
        return self.budget if self.budget and self.spill_ratio else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def merged(self, stored: dict[str, Any], given: set[str]) -> Config:
        """Return these settings for the continuation of a stored run, whose values replace those not in ``given``.

        Raises:
            TrainError: a setting that must not change was given another value.
        """
        values = self.to_dict()
        stored = {"budget": 0.0, **stored}  # runs of versions without a budget took all rows
        for field in fields(self):
            name = field.name
            if name in ("out", "overwrite", "resume") or name not in stored:
                continue
            if name in given:
                if name not in FREE and stored[name] != values[name]:
                    flag = f"--{name.replace('_', '-')}"
                    raise TrainError(f"{flag} {values[name]} differs from the {stored[name]} of the run to resume")
            elif not (name in ("steps", "epochs") and given & {"steps", "epochs"}):
                values[name] = stored[name]
        return Config(**values)
