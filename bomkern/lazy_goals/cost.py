"""The measured costs of lazy functions, and the decision whether to leave rows out of their graphs."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

WEIGHT = 0.2  # weight of a step in moving averages
MARGIN = 0.9  # a partial graph must cost less than this part of a full one
INDEPENDENT = "independent_rows"  # attribute of a function whose rows need no check
LOOK_EVERY = 10  # steps with full graphs between two measurements of how many rows a partial graph would hold


class FunctionStatistics:
    """Measured properties of one lazy function, kept from step to step.

    Attributes:
        checked: whether its rows were found independent, and its times taken.
        draws: whether it draws random numbers.
        needs_graph: whether it computes gradients itself, and so cannot run under `torch.no_grad`.
        forward: seconds of the forward for one row.
        backward_ratio: time of the backward over time of the forward.
        owned: moving average of the fraction of its rows that received gradient; NaN before the first step.
        full_steps: steps in which it was evaluated once, with a graph for all rows.
    """

    def __init__(self, checked: bool = False) -> None:
        self.checked = checked
        self.draws = self.needs_graph = False
        self.forward, self.backward_ratio, self.owned = 0.0, 2.0, math.nan
        self.full_steps = 0

    def add_owned(self, fraction: float) -> None:
        """Add the fraction of rows that received gradient in one step."""
        self.owned = fraction if math.isnan(self.owned) else self.owned + WEIGHT * (fraction - self.owned)

    def add_forward(self, seconds: float) -> None:
        """Add a measurement of the forward, in seconds for one row."""
        self.forward += (seconds - self.forward) * (WEIGHT if self.forward else 1.0)

    def look_is_due(self) -> bool:
        """Count a step with full graphs; return whether its owned rows are to be measured."""
        self.full_steps += 1
        return self.full_steps % LOOK_EVERY == 0


_statistics: weakref.WeakKeyDictionary[Any, dict[Any, FunctionStatistics]] = weakref.WeakKeyDictionary()


def statistics_of(fn: Callable[..., Any]) -> FunctionStatistics:
    """Return the statistics kept for ``fn``.

    The key is its module, together with the code of a method. For any other function it is the code, since a closure is
    a new object in every step. Otherwise it is the object itself.
    """
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner, code = getattr(fn, "__self__", None), getattr(fn, "__code__", None)
    key = owner if isinstance(owner, torch.nn.Module) else fn if code is None else code
    fresh = FunctionStatistics(checked=bool(getattr(fn, INDEPENDENT, False)))
    try:
        return _statistics.setdefault(key, {}).setdefault(code, fresh)
    except TypeError:  # the key is not hashable, or allows no weak reference: nothing can be kept for it
        return fresh


def partial_pays(functions: Iterable[tuple[FunctionStatistics, int]]) -> bool:
    """Return whether a second forward and a backward of owned rows should take less time than a backward of all rows.

    Args:
        functions: the statistics of each, and its rows. The answer is True while any of them has not been measured.
    """
    full = partial = 0.0
    for statistics, rows in functions:
        if not statistics.checked or math.isnan(statistics.owned):
            return True
        full += rows * statistics.forward * statistics.backward_ratio
        partial += rows * statistics.forward * statistics.owned * (1 + statistics.backward_ratio)
    return partial < MARGIN * full


def record_owned(calls: Iterable[tuple[FunctionStatistics, int, int]]) -> float:
    """Record how many rows of each call received gradient.

    Args:
        calls: the statistics of each function, the rows of its call, and how many of them received gradient.

    Returns:
        The fraction of the backward's time that these rows take.
    """
    calls = list(calls)
    for statistics, rows, owned in calls:
        statistics.add_owned(owned / rows)
    return fraction_of(calls)


def fraction_of(calls: Iterable[tuple[FunctionStatistics, int, int]]) -> float:
    """Return the fraction of the backward's time that some rows of each call take. ``calls``: see `record_owned`."""
    done = total = 0.0
    for statistics, rows, owned in calls:
        cost = max(statistics.forward, 1e-12) * statistics.backward_ratio
        done, total = done + owned * cost, total + rows * cost
    return done / total if total else 1.0
