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


def step(watched: GoalSet, raw: Any, look: bool) -> tuple[Any, GoalOutput | None]:
    """Take the watched goals out of the raw values of a step; return the others, and the output for the watched ones.

    If ``look`` is False, the latter is None. A value may have any graph. Other than a trained one it may be a bool or a
    whole number, as a hit is.
    """
    if not isinstance(raw, Mapping):
        return raw, watched(raw)  # raises
    names = watched.names
    trained = {name: value for name, value in raw.items() if name not in names}
    if not look:
        return trained, None
    return trained, watched({name: _detached(raw[name]) for name in names if name in raw})


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
