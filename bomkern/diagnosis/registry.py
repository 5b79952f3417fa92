"""The kinds of findings and their detectors, from which `diagnose`, the report, the commands and the docs read.

To add one, write a detector and put `detects` above it, with a `Kind` that says everything about it::

    STUCK = Kind("stuck", weight=0.7, meaning="raw never changes", explanation="Raw has the same value in every step.")

    @detects(STUCK, each="goal")
    def stuck(run: RunView, g: int) -> Iterator[Finding]: ...

The docs read the arguments of `Kind` without running the code: write them as plain strings and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    from .finding import Finding

Each = Literal["run", "goal", "pair"]
Detector = Callable[..., "Iterator[Finding]"]  # of the run, and of the indices of no, one or two goals
Function = TypeVar("Function", bound=Callable[..., Any])


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: one or two words.
        weight: the factor of the kind in the severity, in [0, 1]. A cause weighs more than its effect, and a certain
            fault more than one that may be intended. Information weighs least.
        meaning: a few words, for tables.
        explanation: one sentence, for the docs.
        information: whether it is information and no fault. It is shown for goals that have no other finding.
        explains: names of kinds that are symptoms of this one. They are left out for its goals.
    """

    name: str
    weight: float
    meaning: str
    explanation: str
    information: bool = False
    explains: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {}  # by name
DETECTORS: list[tuple[Each, Detector]] = []


def detects(kind: Kind, *, each: Each) -> Callable[[Function], Function]:
    """Register a detector. It is called for each goal's index, for those of each pair, or once with the run alone."""
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"two kinds of findings are called {kind.name!r}")

    def register(detector: Function) -> Function:
        DETECTORS.append((each, detector))
        return detector

    return register


def is_information(kind: str) -> bool:
    """Return whether the kind of this name is information and no fault."""
    return kind in KINDS and KINDS[kind].information
