"""`lazy`: goals given as functions of rows, whose graph is built only for the rows that get gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, is_rows, name_of

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
        from ._settle import look

        return look(self)

    @staticmethod
    def tensors(goals: Sequence[Tensor | Lazy]) -> list[Tensor]:
        """All of them with gradient, as if the functions had been called; those of the same function in one call."""
        from ._settle import evaluate

        lazies = [goal for goal in goals if isinstance(goal, Lazy)]
        made = iter(evaluate(lazies))
        return [next(made) if isinstance(goal, Lazy) else goal for goal in goals]

    def __repr__(self) -> str:
        return f"lazy({name_of(self.fn)}, {self.rows} rows)"


def lazy(fn: Callable[..., Tensor], *args: Any) -> Lazy:
    """``fn(*args)`` as a goal of which only the rows that get gradient are ever put into a graph.

    `min_goal_loss` and `GoalSet` take it where they take a tensor [B]. They first evaluate it for all rows without a
    graph, find each sample's bottleneck, and then evaluate it again, with a graph, for the rows whose bottleneck it is:
    backward walks those rows alone, and memory holds the activations of those rows alone. Gradients are those of the
    plain computation, to rounding.

    Args:
        fn: takes tensors with some number of rows n and returns a tensor [n, ...]; a goal's returns [n]. Row b of the
            result must depend on row b of the arguments alone (GroupNorm and LayerNorm do, BatchNorm in training mode
            does not): that is checked on first use.
        args: tensors of one or more dims are rows and must all have B of them; an argument may be lazy itself, to
            stand for the output of a network that several goals read. Anything else is handed through: numbers, 0-dim
            tensors. What is no row but has dims must be bound to ``fn`` (`functools.partial`), and whatever has rows
            must be an argument.

    Lazies of the same ``fn`` (a network, above all) that are needed for one loss are evaluated in one call. Random
    numbers that ``fn`` draws are the same both times, autocast is as it was when ``lazy`` was called, and ``fn`` may
    use `torch.autograd.grad` inside. Where the rows that get gradient are most of them, two evaluations cost more than
    one: forward and backward are timed, and ``route="auto"`` then evaluates once, with a graph. It does so too under
    torch.compile, inside torch.func and with several processes, where ranks must walk the same graph. Which way it goes
    can change the last bits of a gradient; "always" and "never" do not depend on times. On a GPU the host waits, once a
    loss, to learn which rows are owned.

    ``fn`` is called when the loss is computed, more than once, and four times on first use: what else it does (count,
    move an average, call hooks) it does as often, and what it draws must come from PyTorch's own generator. It must not
    write into its arguments. There are no second derivatives.

    Raises:
        TypeError, ValueError: arguments that cannot serve.

    Example:
        >>> recon = bomkern.lazy(decoder, z)
        >>> swap = bomkern.lazy(decoder, z_swapped)  # in the same call as recon
        >>> raw = {"pixels": bomkern.lazy(error, recon, image), "swap": bomkern.lazy(error, swap, other), "kl": kl}
        >>> loss = goals(raw).loss
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return fn(*args)  # type: ignore[return-value]
    return Lazy(fn, args)


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
