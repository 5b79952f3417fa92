"""Read goals from a plain dictionary, such as a YAML or JSON file holds: `GoalSet.from_config`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..constraints import Box, BoxAsymmetric, Constraint, Lower, Maximize, Minimize, MinimizeHard, Upper
from .policies import Anchored, Calibrated, Policy, Tracking
from .rules import AUTO, Group

# The kinds by their names without case and underscores: MINIMIZE_SOFT, minimize_soft and MinimizeSoft are one.
KINDS: dict[str, Callable[..., Constraint | Policy]] = {
    **{
        kind.__name__.lower(): kind
        for kind in (
            *(Minimize, Maximize, MinimizeHard, Upper, Lower, Box, BoxAsymmetric),
            *(Anchored, Calibrated, Tracking),
        )
    },
    "minimizesoft": Minimize,
    "maximizesoft": Maximize,
}
SHOWN = "MINIMIZE_SOFT, MINIMIZE_HARD, MAXIMIZE, UPPER, LOWER, BOX, BOX_ASYMMETRIC, ANCHORED, CALIBRATED or TRACKING"


def goals_of(config: object) -> dict[str, Constraint | Policy | Group]:
    """Return the constraint, policy or group of every goal; see `GoalSet.from_config`."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping of goals' names to their settings, got {type(config).__name__}")
    return {str(name): _goal(f"config[{name!r}]", settings) for name, settings in config.items()}


def _goal(owner: str, settings: object) -> Constraint | Policy | Group:
    if isinstance(settings, Constraint | Policy | Group):
        return settings
    if not isinstance(settings, Mapping):
        example = '{"type": "MINIMIZE_SOFT", "scale": 2.0}'
        raise TypeError(f"{owner} must be a mapping such as {example}, got {type(settings).__name__}")
    given = dict(settings)
    if "members" in given and len(given) == 1:
        return Group(**{name: _member(f"{owner}: {name}", each) for name, each in given["members"].items()})
    if "type" not in given:
        raise ValueError(f'{owner} must have a "type", one of {SHOWN}; got {", ".join(map(repr, given)) or "nothing"}')
    kind = _kind(owner, given.pop("type"))
    if kind is Minimize and isinstance(given.get("scale"), str) and given["scale"] == AUTO:
        del given["scale"]  # the name for a scale from the first steps
        kind = Calibrated
    known = inspect.signature(kind).parameters
    for key in given:
        if key not in known:
            raise ValueError(f"{owner}: {kind.__name__} has no {key!r}: it takes {', '.join(known)}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise ValueError(f"{owner}: {kind.__name__} needs {' and '.join(map(repr, missing))}, got {settings!r}")
    try:
        made: Constraint | Policy = kind(**given)
        return made
    except (TypeError, ValueError) as why:
        raise type(why)(f"{owner}: {why}") from None


def _member(owner: str, settings: object) -> Constraint | Policy:
    made = _goal(owner, settings)
    if isinstance(made, Group):
        raise ValueError(f"{owner} must be a constraint or a policy, got another group")
    return made


def _kind(owner: str, given: object) -> Callable[..., Any]:
    """Return the class of a type, which is a string, a member of an enumeration, or the class itself."""
    if isinstance(given, type) and given in KINDS.values():
        return given
    name = getattr(given, "name", given)
    kind = KINDS.get(str(name).replace("_", "").lower()) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f'{owner}: "type" must be {SHOWN}, got {given!r}')
    return kind
