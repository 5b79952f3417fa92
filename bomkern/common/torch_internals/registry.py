"""The list of torch's private names that this package uses, and of those that the installed torch lacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Internal(NamedTuple):
    """A private name of torch.

    Attributes:
        name: its path from ``torch``.
        since: the oldest torch known to have it; "<=2.11" if releases before the oldest supported one were not checked.
        serves: the feature of bomkern that needs it.
        instead: the public name that would replace it, or "none".
        without: what happens in a torch that lacks it.
        owner: returns the object with the last part of ``name``, if the path before it does not lead there.
    """

    name: str
    since: str
    serves: str
    instead: str
    without: str
    owner: Callable[[], Any] | None = None

    def find(self) -> Any:
        """Return the object of that name. Raises AttributeError if this torch lacks it."""
        path = self.name.split(".")
        if self.owner is not None:
            return getattr(self.owner(), path[-1])
        value: Any = torch
        for depth, part in enumerate(path[1:], 2):
            try:
                value = getattr(value, part)
            except AttributeError:
                try:
                    value = importlib.import_module(".".join(path[:depth]))
                except ImportError:
                    raise AttributeError(f"torch {torch.__version__} has no {self.name}") from None
        return value


NEEDED: list[Internal] = []
_RAISE = object()


def need(
    name: str,
    *,
    since: str = "<=2.11",
    serves: str,
    instead: str = "none",
    without: str = "raises NotImplementedError",
    owner: Callable[[], Any] | None = None,
) -> Internal:
    """Add a name to `NEEDED` that is looked up only when it is used."""
    NEEDED.append(Internal(name, since, serves, instead, without, owner))
    return NEEDED[-1]


def bind(name: str, *, fallback: Any = _RAISE, **facts: Any) -> Any:
    """Add a name to `NEEDED` and return its object, else ``fallback``, or a class that raises when called."""
    needed = need(name, **facts)
    try:
        return needed.find()
    except AttributeError:
        return _raiser(needed) if fallback is _RAISE else fallback


def _raiser(needed: Internal) -> type:
    """Return a stand-in for a missing function or class: calling it, or a subclass, raises NotImplementedError."""

    class Missing:
        def __new__(cls, *args: object, **options: object) -> Any:
            raise NotImplementedError(
                f"torch {torch.__version__} has no {needed.name}, which bomkern needs for {needed.serves}: install an "
                "older torch or a newer bomkern"
            )

    return Missing


def missing() -> list[Internal]:
    """Return the entries of `NEEDED` that this torch lacks."""
    lacking = []
    for needed in NEEDED:
        try:
            needed.find()
        except AttributeError:
            lacking.append(needed)
    return lacking


def describe(lacking: list[Internal]) -> list[str]:
    """Return one line for each missing name."""
    return [
        f"torch {torch.__version__} has no {name.name} ({name.serves}): {name.without}; public instead: {name.instead}"
        for name in lacking
    ]
