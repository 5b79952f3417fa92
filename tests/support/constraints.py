"""Constraints of every kind in bomkern, with arguments chosen by parameter name."""

from __future__ import annotations

import inspect

from bomkern.constraints import Constraint

# A parameter's value by its name, from a width, a position and a tail. Other parameters keep their defaults.
NUMBERS = {
    "scale": lambda width, at, tail: width,
    "margin": lambda width, at, tail: width,
    "ideal": lambda width, at, tail: at,
    "limit": lambda width, at, tail: at,
    "healthy": lambda width, at, tail: at,
    "lower": lambda width, at, tail: at - width,
    "upper": lambda width, at, tail: at + 2 * width,
    "tail": lambda width, at, tail: tail,
}


def kinds() -> dict[str, type[Constraint]]:
    """Return the constraints that bomkern defines, by name, without those that a test defines."""
    own = [kind for kind in Constraint.__subclasses__() if kind.__module__.partition(".")[0] == "bomkern"]
    return {kind.__name__: kind for kind in own}


def parameters(kind: type[Constraint]) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())


def arguments(kind: type[Constraint], width: float, at: float, tail: float) -> dict[str, float]:
    """Return arguments that the kind accepts.

    Raises:
        LookupError: a parameter without a default has a name that `NUMBERS` does not hold.
    """
    found = {}
    for parameter in parameters(kind):
        if parameter.name in NUMBERS:
            found[parameter.name] = NUMBERS[parameter.name](width, at, tail)
        elif parameter.default is parameter.empty:
            raise LookupError(f"{kind.__name__}: say in {__name__}.NUMBERS what {parameter.name!r} is")
    return found
