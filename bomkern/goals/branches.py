"""`Branches`: find the operation, and the goals whose graph it is in, that makes a gradient not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.torch_internals import sparse_values


class Branches:
    """Watch the backward of one step with a hook on every node of the goals' graphs. No host sync.

    Args:
        goals: the name of the goal of each tensor.
        tensors: raw values by column; what is no tensor with a graph is left out.

    Attributes:
        seen: for each node that has run, in order: its name, a bit mask of the columns that reach it, and whether the
            gradient that it received, and the one that it gave, has a NaN or an infinite value, [2] bool each.
    """

    def __init__(self, goals: Sequence[str], tensors: Sequence[Any]) -> None:
        self.goals = list(goals)
        self.seen: list[tuple[str, int, Tensor, Tensor]] = []
        self.closed = False
        roots: dict[Any, int] = {}
        for k, x in enumerate(tensors):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                roots[x.grad_fn] = roots.get(x.grad_fn, 0) | 1 << k
        for node, columns in _reached(roots).items():
            if node.next_functions:  # a leaf's node only stores the gradient
                node.register_hook(self._hook(node.name(), columns))

    def _hook(self, name: str, columns: int) -> Callable[[Any, Any], None]:
        def note(given: Sequence[Tensor | None], received: Sequence[Tensor | None]) -> None:
            if not self.closed:
                before, after = self._bad(received), self._bad(given)
                if after is not None:
                    self.seen.append((name, columns, torch.zeros_like(after) if before is None else before, after))

        return note

    @torch.no_grad()
    def _bad(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        flags = []
        for grad in grads:
            if grad is not None and (grad.is_floating_point() or grad.is_complex()):
                values = sparse_values(grad) if grad.is_sparse else grad
                flags.append(torch.stack([values.isnan().any(), values.isinf().any()]))
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any(0) if flags else None

    def close(self) -> None:
        """Forget what was seen, and ignore backwards that follow."""
        self.closed = True
        self.seen.clear()

    def find(self, nan_only: bool) -> tuple[str, list[str]] | None:
        """Return the first node that made a gradient bad, and the goals that reach it. Waits for the device.

        Args:
            nan_only: whether infinite values are no fault, because a scaled loss gives them.
        """
        for name, columns, before, after in self.seen:
            if any(after.tolist()) and not any(before.tolist()):
                if nan_only and not after.tolist()[0]:
                    return None  # all that follows may come from the scale
                reach = [goal for k, goal in enumerate(self.goals) if columns >> k & 1]
                return name, list(dict.fromkeys(reach))
        return None


def _reached(roots: dict[Any, int]) -> dict[Any, int]:
    """Return the nodes that the roots reach, with the union of the bit masks of those roots."""
    order: list[Any] = []  # each node after those that it leads to
    known: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in known:
            known.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and child not in known]
    masks = dict.fromkeys(reversed(order), 0)
    for node in masks:
        masks[node] |= roots.get(node, 0)
        for child, _ in node.next_functions:
            if child is not None:
                masks[child] |= masks[node]
    return masks


def watch_backward(steps: list[Branches], goals: Sequence[str], tensors: Sequence[Any]) -> None:
    """Add the branches of a step whose backward is to be watched."""
    if torch.is_grad_enabled():
        steps.append(Branches(goals, tensors))
        del steps[:-32]  # a loop that seldom steps, or never
