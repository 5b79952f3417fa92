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

    @property
    def evaluated(self) -> tuple[Tensor, Tensor]:
        """The rows that a loss with ``Spill(budget=)`` took, [n] int64, and their values, [n, ...], without gradient.

        After any other loss, or before one, all rows, as in ``value``. Train a discriminator on these.
        """
        if self.whole is None and self.part is not None:
            return self.part
        return torch.arange(self.rows, device=self.device), self.value

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
    """Make a goal of ``fn(*args)`` whose graph is built only for the rows that receive gradient.

    `min_goal_loss` and `GoalSet` take it in place of a tensor [B]. They first evaluate it for all rows without a graph
    and find each sample's bottleneck. Then they evaluate it again, with a graph, for the rows whose bottleneck it is.
    Backward runs for those rows alone, and memory holds their activations alone. Gradients are those of the plain
    computation, up to rounding.

    Args:
        fn: takes tensors with some number of rows n and returns a tensor [n, ...]; the function of a goal returns [n].
            Row b of the result must depend on row b of the arguments alone, which is checked on first use, unless
            ``fn.independent_rows`` is true. GroupNorm and LayerNorm meet this; BatchNorm in training mode does not.
        args: tensors of one or more dims are rows, and all must have B of them. An argument may be lazy itself, such as
            the output of a network that several goals read. Numbers and 0-dim tensors are passed on unchanged. Bind a
            tensor that has dims but no rows to ``fn`` (`functools.partial`); pass every tensor with rows as an
            argument.

    Returns:
        The lazy goal.

    Lazies of the same ``fn``, such as a network, that one loss needs are evaluated in one call. Both evaluations draw
    the same random numbers, under the autocast in which ``lazy`` was called. ``fn`` may use `torch.autograd.grad`.

    If most rows get gradient, two evaluations cost more than one. Forward and backward are therefore timed, and
    ``route="auto"`` evaluates once, with a graph, if that is faster. It also does so under torch.compile, inside
    torch.func, while a CUDA graph is captured, and with several processes, where ranks must run the same graph. The
    choice can change the last bits of a gradient; "always" and "never" do not depend on times. On a GPU the host waits
    once per loss to learn which rows receive gradient.

    With ``Spill(budget=)`` the rows of a training step are known before it: ``fn`` is evaluated once, for these alone.

    ``fn`` is called when the loss is computed, more than once, and four times on first use. Its side effects (counters,
    moving averages, hooks) happen as often. Its random numbers must come from PyTorch's own generator, and it must not
    write into its arguments. If rows are left out, a second derivative raises an error; use ``route="never"`` for one.

    Raises:
        TypeError, ValueError: an argument is invalid.

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
