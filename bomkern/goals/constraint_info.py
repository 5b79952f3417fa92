"""A description of each column's constraint or policy in plain values, so that a history file needs no code."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..constraints import BARRIER as BARRIER
from ..constraints import CURVES, Box, BoxAsymmetric, Constraint, Lower, Maximize, Minimize, MinimizeHard, Upper
from ..constraints import HARD as HARD
from ..constraints import LINEAR as LINEAR
from .policies import Anchored, Fixed, Policy

# The source of a column's ideal and scale: fixed numbers; a named ideal and nadir; the first training steps; every
# training step.
ANCHORS = FIXED, NAMED, CALIBRATED, TRACKED = "fixed", "named", "calibrated", "tracked"
log = logging.getLogger("bomkern")


class ConstraintInfo(NamedTuple):
    """A column's constraint or policy in plain values. It prints as the constraint or policy does.

    Attributes:
        kind: the class name.
        curve: LINEAR, HARD or BARRIER of `bomkern.constraints`.
        ramp: ``(center, right, left, tail)`` before the first step.
        arguments: its numeric arguments by name.
        anchors: the source of its ideal and scale, one of `ANCHORS`.
        moving: whether the goal's difficulty changes during training.
        text: the text that it prints.
    """

    kind: str
    curve: int
    ramp: tuple[float, float, float, float]
    arguments: dict[str, float]
    anchors: str
    moving: bool
    text: str

    @property
    def direction(self) -> int:
        """1 if larger raw values are worse, -1 if smaller ones are, 0 if both are."""
        _, right, left, _ = self.ramp
        if self.curve == HARD:  # its deficit is even in the ramp
            right, left = abs(right), -abs(left)
        return 1 if right > 0 and left >= 0 else -1 if right <= 0 and left < 0 else 0

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "ramp": list(self.ramp)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ConstraintInfo:
        """Read a dict that `to_dict` returned. Raises KeyError, TypeError or ValueError for anything else."""
        curve, anchors, ramp = given["curve"], given["anchors"], tuple(float(value) for value in given["ramp"])
        if curve not in CURVES or anchors not in ANCHORS or len(ramp) != 4:
            raise ValueError(
                f"no constraint has curve {curve!r}, anchors {anchors!r} and a ramp of {len(ramp)} numbers"
            )
        arguments = {str(name): float(value) for name, value in given["arguments"].items()}
        return cls(str(given["kind"]), curve, ramp, arguments, anchors, given["moving"] is True, str(given["text"]))


def describe(policy: Policy) -> ConstraintInfo:
    """Describe a policy, which may be of a user's own class.

    Raises:
        TypeError: the policy or its constraint lacks an attribute; the message names it.
    """
    kind = type(policy).__name__
    for name in ("constraint", "waits"):
        if not hasattr(policy, name):
            raise TypeError(f"{kind} has no {name}: call Policy.__init__(constraint) in its __init__")
    updates = type(policy).update is not Policy.update
    if updates and "until" not in vars(policy) and all("until" not in vars(c) for c in _own_classes(policy)):
        raise TypeError(
            f"{kind} has an update but no until: set it to the number of steps in which update is called, or to None"
        )
    constraint, arguments = policy.constraint, getattr(policy, "_arguments", {})
    _check(constraint)
    if isinstance(policy, Fixed):
        kind, arguments = type(constraint).__name__, constraint._arguments
    numbers = {n: float(v) for n, v in arguments.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    moving = getattr(policy, "moving", False) is True
    return ConstraintInfo(kind, constraint.curve, constraint.ramp, numbers, _anchors(policy), moving, _text(policy))


def _own_classes(policy: Policy) -> list[type]:
    """Return the class of a policy and its bases, up to `Policy`."""
    classes = type(policy).__mro__
    return list(classes[: classes.index(Policy)])


def _check(constraint: object) -> None:
    kind = type(constraint).__name__
    if not isinstance(constraint, Constraint):
        raise TypeError(f"the constraint of a policy must be a constraint, got {kind}")
    if getattr(constraint, "curve", None) not in CURVES:
        raise TypeError(f"{kind} has no curve: set it to LINEAR, HARD or BARRIER of bomkern.constraints")
    try:
        finite = len(constraint.ramp) == 4 and all(map(math.isfinite, constraint.ramp))
    except (AttributeError, TypeError):
        finite = False
    if not finite:
        raise TypeError(f"{kind} has no ramp: its __init__ must set center, right, left and tail, four finite numbers")
    if constraint.curve == BARRIER and not 0 < constraint.ramp[3] < 1:
        raise TypeError(f"{kind} has no tail: on a BARRIER the ramp's fourth number must lie between 0 and 1")


def _anchors(policy: Policy) -> str:
    if isinstance(policy, Anchored):
        return NAMED
    if policy.until == 0:
        return FIXED
    return TRACKED if policy.until is None else CALIBRATED


def _text(policy: Policy) -> str:
    try:
        return repr(policy)
    except AttributeError:  # Policy.__repr__ shows arguments that a user's own class may not have kept
        return f"{type(policy).__name__}()"


# Older history files hold only the text that each constraint prints. The code below reads it.

_KIND = re.compile(r"\w+")
_ARGUMENT = re.compile(r"(\w+)=(-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf))(?=[,)])")
_CONSTRAINTS = {c.__name__: c for c in (Minimize, Maximize, MinimizeHard, Upper, Lower, Box, BoxAsymmetric)}
_POLICIES = {"Anchored": NAMED, "Calibrated": CALIBRATED, "Tracking": TRACKED}


def from_text(text: str) -> ConstraintInfo:
    """Parse the text that a constraint or policy prints.

    An unknown class is read as `Minimize`, since a record holds its ideal and its scale; a warning is logged.
    """
    match = _KIND.match(text)
    kind = match.group() if match else ""
    arguments = {name: float(value) for name, value in _ARGUMENT.findall(text)}
    falls = arguments.get("ideal", 0.0) > arguments.get("nadir", math.inf) or "maximize=True" in text
    constraint: Constraint = Maximize(1.0) if falls else Minimize(1.0)
    if kind not in _POLICIES:
        try:
            constraint = _CONSTRAINTS[kind](**arguments)
        except (KeyError, TypeError, ValueError):
            log.warning("the history is of an older bomkern and holds %r as text alone: it is read as Minimize", text)
    anchors = _POLICIES.get(kind, FIXED)
    return ConstraintInfo(kind, constraint.curve, constraint.ramp, arguments, anchors, "moving=True" in text, text)
