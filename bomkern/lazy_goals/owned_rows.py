"""Lazy goals of a loss: looked at first, and given a graph once the loss knows whose the rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import HALF, Call, check_rows, facts_of
from .evaluate import Lazy, again, all_needed, evaluate, fill, look, spread, whole_of

MARGIN = 0.9  # of what walking everything costs: what walking some rows must stay below
ONCE = 'lazy goals have no second derivative where rows are left out: give route="never", or no create_graph=True'
LOOK = 10  # where it does not pay, every so many steps it is looked at whether it would


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
        self._needed = all_needed(self._roots)
        self.walked = 1.0
        grad = torch.is_grad_enabled()
        some = rows and grad and (forced or self._pays())
        if some or not grad:
            fill(self._needed, graph=False)
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
        rows = spread(self._needed, [self._roots[k] for k in reached], masks.unbind())
        self._count(rows)
        if self._built:
            return loss
        made = again(self._needed, rows)
        at, weights, parts = [], [], []
        for k in reached:
            one, grad = self._roots[k], grads[k]
            part = made.get(id(one))
            if part is None or grad is None:
                continue
            place = rows[id(one)].to(one.device, non_blocking=True)
            if one.device.type == "cpu":  # also if all are there: the function itself may have changed
                args = [whole_of(a, graph=False) for a in one.args]
                check_rows(one.fn, part, self._values[k][place], args, self._half)
            at.append(place)
            weights.append(grad[place])
            parts.append(part.to(grad.dtype))
        attached: Tensor = _Attach.apply(loss, at, weights, *parts)
        return attached

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
        ctx.save_for_backward(loss, *parts)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        each = [w * (grad if grad.dim() == 0 else grad[at]) for at, w in zip(ctx.rows, ctx.weights, strict=True)]
        if torch.is_grad_enabled():  # a second derivative would take the weights for constants, which they are not
            reached = [x for x in ctx.saved_tensors if x.requires_grad]
            each = list(_Once.apply(len(each), *each, *reached))
        return grad, None, None, *each


class _Once(torch.autograd.Function):
    """The gradients of the parts as they are, for which there is no second derivative.

    The loss and the parts are inputs, all that the weights depend on: whatever a second derivative is asked for, there
    is a way to it through this node, and so it is entered.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ONCE)
