"""Checks of the options of a `bomkern.GoalSet` that do not depend on its goals."""

from __future__ import annotations

from collections.abc import Mapping

from ..common.blame import number_fix
from ..common.checks import as_number
from ..common.process_group import Ranks
from ..common.reductions import REDUCTIONS
from ..dispatch.routing import check_route
from .rules import ShareGuard


def check_options(
    goals: object, reduction: object, temperature: object, guard: object, route: object, ranks: Ranks
) -> None:
    """Raise an error that names the option that is invalid."""
    if goals is not None and not isinstance(goals, Mapping):
        raise TypeError(f"goals must be a mapping of names to constraints, got {type(goals).__name__}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    number = as_number(temperature)
    if number is None or not 0 <= number < 1e30:
        raise ValueError(f"temperature must be a number, at least 0, got {temperature!r}{number_fix(temperature)}")
    if guard is not None and not isinstance(guard, ShareGuard):
        raise TypeError(f"guard must be a ShareGuard or None, got {type(guard).__name__}")
    check_route(route)
    if ranks.size > 1 and route == "always":
        raise ValueError(
            "route must be 'auto' or 'never' with a process_group, got 'always': a rank whose backward leaves out "
            "what another's walks keeps it waiting"
        )
