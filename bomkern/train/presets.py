"""Where the scale and the ideal of each goal come from: the presets of ``--scales``."""

from __future__ import annotations

from bomkern import Anchored, Calibrated, Constraint, Minimize, Policy

from .nine_goals import GOALS, NINE, anchors

# The hand-set scales of the diagnosis that bomkern began with; the other goals calibrate themselves.
DIAGNOSIS = {goal.name: goal.diagnosis for goal in NINE if goal.diagnosis is not None}


def policies(preset: str, batch_size: int, calibration_steps: int) -> dict[str, Constraint | Policy]:
    """What a `bomkern.GoalSet` of the nine goals is made of.

    - ``anchored``: ideal and nadir of `nine_goals.anchors`. Every goal has both before the first step, the image goals
      because their raw values are fractions of what trivial answers cost (`nine_goals.Trivial`), so nothing is
      calibrated against networks, or an adversary, that have not trained.
    - ``moving``: the same, but the anchors of realism follow the discriminator: what it says of held-out photographs,
      and of their mean colours.
    - ``probed``: ideal and nadir from the payoff table of `bomkern.probe`.
    - ``auto``: ideal 0; the scale is the largest raw value of the first ``calibration_steps`` steps.
    - ``diagnosis``: auto, but with the fixed scales of `DIAGNOSIS`.
    """
    if preset in ("anchored", "moving"):
        known = anchors(batch_size)
        return {goal.name: Anchored(*known[goal.name], moving=goal.moving and preset == "moving") for goal in NINE}
    if preset == "probed":
        return {name: Anchored("probe", "probe") for name in GOALS}
    fixed = DIAGNOSIS if preset == "diagnosis" else {}
    return {name: Minimize(fixed[name]) if name in fixed else Calibrated(calibration_steps) for name in GOALS}
