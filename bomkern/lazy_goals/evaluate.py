"""Lazy values, and evaluating them: all rows without a graph, then some rows with one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .call import Call, identity, is_rows, name_of

_serial = itertools.count()


class Lazy:
    """A function of rows that has not been evaluated with a graph; see `lazy`.

    Attributes:
        fn: the function. args: its arguments, some of them `Lazy` themselves. rows: B.
    """

    __slots__ = ("args", "autocast", "call", "depth", "fn", "graph", "made", "rows", "start", "whole")

    def __init__(self, fn: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        if not callable(fn):
            raise TypeError(f"lazy: fn must be a function, got {type(fn).__name__}")
        self.fn, self.args, self.rows, self.made = fn, args, _rows(args), next(_serial)
        self.depth: int = 1 + max((a.depth for a in args if isinstance(a, Lazy)), default=0)
        device = self.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.call: Call | None = None  # what has evaluated it, and the first of its rows there
        self.start = 0
        self.whole: Tensor | None = None  # all rows, without gradient
        self.graph: Tensor | None = None  # all rows, with gradient

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.args if isinstance(a, Lazy) or is_rows(a))

    @property
    def value(self) -> Tensor:
        """What the function gives for all rows, [B, ...], without gradient; evaluated once."""
        return look(self)

    @staticmethod
    def tensors(goals: Sequence[Tensor | Lazy]) -> list[Tensor]:
        """All of them with gradient, as if the functions had been called; those of the same function in one call."""
        lazies = [goal for goal in goals if isinstance(goal, Lazy)]
        made = iter(evaluate(lazies))
        return [next(made) if isinstance(goal, Lazy) else goal for goal in goals]

    def __repr__(self) -> str:
        return f"lazy({name_of(self.fn)}, {self.rows} rows)"


def _rows(args: Sequence[Any]) -> int:
    found: list[tuple[int, int]] = []
    for i, a in enumerate(args):
        if isinstance(a, Lazy) or is_rows(a):
            found.append((i, a.rows if isinstance(a, Lazy) else a.shape[0]))
    if not found:
        raise ValueError("lazy: at least one argument must have rows (a tensor [B, ...] or a lazy value), got none")
    for i, rows in found:
        if rows != found[0][1]:
            raise ValueError(
                f"lazy: argument {i} has {rows} rows, argument {found[0][0]} has {found[0][1]}: bind what is no row "
                "to the function"
            )
    return found[0][1]


def all_needed(roots: Sequence[Lazy]) -> list[Lazy]:
    """The roots and all that they read: what is read first, and then in the order in which they were made.

    What has a graph for all rows is as good as a tensor: what it reads is not needed again.
    """
    found: dict[int, Lazy] = {}
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) not in found:
            found[id(one)] = one
            if one.graph is None:
                todo += [a for a in one.args if isinstance(a, Lazy)]
    return sorted(found.values(), key=lambda one: (one.depth, one.made))


def _autocast(state: tuple[str, torch.dtype, bool]) -> AbstractContextManager[Any]:
    device, dtype, enabled = state
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    # Without its cache: what was cast without a graph would be taken for what has one.
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def _groups(lazies: Sequence[Lazy]) -> list[list[Lazy]]:
    """Those that one call can evaluate: same depth, function, autocast, and arguments alike but for their rows."""
    found: dict[Any, list[Lazy]] = {}
    for one in lazies:
        kinds = tuple(
            ("rows", identity(a.fn) if isinstance(a, Lazy) else (a.shape[1:], a.dtype))
            if isinstance(a, Lazy) or is_rows(a)
            else id(a)
            for a in one.args
        )
        found.setdefault((one.depth, identity(one.fn), one.autocast, kinds), []).append(one)
    return list(found.values())


def fill(lazies: Sequence[Lazy], graph: bool) -> None:
    """What has not been evaluated, for all rows."""
    for group in _groups([one for one in lazies if one.call is None]):
        first = group[0]
        args = _joined([[whole_of(a, graph) for a in one.args] for one in group])
        call = Call(first.fn, [one.rows for one in group])
        with _autocast(first.autocast):
            made = call.with_graph(args) if graph else call.without_graph(args)
        start = 0
        for one, part in zip(group, made.split(call.sizes), strict=True):
            one.call, one.start, one.whole = call, start, part.detach()
            one.graph = part if graph else None
            start += one.rows


def _joined(args: Sequence[Sequence[Any]]) -> list[Any]:
    """The arguments of one call for all of a group: their rows one after the other, what is no row once."""
    return [
        torch.cat(column) if len(column) > 1 and is_rows(column[0]) else column[0] for column in zip(*args, strict=True)
    ]


def whole_of(argument: Any, graph: bool) -> Any:
    return argument if not isinstance(argument, Lazy) else argument.graph if graph else argument.whole


def again(lazies: Sequence[Lazy], rows: dict[int, Tensor]) -> dict[int, Tensor]:
    """With a graph, for the rows that are needed.

    Args:
        lazies: as `all_needed` returns them. rows: of each, by id, [n] int64 on the host, ascending; left out if none.

    Returns:
        By id, [n, ...].
    """
    made: dict[int, Tensor] = {}
    calls: dict[int, list[Lazy]] = {}
    for one in lazies:
        if id(one) in rows and one.graph is not None:
            wanted = rows[id(one)]
            made[id(one)] = one.graph if len(wanted) == one.rows else one.graph[wanted.to(one.device)]
        elif id(one) in rows:
            calls.setdefault(id(one.call), []).append(one)
    for group in calls.values():  # in the order of their depths
        call, device = group[0].call, group[0].device
        assert call is not None
        args = _joined([_some(one, rows, made) for one in group])
        picks = torch.cat([rows[id(one)] + one.start for one in group])
        with torch.enable_grad(), _autocast(group[0].autocast):
            out = call.again(args, picks.to(device, non_blocking=True))
        for one, part in zip(group, out.split([len(rows[id(one)]) for one in group]), strict=True):
            made[id(one)] = part
    return made


def _some(one: Lazy, rows: dict[int, Tensor], made: dict[int, Tensor]) -> list[Any]:
    """The arguments of some rows."""
    wanted, found = rows[id(one)], []
    for a in one.args:
        if isinstance(a, Lazy):
            have = rows[id(a)]
            place = wanted if len(have) == a.rows else torch.searchsorted(have, wanted)
            found.append(made[id(a)] if len(have) == len(wanted) else made[id(a)][place.to(a.device)])
        elif is_rows(a) and len(wanted) < one.rows:
            found.append(a[wanted.to(a.device, non_blocking=True)])
        else:
            found.append(a)
    return found


def spread(needed: Sequence[Lazy], roots: Sequence[Lazy], masks: Sequence[Tensor]) -> dict[int, Tensor]:
    """The rows of every lazy that the masked rows of the roots, bool [B] on the host each, make needed."""
    mask = {id(one): torch.zeros(one.rows, dtype=torch.bool) for one in needed}
    for one, rows in zip(roots, masks, strict=True):
        mask[id(one)] |= rows
    for one in reversed(needed):
        for a in one.args:
            if isinstance(a, Lazy) and id(a) in mask:
                mask[id(a)] |= mask[id(one)]
    return {key: rows.nonzero()[:, 0] for key, rows in mask.items() if rows.any()}


def evaluate(lazies: Sequence[Lazy]) -> list[Tensor]:
    """All of them with gradient, as ordinary tensors; those of one function in one call."""
    if not torch.is_grad_enabled():
        return [look(one) for one in lazies]
    needed = all_needed(lazies)
    if all(one.call is None or one.graph is not None for one in needed):
        fill(needed, graph=True)
    else:  # some have been looked at, and must stay what they were
        fill(needed, graph=False)
        made = again(needed, {id(one): torch.arange(one.rows) for one in needed})
        for one in needed:
            one.graph = made[id(one)]
    return [one.graph for one in lazies if one.graph is not None]


def look(one: Lazy) -> Tensor:
    """All rows, without gradient."""
    if one.whole is None:
        fill(all_needed([one]), graph=False)
    assert one.whole is not None
    return one.whole
