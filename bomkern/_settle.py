"""Evaluating lazies: all rows without a graph, then, once a loss knows whose they are, some rows with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._calls import HALF, Call, check_rows, facts_of, identity, is_rows
from .lazy import Lazy

MARGIN = 0.9  # of what walking everything costs: what walking some rows must stay below
ONCE = b"lazy goals have no second derivative: call backward without create_graph=True"
LOOK = 10  # where it does not pay, every so many steps it is looked at whether it would


def _needed(roots: Sequence[Lazy]) -> list[Lazy]:
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


def _evaluate(lazies: Sequence[Lazy], graph: bool) -> None:
    """What has not been evaluated, for all rows."""
    for group in _groups([one for one in lazies if one.call is None]):
        first = group[0]
        args = _joined([[_whole(a, graph) for a in one.args] for one in group])
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


def _whole(argument: Any, graph: bool) -> Any:
    return argument if not isinstance(argument, Lazy) else argument.graph if graph else argument.whole


def _again(lazies: Sequence[Lazy], rows: dict[int, Tensor]) -> dict[int, Tensor]:
    """With a graph, for the rows that are needed.

    Args:
        lazies: as `_needed` returns them. rows: of each, by id, [n] int64 on the host, ascending; left out if none.

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


def _spread(needed: Sequence[Lazy], roots: Sequence[Lazy], masks: Sequence[Tensor]) -> dict[int, Tensor]:
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
    needed = _needed(lazies)
    if all(one.call is None or one.graph is not None for one in needed):
        _evaluate(needed, graph=True)
    else:  # some have been looked at, and must stay what they were
        _evaluate(needed, graph=False)
        made = _again(needed, {id(one): torch.arange(one.rows) for one in needed})
        for one in needed:
            one.graph = made[id(one)]
    return [one.graph for one in lazies if one.graph is not None]


def look(one: Lazy) -> Tensor:
    """All rows, without gradient."""
    if one.whole is None:
        _evaluate(_needed([one]), graph=False)
    assert one.whole is not None
    return one.whole


class Settled:
    """The goals of a loss as tensors, and the graphs of its lazy ones once it is known which rows get gradient.

    Args:
        goals: tensors and lazies. rows: whether graphs may be built for some rows. forced: also where it does not pay.

    Attributes:
        tensors: what the loss is to be computed of.
        walked: after `attach`, the part of the lazies' backward that will be walked, weighed by measured times.

    Raises:
        ValueError: a lazy that is a goal does not return [n] for n rows.
    """

    def __init__(self, goals: Sequence[Any], rows: bool, forced: bool) -> None:
        self._roots = list({id(goal): goal for goal in goals if isinstance(goal, Lazy)}.values())
        self._needed = _needed(self._roots)
        self.walked = 1.0
        grad = torch.is_grad_enabled()
        some = rows and grad and (forced or self._pays())
        if some or not grad:
            _evaluate(self._needed, graph=False)
        else:
            evaluate(self._roots)
        self._half = any(one.autocast[2] or (one.whole is not None and one.whole.dtype in HALF) for one in self._needed)
        found = {id(one): self._goal(one, some) for one in self._roots}
        self.tensors: list[Any] = [found[id(goal)] if isinstance(goal, Lazy) else goal for goal in goals]
        self._built = not some
        # Those whose gradients tell which rows are needed; where rows are left out, what has a graph is just a tensor.
        self._roots = [
            one for one in self._roots if found[id(one)].requires_grad and not (some and one.graph is not None)
        ]
        self._values = [found[id(one)] for one in self._roots]
        self._watched = bool(self._roots) and (some or (rows and grad and self._due()))

    def attach(self, loss: Tensor) -> Tensor:
        """The loss, with the graphs of the rows that it gives gradient to. Reads from the device which those are."""
        if not self._watched or not loss.requires_grad:
            return loss
        ones = torch.ones_like(loss)
        grads = torch.autograd.grad(loss, self._values, ones, retain_graph=True, allow_unused=True)
        reached = [k for k, grad in enumerate(grads) if grad is not None]
        if not reached:
            self._count({})
            return loss
        masks = torch.stack([grads[k] != 0 for k in reached]).cpu()
        rows = _spread(self._needed, [self._roots[k] for k in reached], masks.unbind())
        self._count(rows)
        if self._built:
            return loss
        made = _again(self._needed, rows)
        at, weights, parts = [], [], []
        for k in reached:
            one, grad = self._roots[k], grads[k]
            part = made.get(id(one))
            if part is None or grad is None:
                continue
            place = rows[id(one)].to(one.device, non_blocking=True)
            if one.device.type == "cpu":  # also if all are there: the function itself may have changed
                args = [_whole(a, graph=False) for a in one.args]
                check_rows(one.fn, part, self._values[k][place], args, self._half)
            at.append(place)
            weights.append(grad[place])
            parts.append(part.to(grad.dtype))
        return _Attach.apply(loss, at, weights, *parts)

    def _goal(self, one: Lazy, some: bool) -> Tensor:
        value = look(one) if one.graph is None or not torch.is_grad_enabled() else one.graph
        if value.dim() != 1:
            raise ValueError(
                f"{one!r} is a goal: it must return [n] for n rows, got {list(value.shape)} for {one.rows}"
            )
        if not some or value is one.graph or not value.is_floating_point():
            return value
        # In float32, as its gradient would be rounded to a half's few digits otherwise.
        return value.detach().to(torch.promote_types(value.dtype, torch.float32)).requires_grad_()

    def _pays(self) -> bool:
        """Whether a second forward and backward of some rows is expected to take less than a backward of all."""
        all_of_it = some_of_it = 0.0
        for one in self._needed:
            facts = facts_of(one.fn)
            if not facts.tried or math.isnan(facts.walked):
                return True  # to be found out
            all_of_it += one.rows * facts.forward * facts.ratio
            some_of_it += one.rows * facts.forward * facts.walked * (1 + facts.ratio)
        return some_of_it < MARGIN * all_of_it

    def _due(self) -> bool:
        facts = facts_of(self._roots[0].fn)
        facts.waited += 1
        return facts.waited % LOOK == 0

    def _count(self, rows: dict[int, Tensor]) -> None:
        done = total = 0.0
        calls: dict[int, tuple[Call, int]] = {}
        for one in self._needed:
            if one.call is None or (one.graph is not None and not self._built):
                continue
            _, n = calls.get(id(one.call), (one.call, 0))
            calls[id(one.call)] = one.call, n + (len(rows[id(one)]) if id(one) in rows else 0)
        for call, n in calls.values():
            call.facts.saw(n / call.rows)
            cost = max(call.facts.forward, 1e-12) * call.facts.ratio
            done, total = done + n * cost, total + call.rows * cost
        if not self._built and total:
            self.walked = done / total


class _Attach(torch.autograd.Function):
    """The loss as it is; in backward, the gradient of the parts: its weights times the loss's own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, rows: list[Tensor], weights: list[Tensor], *parts: Tensor) -> Tensor:
        ctx.rows, ctx.weights = rows, weights
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        each = [w * (grad if grad.dim() == 0 else grad[at]) for at, w in zip(ctx.rows, ctx.weights, strict=True)]
        if torch.is_grad_enabled():  # a second derivative would take the weights for constants, which they are not
            each = [torch._C._functions.DelayedError(ONCE, 1)(part.detach().requires_grad_()) for part in each]
        return grad, None, None, *each
