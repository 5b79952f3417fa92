"""Branch routing: a goal without a share gets an undefined gradient, not zeros, and autograd passes its branch by."""

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
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(map(repr, ROUTES))}, got {route!r}")


def routes(route: str, device: torch.device) -> bool:
    """Whether branches are to be left out of the backward of a loss on this device."""
    if route == "never" or torch.compiler.is_compiling():
        return False  # a compiled graph has its branches fixed
    if under_transform():
        return False  # the shares inside torch.func have no values that the host could read
    if device.type == "cuda":
        # What auto should do where the host waits for a GPU's answer has not been measured yet.
        return route == "always" and not capturing(device)
    return route == "always" or not several_ranks()


def rows_too(route: str) -> bool:
    """Whether graphs may be built for a part of the rows of lazy goals.

    Never with several processes: where a rank owns no row there is no graph, so not even an undefined gradient arrives
    at the parameters that the others wait for.
    """
    return route != "never" and not several_ranks()


def bits(names: Sequence[object], materialize: Sequence[object]) -> int:
    """A bit for each goal that may be left out, as the int64 that the ops take."""
    may = sum(1 << k for k, name in enumerate(names) if name not in materialize)
    return may - (1 << 64) if may >> 63 else may


class _Gate(torch.autograd.Function):
    """The goals as they are; in backward, nothing for those that hold no share by then."""

    @staticmethod
    def forward(ctx: Any, owners: Owners, *goals: Tensor) -> tuple[Tensor, ...]:
        ctx.owners = owners
        ctx.set_materialize_grads(False)
        out = tuple(goal.view_as(goal) for goal in goals)
        ctx.mark_non_differentiable(*[same for same, goal in zip(out, goals, strict=True) if not goal.requires_grad])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        held = ctx.owners.held()
        return (None, *(grad if hold else None for grad, hold in zip(grads, held, strict=True)))


class Owners:
    """Who holds a share, known on the host when backward asks: csrc/route.h in Python.

    Args:
        may: see `bits`. groups: the goal of each column.
    """

    def __init__(self, may: int, groups: Sequence[int]) -> None:
        self.may, self.groups = may, list(groups)
        self.copy: HostCopy | None = None

    def watch(self, share: Tensor) -> None:
        """Take the shares [G] of the forward; from a GPU without waiting for them."""
        if share.device.type == "cuda" or (share.device.type == "cpu" and type(share) is Tensor):
            self.copy = HostCopy(share)

    def held(self) -> list[bool]:
        """Whether each column has to be reached."""
        if self.copy is None:
            return [True] * len(self.groups)
        shares = (self.copy.wait() != 0).tolist()
        return [shares[g] or not self.may >> k & 1 for k, g in enumerate(self.groups)]


def gated(
    serve: Callable[..., tuple[Tensor, ...]], goals: Sequence[Tensor], may: int, groups: Sequence[int], place: int
) -> tuple[Tensor, ...]:
    """``serve(goals)`` with a gate before the goals; shares begin result number ``place``."""
    check_goals(goals)
    if goals[0].dim() == 2:
        return serve(goals)  # one tensor, one branch
    owners = Owners(may, groups)
    out = serve(list(_Gate.apply(owners, *goals)))
    owners.watch(out[place].detach()[: max(groups) + 1])
    return out


def routed_min_goal(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation of min_goal in Python, so that branches can be left out."""

    def routed(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
        if not route:
            return serve(goals, params, curves, reduction, stats)
        out = gated(lambda given: serve(given, params, curves, reduction, True), goals, route, range(len(goals)), -3)
        return out if stats else out[:1]

    return routed


def routed_goal_set(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation of goal_set in Python, so that branches can be left out."""

    def routed(goals: Any, params: Any, curves: Any, groups: Any, *arguments: Any, route: int = 0) -> Any:
        if not route:
            return serve(goals, params, curves, groups, *arguments)
        return gated(lambda given: serve(given, params, curves, groups, *arguments), goals, route, groups, 2)

    return routed
