"""Where the ideal and the scale of a goal in a `bomkern.GoalSet` come from.

A policy has one method, ``update``, which looks at the goal's raw values of a training step, before its loss, and says
what ideal and scale the goal shall have. It runs on the device and makes no host sync; what it must remember lies in
``state``, a few float32 of the GoalSet's buffers, so it is in the checkpoint. B is the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..constraints import Constraint, Minimize

STATE = 2  # numbers a policy may keep
SMALLEST = 1e-6  # a scale is greater than 0
MOST_NUDGE = 7.0  # of log scale, a factor of about 1,000: a goal that is satisfied for good is not nudged to infinity
SOURCES = ("floor", "baseline", "probe")
Anchor = float | str | Callable[..., Any]
Found = tuple[Tensor, Tensor]  # ideal, scale


def _number(owner: str, name: str, value: object, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value <= above:
        raise ValueError(
            f"{owner}: {name} must be finite" + f" and above {above:g}" * (above > -math.inf) + f", got {value}"
        )
    return float(value)


def _steps(owner: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")
    return value


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else getattr(value, "__name__", repr(value))


def _level(owner: str, statistic: object) -> float:
    """A quantile's level; "max" is level 1."""
    if statistic == "max":
        return 1.0
    level = _number(owner, "statistic", statistic) if not isinstance(statistic, str) else -1.0
    if not 0 < level <= 1:
        raise ValueError(f"{owner}: statistic must be 'max' or a quantile in (0, 1], got {statistic!r}")
    return level


def _of_batch(raw: Tensor, level: float) -> Tensor:
    """The quantile of the finite values of a batch, NaN where there is none."""
    values = torch.where(raw.isfinite(), raw, torch.nan).reshape(-1)
    if level == 1:
        found = torch.where(values.isnan(), -torch.inf, values).amax()
        return torch.where(found == -torch.inf, torch.nan, found)
    # As nanquantile, whose C++ would compile a graph for every B.
    place = ((~values.isnan()).sum() - 1).clamp(min=0).to(values.dtype) * level
    ordered = values.sort().values  # NaN last
    below, above = (ordered.gather(0, at.to(torch.int64)[None])[0] for at in (place.floor(), place.ceil()))
    return below.lerp(above, place.frac())


class Policy:
    """Base of the policies.

    Attributes:
        constraint: what the goal is before the first step.
        until: steps after which ``update`` has nothing more to say; 0 for never anything, None for no end.
        waits: names of anchors still to be given by `GoalSet.anchor`, and from where.
    """

    constraint: Constraint
    until: int | None = 0
    waits: dict[str, Anchor]

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found | None:
        """Ideal and scale, 0-dim float32 each, or None to leave them.

        A compiled or captured step is written down once, and run at any step: also after ``until``, when what is found
        and what is written into ``state`` is dropped.

        Args:
            raw: the goal's values of this step, float32 [B] or 0-dim, without gradient.
            state: [`STATE`] float32, 0 at first; changed in place.
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
    """A constraint that stays as it is. A `GoalSet` makes one of every constraint it is given.

    Args:
        constraint: any of the six.
    """

    def __init__(self, constraint: Constraint) -> None:
        if not isinstance(constraint, Constraint):
            raise TypeError(f"Fixed: constraint must be a constraint, got {type(constraint).__name__}")
        super().__init__(constraint)

    def __repr__(self) -> str:
        return repr(self.constraint)


class Calibrated(Policy):
    """``scale = margin * max(raw)`` over all samples of the first ``steps`` steps, ideal 0; then fixed.

    With a quantile q instead of the maximum: ``scale = margin * mean over those steps of quantile_q(raw over B)``.
    While calibrating, the scale is that of the steps so far. A start says little about goals whose difficulty moves,
    above all about one with an adversary that has not trained yet: prefer `Anchored` where an ideal and a nadir can be
    named.

    Args:
        steps: how many training steps to look at.
        statistic: "max", or the level of a quantile in (0, 1].
        margin: > 0.
    """

    def __init__(self, steps: int = 50, statistic: str | float = "max", margin: float = 1.0) -> None:
        self.until = _steps("Calibrated", "steps", steps)
        self.level = _level("Calibrated", statistic)
        self.margin = _number("Calibrated", "margin", margin, above=0)
        super().__init__(Minimize(1.0), steps=steps, statistic=statistic, margin=margin)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found:
        found = _of_batch(raw, self.level)
        seen, count = state[0], state[1]
        known = ~found.isnan()
        if self.level == 1:
            state[0] = torch.where(known, torch.maximum(found, seen), seen)
        else:
            state[0] = torch.where(known, seen + (found - seen) / (count + 1), seen)
        state[1] = count + known
        return torch.zeros_like(found), (state[0] * self.margin).clamp(min=SMALLEST)


class Tracking(Policy):
    """``scale`` follows the batch's quantile: ``s += (1 - 2^(-1/halflife)) (quantile_q(raw) - s)``; ideal 0.

    The average is corrected for its start (Adam's way). It gives every goal about the same deficit, whatever it is
    worth: a goal that gets worse is soon forgiven. It is here to compare with; `Anchored` is what works.

    Args:
        halflife: in training steps, > 0.
        quantile: level in (0, 1].
    """

    until = None

    def __init__(self, halflife: float = 100.0, quantile: float = 0.5) -> None:
        self.level = _level("Tracking", quantile)
        self.weight = 1 - 2 ** (-1 / _number("Tracking", "halflife", halflife, above=0))
        super().__init__(Minimize(1.0), halflife=halflife, quantile=quantile)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found:
        found = _of_batch(raw, self.level)
        weight = torch.where(found.isnan(), 0.0, self.weight)
        state[0] += weight * (torch.where(found.isnan(), 0.0, found) - state[0])
        state[1] += weight * (1 - state[1])
        scale = torch.where(state[1] > 0, state[0] / state[1], 1.0)
        return torch.zeros_like(found), scale.clamp(min=SMALLEST)


class Anchored(Policy):
    """Deficit 0 at ``ideal``, 1 at ``nadir``: ``scale = nadir - ideal``.

    Ideal is what the goal could reach alone, nadir what is no better than doing nothing. With both in place before the
    first step, no goal is measured against networks, or an adversary, that have not trained.

    Args:
        ideal, nadir: each a number; or a function of a batch that returns one, called by `GoalSet.anchor`; or the name
            of where `GoalSet.anchor` will get it from: "floor" (analytic, what chance alone leaves), "baseline" (raw
            values of a trivial answer) or "probe" (`bomkern.probe`).
        moving: the goal's difficulty changes while it trains, as with an adversary. `GoalSet.remeasure` then moves
            ideal and nadir towards raw values measured on held-out samples, by ``1 - 2^(-1/halflife)`` of the way a
            time. They never follow the goal's own training average, which would forgive a goal whatever it does.
        halflife: of ``moving``, in measurements.
        alarm: how far an anchor may drift before a warning, in units of the first scale.
    """

    def __init__(
        self,
        ideal: Anchor = 0.0,
        nadir: Anchor = 1.0,
        *,
        moving: bool = False,
        halflife: float = 5.0,
        alarm: float = 0.5,
    ) -> None:
        if not isinstance(moving, bool):
            raise TypeError(f"Anchored: moving must be True or False, got {moving!r}")
        given: dict[str, Anchor] = {"ideal": ideal, "nadir": nadir}
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
                given[name] = _number("Anchored", name, value)
        self.moving = moving
        self.weight = 1 - 2 ** (-1 / _number("Anchored", "halflife", halflife, above=0))
        self.alarm = _number("Anchored", "alarm", alarm, above=0)
        low, high = given["ideal"], given["nadir"]
        if isinstance(low, float) and isinstance(high, float):
            if not low < high:
                raise ValueError(f"Anchored: ideal must be less than nadir, got ideal={low:g}, nadir={high:g}")
            constraint = Minimize(high - low, low)
        else:
            constraint = Minimize(1.0, low if isinstance(low, float) else 0.0)
        shown = {**given, "moving": True} if moving else given
        super().__init__(constraint, **shown)
        self.waits, self.known = waits, {name: v for name, v in given.items() if isinstance(v, float)}


class ShareGuard:
    """A safety net for a whole `GoalSet`, off unless asked for: ``log scale += rate`` while a goal's share is above
    ``high``, ``-= rate`` while it is below ``low``; nothing in between.

    The share is a moving average of who really got the gradient. Every nudge is in the history. It keeps any goal from
    being starved or from holding everything for long, at the price of what the scales meant: a goal that is satisfied
    and idle is pulled in too, until its scale is a thousandth. Anchors first; this if a run must not be watched.

    Args:
        low, high: the band without nudges, 0 <= low < high <= 1.
        rate: of log scale per step, > 0.
        halflife: of the share's moving average, in steps, > 0.
    """

    def __init__(self, low: float = 0.01, high: float = 0.6, rate: float = 0.01, halflife: float = 25.0) -> None:
        self.low, self.high = _number("ShareGuard", "low", low), _number("ShareGuard", "high", high)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"ShareGuard: 0 <= low < high <= 1 must hold, got low={low}, high={high}")
        self.rate = _number("ShareGuard", "rate", rate, above=0)
        self.weight = 1 - 2 ** (-1 / _number("ShareGuard", "halflife", halflife, above=0))

    def update(self, share: Tensor, average: Tensor) -> Tensor:
        """What to add to each goal's log scale, [G].

        Args:
            share: of this step, [G].
            average: [G], changed in place; below 0 before the first step.
        """
        torch.where(average < 0, share, average.lerp(share, self.weight), out=average)
        return self.rate * ((average > self.high).to(average.dtype) - (average < self.low).to(average.dtype))

    def __repr__(self) -> str:
        return f"ShareGuard(low={self.low:g}, high={self.high:g}, rate={self.rate:g})"


class Spill:
    """What flows over: goals in the order of their deficits, worst first, weigh ``1 : ratio : ratio^2 : ...``.

    ``loss = sum_g w_g mean_b D_bg`` with ``w_g`` proportional to ``ratio^(rank of goal g)``: an ordered weighted
    average of the goals' deficits (Yager 1988, "On ordered weighted averaging aggregation operators in multicriteria
    decisionmaking"), which becomes the worst goal's alone as ratio goes to 0. Ranks are those of a moving average of
    the steps before, so the weights are known before a step. Only ranks matter: a goal that can never be satisfied
    holds about ``1 - ratio`` of the gradient however bad it is, where the hard minimum would give it all, and the rest
    is shared out as if it were not there.

    Args:
        ratio: in (0, 1).
        halflife: of the moving average, in steps, > 0.
    """

    def __init__(self, ratio: float = 0.5, halflife: float = 7.0) -> None:
        self.ratio = _number("Spill", "ratio", ratio, above=0)
        if self.ratio >= 1:
            raise ValueError(f"Spill: ratio must be below 1, got {ratio}")
        self.rate = 1 - 2 ** (-1 / _number("Spill", "halflife", halflife, above=0))

    def weights(self, goals: int) -> Tensor:
        """By rank, [goals], summing to 1."""
        weights = self.ratio ** torch.arange(goals, dtype=torch.float64)
        return (weights / weights.sum()).float()

    def __repr__(self) -> str:
        return f"Spill({self.ratio:g})"


class Group:
    """Several constraints as one goal, whose deficit is the mean of its members': their scores' geometric mean.

    Args:
        members: constraints or policies, by name; at least one.

    Example:
        >>> GoalSet(latent=Group(correlation=Anchored("floor", 1.0), spread=Minimize(1.0)), recon=Anchored(0.0, 1.0))
    """

    def __init__(self, **members: Constraint | Policy) -> None:
        if not members:
            raise ValueError("Group must have at least one member, got none")
        self.members = {name: policy_of(f"Group: {name}", member) for name, member in members.items()}

    def __repr__(self) -> str:
        return f"Group({', '.join(f'{name}={policy!r}' for name, policy in self.members.items())})"


def policy_of(owner: str, given: object) -> Policy:
    """A policy as it is, a constraint as a `Fixed` one."""
    if isinstance(given, Policy):
        return given
    if isinstance(given, Constraint):
        return Fixed(given)
    raise TypeError(f"{owner} must be a constraint or a policy, got {type(given).__name__}")
