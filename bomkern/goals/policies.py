"""Policies, which set the ideal and the scale of a goal in a `bomkern.GoalSet`.

A policy has one method, ``update``. It reads the goal's raw values of a training step before the loss is computed, and
returns the ideal and the scale of the goal. It runs on the device and makes no host sync. What it must remember is kept
in ``state``, a few float32 numbers in a buffer of the GoalSet, and is so saved in checkpoints. B is the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_whole, finite_number
from ..constraints import Constraint, Maximize, Minimize

STATE = 2  # numbers that a policy may keep
SMALLEST = 1e-6  # smallest scale
MOST_NUDGE = 7.0  # largest change of a log scale by a guard, a factor of about 1,000
SOURCES = ("floor", "baseline", "probe")
Anchor = float | str | Callable[..., Any]
Found = tuple[Tensor, Tensor]  # ideal, scale


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else getattr(value, "__name__", repr(value))


def _level(owner: str, statistic: object) -> float:
    """Return the level of a quantile; "max" is level 1."""
    if statistic == "max":
        return 1.0
    level = finite_number(f"{owner}: statistic", statistic) if not isinstance(statistic, str) else -1.0
    if not 0 < level <= 1:
        raise ValueError(f"{owner}: statistic must be 'max' or a quantile in (0, 1], got {statistic!r}")
    return level


def _of_batch(raw: Tensor, level: float) -> Tensor:
    """Return the quantile of the finite values of a batch, NaN if there are none."""
    values = torch.where(raw.isfinite(), raw, torch.nan).reshape(-1)
    if level == 1:
        largest = torch.where(values.isnan(), -torch.inf, values).amax()
        return torch.where(largest == -torch.inf, torch.nan, largest)
    # The same as nanquantile, which makes torch.compile compile a graph for every B.
    place = ((~values.isnan()).sum() - 1).clamp(min=0).to(values.dtype) * level
    ordered = values.sort().values  # NaN last
    below, above = (ordered.gather(0, at.to(torch.int64)[None])[0] for at in (place.floor(), place.ceil()))
    return below.lerp(above, place.frac())


class Policy:
    """Base class of policies.

    Attributes:
        constraint: the goal's constraint before the first step.
        until: number of steps in which ``update`` is called; 0 for none, None for all.
        waits: the anchors that `GoalSet.anchor` must supply, by name, and the source of each.
    """

    constraint: Constraint
    until: int | None = 0
    waits: dict[str, Anchor]

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found | None:
        """Return the ideal and the scale, 0-dim float32 each, or None to leave them as they are.

        A compiled or captured step also calls ``update`` after ``until``. The result, and changes of ``state``, are
        then discarded.

        Args:
            raw: the goal's values in this step, float32 [B] or 0-dim, without gradient. They are NaN in samples that
                lack the goal. In a step in which no sample has it, the result and changes of ``state`` are discarded.
            state: [`STATE`] float32, zeros before the first step; changed in place.
            step: training steps before this one, a 0-dim int64 tensor on the device.
        """
        return None

    def __repr__(self) -> str:
        shown = (f"{name}={_shown(value)}" for name, value in self._arguments.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    _arguments: dict[str, object]

    def __init__(self, constraint: Constraint, **arguments: object) -> None:
        self.constraint, self.waits, self._arguments = constraint, {}, arguments


class Fixed(Policy):
    """A constraint that does not change. A `GoalSet` wraps each constraint that it is given in this policy.

    Args:
        constraint: any of the seven.
    """

    def __init__(self, constraint: Constraint) -> None:
        if not isinstance(constraint, Constraint):
            raise TypeError(f"Fixed: constraint must be a constraint, got {type(constraint).__name__}")
        super().__init__(constraint)

    def __repr__(self) -> str:
        return repr(self.constraint)


class Calibrated(Policy):
    """``scale = margin * max(raw)`` over all samples of the first ``steps`` steps, ideal 0; then fixed.

    With a quantile q instead of the maximum, ``scale = margin * mean over those steps of quantile_q(raw over B)``.
    During calibration the scale is that of the steps so far. Steps in which no sample has the goal count too. The
    first steps say little about a goal whose difficulty changes, such as one with an adversary that has not trained
    yet. Prefer `Anchored` where an ideal and a nadir can be named.

    Args:
        steps: number of training steps to calibrate on.
        statistic: "max", or the level of a quantile in (0, 1].
        margin: > 0.
    """

    def __init__(self, steps: int = 50, statistic: str | float = "max", margin: float = 1.0) -> None:
        self.until = check_whole("Calibrated: steps", steps)
        self.level = _level("Calibrated", statistic)
        self.margin = finite_number("Calibrated: margin", margin, above=0)
        shown = statistic if isinstance(statistic, str) else self.level
        super().__init__(Minimize(1.0), steps=self.until, statistic=shown, margin=self.margin)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found:
        value = _of_batch(raw, self.level)
        seen, count = state[0], state[1]
        known = ~value.isnan()
        if self.level == 1:
            state[0] = torch.where(known, torch.maximum(value, seen), seen)
        else:
            state[0] = torch.where(known, seen + (value - seen) / (count + 1), seen)
        state[1] = count + known
        return torch.zeros_like(value), (state[0] * self.margin).clamp(min=SMALLEST)


class Tracking(Policy):
    """``scale`` follows the batch's quantile: ``s += (1 - 2^(-1/halflife)) (quantile_q(raw) - s)``; ideal 0.

    The average is corrected for its initial bias, as in Adam. This policy gives every goal about the same deficit,
    however well it does: the scale of a goal that gets worse soon follows. It serves as a baseline for comparisons;
    `Anchored` works better.

    Args:
        halflife: of the average, in training steps, > 0.
        quantile: level in (0, 1].
    """

    until = None

    def __init__(self, halflife: float = 100.0, quantile: float = 0.5) -> None:
        self.level = _level("Tracking", quantile)
        halflife = finite_number("Tracking: halflife", halflife, above=0)
        self.weight = 1 - 2 ** (-1 / halflife)
        super().__init__(Minimize(1.0), halflife=halflife, quantile=self.level)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found:
        value = _of_batch(raw, self.level)
        weight = torch.where(value.isnan(), 0.0, self.weight)
        state[0] += weight * (torch.where(value.isnan(), 0.0, value) - state[0])
        state[1] += weight * (1 - state[1])
        scale = torch.where(state[1] > 0, state[0] / state[1], 1.0)
        return torch.zeros_like(value), scale.clamp(min=SMALLEST)


class Anchored(Policy):
    """Deficit 0 at ``ideal``, 1 at ``nadir``: ``scale = |nadir - ideal|``.

    The ideal is the raw value that the goal could reach if it were trained alone. The nadir is a raw value no better
    than that of doing nothing. A goal to maximize has an ideal above its nadir: ``Anchored(ideal=1.0, nadir=0.0)`` for
    an accuracy or a structural similarity. As both are known before the first step, no goal is measured against
    networks, or an adversary, that have not trained.

    Args:
        ideal, nadir: each a number; or a function of a batch that returns one, called by `GoalSet.anchor`; or the name
            of the source from which `GoalSet.anchor` takes it: "floor" (analytic, the value that chance alone leaves),
            "baseline" (raw values of a trivial answer) or "probe" (`bomkern.probe`).
        moving: whether the goal's difficulty changes during training, as with an adversary. Each call of
            `GoalSet.remeasure` then moves ideal and nadir towards raw values measured on held-out samples, by
            ``1 - 2^(-1/halflife)`` of the distance. They never follow the goal's own training average, which would
            hide that the goal gets worse.
        halflife: of ``moving``, in measurements.
        alarm: distance that an anchor may drift before a warning is logged, in units of the first scale.
        maximize: whether larger raw values are better. None reads it from the two numbers; if one of them is not known
            yet, smaller values are better.

    Raises:
        ValueError: the ideal equals the nadir, or both contradict ``maximize``; or a value is invalid.
        TypeError: an argument has the wrong type; the message names it.
    """

    def __init__(
        self,
        ideal: Anchor = 0.0,
        nadir: Anchor = 1.0,
        *,
        moving: bool = False,
        halflife: float = 5.0,
        alarm: float = 0.5,
        maximize: bool | None = None,
    ) -> None:
        if not isinstance(moving, bool):
            raise TypeError(f"Anchored: moving must be True or False, got {moving!r}")
        if maximize is not None and not isinstance(maximize, bool):
            raise TypeError(f"Anchored: maximize must be True, False or None, got {maximize!r}")
        given: dict[str, Anchor] = {"ideal": ideal, "nadir": nadir}
        shown: dict[str, object]
        waits: dict[str, Anchor] = {}
        for name, value in given.items():
            if isinstance(value, str):
                if value not in SOURCES:
                    raise ValueError(
                        f"Anchored: {name} must be a number, a function or one of {SOURCES}, got {value!r}"
                    )
                waits[name] = value
            elif callable(value):
                waits[name] = value
            else:
                given[name] = finite_number(f"Anchored: {name}", value)
        self.moving = moving
        self.weight = 1 - 2 ** (-1 / finite_number("Anchored: halflife", halflife, above=0))
        self.alarm = finite_number("Anchored: alarm", alarm, above=0)
        low, high = given["ideal"], given["nadir"]
        if isinstance(low, float) and isinstance(high, float):
            if low == high:
                raise ValueError(
                    f"Anchored: ideal and nadir must differ, got {low:g} for both: the nadir is the raw value of doing "
                    "nothing, at deficit 1"
                )
            if maximize is not None and maximize != (low > high):
                side = "above" if maximize else "below"
                raise ValueError(
                    f"Anchored: ideal must be {side} nadir with maximize={maximize}, got ideal={low:g} and "
                    f"nadir={high:g}: leave maximize out, since the two numbers tell"
                )
            self.maximize, scale = low > high, abs(high - low)
            shown = dict(given)
        else:
            self.maximize, scale = maximize is True, 1.0
            shown = {**given, "maximize": True} if maximize else dict(given)
        constraint = (Maximize if self.maximize else Minimize)(scale, low if isinstance(low, float) else 0.0)
        if moving:
            shown["moving"] = True
        super().__init__(constraint, **shown)
        self.waits, self.known = waits, {name: v for name, v in given.items() if isinstance(v, float)}


def policy_of(owner: str, given: object) -> Policy:
    """Return a policy as it is, and a constraint as a `Fixed` policy."""
    if isinstance(given, Policy):
        return given
    if isinstance(given, Constraint):
        return Fixed(given)
    raise TypeError(f"{owner} must be a constraint or a policy, got {type(given).__name__}")
