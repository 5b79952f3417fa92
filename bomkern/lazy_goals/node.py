"""`Node`: a lazy function with its arguments, and its value once it has been evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, is_rows, name_of

_order = itertools.count()


class Node:
    """A function of rows that may not have been evaluated yet.

    It keeps its value, and the call that can repeat the evaluation, after the loss for which it was evaluated. A graph
    is kept only if it has all rows. `evaluate.py` contains the evaluation.

    Attributes:
        fn, args: the function and its arguments, some of which may be nodes.
        rows: B.
        depth: the number of functions on the longest path to an argument that is no node.
        made: the position in the order of creation.
        autocast: device type, dtype and whether it was enabled, at the time of creation.
        call, start: the call that evaluated it, and the position of its first row in that call.
        whole: the value for all rows, without gradient.
        graph: the value for all rows, with gradient.
        part: the rows that a loss with a row budget took, [n] int64 in ascending order, and their values without
            gradient; None before such a loss.
    """

    __slots__ = ("args", "autocast", "call", "depth", "fn", "graph", "made", "part", "rows", "start", "whole")

    def __init__(self, fn: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        if not callable(fn):
            raise TypeError(f"lazy: fn must be a function, got {type(fn).__name__}")
        self.fn, self.args, self.rows, self.made = fn, args, _count_rows(args), next(_order)
        self.depth: int = 1 + max((a.depth for a in args if isinstance(a, Node)), default=0)
        device = self.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.call: Call | None = None
        self.start = 0
        self.whole: Tensor | None = None
        self.graph: Tensor | None = None
        self.part: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.args if isinstance(a, Node) or is_rows(a))

    def __repr__(self) -> str:
        return f"lazy({name_of(self.fn)}, {self.rows} rows)"


def _count_rows(args: Sequence[Any]) -> int:
    """Return the number of rows, which must be the same for all arguments with rows."""
    counts: list[tuple[int, int]] = []
    for i, a in enumerate(args):
        if isinstance(a, Node) or is_rows(a):
            counts.append((i, a.rows if isinstance(a, Node) else a.shape[0]))
    if not counts:
        raise ValueError("lazy: at least one argument must have rows (a tensor [B, ...] or a lazy value), got none")
    first, expected = counts[0]
    for i, rows in counts:
        if rows != expected:
            raise ValueError(
                f"lazy: argument {i} has {rows} rows, argument {first} has {expected}: bind what is no row to the "
                "function"
            )
    return expected
