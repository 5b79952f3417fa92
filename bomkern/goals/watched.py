"""The goals of a `bomkern.GoalSet` that are only watched (``monitor=``): they have levels, and no share.

They are a GoalSet of their own, ``goals.watched``, which sees detached values and whose loss nobody uses.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..common.checks import MAX_GOALS
from ..lazy_goals.lazy import Lazy

if TYPE_CHECKING:
    from .goal_set import GoalSet
    from .history import GoalOutput

log = logging.getLogger("bomkern")


def check_watched(watched: object, trained: Collection[str]) -> None:
    """Raise an error that names a goal that cannot be watched."""
    if not isinstance(watched, Mapping):
        raise TypeError(
            f"monitor must be a mapping of names to constraints, got {type(watched).__name__}; a goal that is called "
            "monitor must be in a mapping, GoalSet({'monitor': ...})"
        )
    if not 1 <= len(watched) <= MAX_GOALS:
        raise ValueError(f"monitor must have 1 to {MAX_GOALS} goals, got {len(watched)}")
    for name in watched:
        if name in trained:
            raise ValueError(f"monitor: {name} is trained too: give one of the two another name")


def split_options(
    monitor: object, optional: str | Collection[str], renamed: Mapping[str, str] | None, several: bool
) -> tuple[tuple[list[str], dict[str, str]], tuple[list[str], dict[str, str]]]:
    """Return ``optional`` and ``renamed`` of the trained goals, and of the watched ones.

    Of one process all watched goals are optional: an accuracy is seldom computed in every step. Several must agree.
    """
    watched = list(monitor) if isinstance(monitor, Mapping) else []
    given, names = [optional] if isinstance(optional, str) else list(optional), dict(renamed or {})
    theirs = [name for name in given if is_of(watched, name)]
    renames = {new: old for new, old in names.items() if is_of(watched, new)}
    own = [name for name in given if name not in theirs], {n: old for n, old in names.items() if n not in renames}
    return own, (theirs if several else watched, renames)


def step(watched: GoalSet, raw: Any, mask: Any, look: bool) -> tuple[Any, Any, GoalOutput | None]:
    """Take the watched goals out of the raw values and masks of a step.

    Returns the other raw values and masks, and the output for the watched goals; None for it if ``look`` is False. A
    value may have any graph. Other than a trained one it may be a bool or a whole number, as a hit is.
    """
    if not isinstance(raw, Mapping):
        return raw, mask, watched(raw)  # raises
    (trained, others), (seen, masks) = split_step(watched, raw, mask)
    if not look:
        return trained, others, None
    return trained, others, watched({name: _detached(value) for name, value in seen.items()}, masks)


def split_step(watched: GoalSet, raw: Mapping[str, Any], mask: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return the raw values and masks of the trained goals, and those of the watched ones."""
    seen, trained = _split(watched, raw)
    masks, others = _split(watched, mask) if isinstance(mask, Mapping) else ({}, mask)
    return (trained, others), (seen, masks or None)


def is_of(watched: Collection[str], name: object) -> bool:
    """Return whether a name of a goal, or "group.member", is that of a watched goal."""
    return isinstance(name, str) and (name in watched or name.partition(".")[0] in watched)


def _split(watched: GoalSet, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of the watched goals, and the others."""
    own = {name: value for name, value in given.items() if is_of(watched.names, name)}
    return own, {name: value for name, value in given.items() if name not in own}


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _detached(member) for name, member in value.items()}
    if isinstance(value, Lazy):
        return value.value
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else value.float()
    return value


def fit_state(goals: GoalSet, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Load a state that was saved with other watched goals, or without any."""
    own = f"{prefix}watched."
    stored = [key for key in state if key.startswith(own)]
    if goals.watched is None:
        for key in stored:
            del state[key]
        if stored:
            log.warning("the state that is loaded has goals that were only watched (monitor=): they are left out")
    elif not stored:
        state.update({f"{own}{name}": value for name, value in goals.watched.state_dict().items()})
