"""The faults that the study plants, each a few numbers that a `Problem` reads."""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP = 100  # updates of the discriminator before the first step, without a fault
CALIBRATION = 50  # steps of calibration


@dataclass(frozen=True)
class Fault:
    """A fault to plant in a run.

    Attributes:
        name: name in the tables.
        warm_up: updates of the discriminator, on the untrained model's output, before the first step.
        judge_from: step from which the discriminator trains.
        judge_speed: factor on the discriminator's learning rate.
        drift: scales by which the drifting goal's raw value rises by script, from `DRIFT_FROM` of the run to its end.
        floor: scales added to the blocked goal's raw value from the first step: it cannot fall below them.
    """

    name: str
    warm_up: int = WARM_UP
    judge_from: int = 0
    judge_speed: float = 1.0
    drift: float = 0.0
    floor: float = 0.0


DRIFT_FROM = 0.3
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none"),
        Fault("untrained", warm_up=0, judge_from=CALIBRATION),  # the judge is untrained while policies calibrate
        Fault("hot", judge_speed=4.0),
        Fault("drift", drift=1.5),
        Fault("floor", floor=0.8),
    )
}


def lift(fault: Fault, progress: float) -> tuple[float, float]:
    """Return the lift of the drifting and of the blocked goal, in scales, when ``progress`` of the run is done."""
    return fault.drift * max(0.0, (progress - DRIFT_FROM) / (1 - DRIFT_FROM)), fault.floor
