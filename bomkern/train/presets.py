"""The presets of ``--scales``: policies that set the scale and the ideal of each goal."""

from __future__ import annotations

from bomkern import Anchored, Calibrated, Constraint, Minimize, Policy

from .nine_goals import GOALS, NINE, anchors

# The hand-set scales of the diagnosis that bomkern began with; the other goals calibrate themselves.
DIAGNOSIS = {goal.name: goal.diagnosis for goal in NINE if goal.diagnosis is not None}


def policies(preset: str, batch_size: int, calibration_steps: int) -> dict[str, Constraint | Policy]:
    """Return the policies of a `bomkern.GoalSet` of the nine goals.

    - ``anchored``: ideal and nadir of `nine_goals.anchors`, which are known before the first step. Those of the image
      goals are known because their raw values are fractions of the errors of trivial answers (`nine_goals.Trivial`).
      So nothing is calibrated against networks, or an adversary, that have not trained.
    - ``moving``: the same, but the anchors of realism follow the discriminator: its outputs for held-out photographs,
      and for images of their mean colours.
    - ``probed``: ideal and nadir from the payoff table of `bomkern.probe`.
    - ``auto``: ideal 0; the scale is the largest raw value of the first ``calibration_steps`` steps.
    - ``diagnosis``: the same as auto, but with the fixed scales of `DIAGNOSIS`.
    """
    if preset in ("anchored", "moving"):
        known = anchors(batch_size)
        return {goal.name: Anchored(*known[goal.name], moving=goal.moving and preset == "moving") for goal in NINE}
    if preset == "probed":
        return {name: Anchored("probe", "probe") for name in GOALS}
    fixed = DIAGNOSIS if preset == "diagnosis" else {}
    return {name: Minimize(fixed[name]) if name in fixed else Calibrated(calibration_steps) for name in GOALS}
