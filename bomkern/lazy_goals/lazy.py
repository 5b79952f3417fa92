"""`lazy`: goals given as functions of rows, whose graph is built only for the rows that receive gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.host_copy import capturing
from ..common.torch_internals import under_transform
from .evaluate import Evaluation
from .node import Node


class Lazy(Node):
    """A function of rows that has not been evaluated with a graph; see `lazy`.

    Attributes:
        fn: the function.
        args: its arguments, some of which may be `Lazy` themselves.
        rows: B.
    """

    __slots__ = ()

    @property
    def value(self) -> Tensor:
        """The result of the function for all rows, [B, ...], without gradient; it is evaluated once."""
        if self.whole is None:
            Evaluation([self]).look()
        assert self.whole is not None
        return self.whole

    @staticmethod
    def tensors(goals: Sequence[Tensor | Lazy]) -> list[Tensor]:
        """Return all goals as tensors with gradient; lazies of one function are evaluated in one call."""
        grad = torch.is_grad_enabled()
        if grad:
            Evaluation(goals).build()
        tensors = []
        for goal in goals:
            if isinstance(goal, Lazy):
                goal = goal.graph if grad and goal.graph is not None else goal.value
            tensors.append(goal)
        return tensors


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
    torch.compile, inside torch.func, while a CUDA graph is captured, and with several processes, where ranks must walk
    the same graph. Which way it goes can change the last bits of a gradient; "always" and "never" do not depend on
    times. On a GPU the host waits, once a loss, to learn which rows are owned.

    ``fn`` is called when the loss is computed, more than once, and four times on first use: what else it does (count,
    move an average, call hooks) it does as often, and what it draws must come from PyTorch's own generator. It must not
    write into its arguments. Where rows are left out a second derivative is refused; ``route="never"`` has it.

    Raises:
        TypeError, ValueError: arguments that cannot serve.

    Example:
        >>> recon = bomkern.lazy(decoder, z)
        >>> swap = bomkern.lazy(decoder, z_swapped)  # in the same call as recon
        >>> raw = {"pixels": bomkern.lazy(error, recon, image), "swap": bomkern.lazy(error, swap, other), "kl": kl}
        >>> loss = goals(raw).loss
    """
    if torch.compiler.is_compiling() or under_transform() or _in_capture(args):
        return fn(*args)  # type: ignore[return-value]
    return Lazy(fn, args)


def _in_capture(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and capturing(a.device) for a in args)
