"""Branch routing: a goal without a share gets an undefined gradient instead of zeros, and autograd skips its branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_goals
from ..common.host_copy import HostCopy, capturing
from ..common.process_group import several_ranks
from ..common.torch_internals import under_transform

ROUTES = ("auto", "always", "never")


def check_route(route: object) -> None:
    """Raise ValueError for an unknown route."""
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(map(repr, ROUTES))}, got {route!r}")


def routes(route: str, device: torch.device) -> bool:
    """Return whether the backward of a loss on this device may skip branches."""
    if route == "never" or torch.compiler.is_compiling():
        return False  # the branches of a compiled graph are fixed
    if under_transform():
        return False  # inside torch.func the host cannot read the shares
    if device.type == "cpu":
        return route == "always" or not several_ranks()
    # The cost of waiting for a GPU has not been measured yet, so "auto" does not route there.
    return route == "always" and not capturing(device)


def rows_too(route: str) -> bool:
    """Return whether graphs may be built for a part of the rows of lazy goals.

    This is never so with several processes. A rank that owns no row would have no graph, so not even an undefined
    gradient would reach the parameters that the other ranks wait for.
    """
    return route != "never" and not several_ranks()


def bits(names: Sequence[object], materialize: Sequence[object]) -> int:
    """Return a bit mask of the goals that may be skipped, as the int64 that the ops take."""
    may = sum(1 << k for k, name in enumerate(names) if name not in materialize)
    return may - (1 << 64) if may >> 63 else may


class _Gate(torch.autograd.Function):
    """Identity whose backward returns None for goals without a share."""

    @staticmethod
    def forward(ctx: Any, owners: Owners, *goals: Tensor) -> tuple[Tensor, ...]:
        ctx.owners = owners
        ctx.set_materialize_grads(False)
        out = tuple(goal.view_as(goal) for goal in goals)
        ctx.mark_non_differentiable(*[view for view, goal in zip(out, goals, strict=True) if not goal.requires_grad])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.owners.needed()
        return (None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)))


class Owners:
    """The goals that hold a share, copied to the host for backward. csrc/route.h is the same in C++.

    Args:
        may: the goals that may be skipped, see `bits`.
        groups: the goal of each column.
    """

    def __init__(self, may: int, groups: Sequence[int]) -> None:
        self.may, self.groups = may, list(groups)
        self.copy: HostCopy | None = None

    def watch(self, share: Tensor) -> None:
        """Start to copy the shares [G] of the forward to the host, without waiting for a GPU."""
        if share.device.type == "cuda" or (type(share) is Tensor and not share.is_meta):
            self.copy = HostCopy(share)

    def needed(self) -> list[bool]:
        """Return whether the gradient has to reach each column."""
        if self.copy is None:
            return [True] * len(self.groups)
        shares = (self.copy.wait() != 0).tolist()
        return [shares[g] or not self.may >> k & 1 for k, g in enumerate(self.groups)]


def gated(
    serve: Callable[..., tuple[Tensor, ...]], goals: Sequence[Tensor], may: int, groups: Sequence[int], place: int
) -> tuple[Tensor, ...]:
    """Call ``serve(goals)`` with a gate in front of the goals. The result at index ``place`` begins with the shares."""
    check_goals(goals)
    if goals[0].dim() == 2:
        return serve(goals)  # one tensor, one branch
    owners = Owners(may, groups)
    out = serve(list(_Gate.apply(owners, *goals)))
    owners.watch(out[place].detach()[: max(groups) + 1])
    return out


def routed_min_goal(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation of min_goal in Python, so that branches can be skipped."""

    def routed(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
        if not route:
            return serve(goals, params, curves, reduction, stats)
        out = gated(lambda inputs: serve(inputs, params, curves, reduction, True), goals, route, range(len(goals)), -3)
        return out if stats else out[:1]

    return routed


def routed_goal_set(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation of goal_set in Python, so that branches can be skipped."""

    def routed(goals: Any, params: Any, curves: Any, groups: Any, *rest: Any, route: int = 0, **masks: Any) -> Any:
        if not route:
            return serve(goals, params, curves, groups, *rest, **masks)
        return gated(lambda inputs: serve(inputs, params, curves, groups, *rest, **masks), goals, route, groups, 2)

    return routed
