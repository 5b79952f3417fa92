"""What the callbacks for trainers share: the arguments, the search for the GoalSet, and the anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from ..goals.goal_set import GoalSet

Anchor = Callable[[Any], Mapping[str, Any]]


def check_arguments(goals: object, anchor: object, model: str) -> None:
    """Raise TypeError for an invalid argument. ``model``: what the trainer calls the module that it trains."""
    if not isinstance(goals, (GoalSet, str)):
        raise TypeError(f"goals must be a GoalSet or the name of an attribute, got {type(goals).__name__}")
    if anchor is not None and not callable(anchor):
        raise TypeError(f"anchor must be a function of the {model} or None, got {type(anchor).__name__}")


def find_goals(given: GoalSet | str, model: Any) -> GoalSet:
    """Return a GoalSet that was given as itself or by the name of the model's attribute."""
    if isinstance(given, GoalSet):
        return given
    try:
        attribute = attrgetter(given)(model)
    except AttributeError:
        attribute = None
    if not isinstance(attribute, GoalSet):
        got = f"{type(attribute).__name__} there" if attribute is not None else "no such attribute"
        raise TypeError(f"goals must name a GoalSet of {type(model).__name__}: {given!r} is {got}")
    return attribute


def supply_anchors(goals: GoalSet, anchor: Anchor | None, model: Any) -> None:
    """Pass the result of ``anchor`` to `GoalSet.anchor` if goals wait for anchors."""
    if not goals.anchoring.waiting or anchor is None:
        return
    sources = anchor(model)
    if not isinstance(sources, Mapping):
        raise TypeError(f"anchor must return a mapping of GoalSet.anchor's arguments, got {type(sources).__name__}")
    goals.anchor(**sources)
