"""Autograd functions that give a loss the gradient of its owned rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NO_SECOND = 'lazy goals have no second derivative where rows are left out: give route="never", or no create_graph=True'


def attach_rows(loss: Tensor, places: Sequence[Tensor], weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the loss, connected to the graphs of the owned rows of its goals.

    Args:
        loss: the loss, 0-dim or [B].
        places: the samples of each goal's owned rows, [n] int64 on its device.
        weights: the derivative of the loss by these rows, [n] for each goal.
        parts: these rows with a graph, [n] for each goal.
    """
    attached: Tensor = _AttachRows.apply(loss, list(places), list(weights), *parts)
    return attached


class _AttachRows(torch.autograd.Function):
    """Return the loss; in backward, multiply the gradient of the loss with the weights of each part."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, places: list[Tensor], weights: list[Tensor], *parts: Tensor) -> Tensor:
        ctx.places, ctx.weights = places, weights
        ctx.save_for_backward(loss, *parts)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [w * (grad if grad.dim() == 0 else grad[at]) for at, w in zip(ctx.places, ctx.weights, strict=True)]
        if torch.is_grad_enabled():  # a second derivative would treat the weights as constants, which they are not
            saved = [x for x in ctx.saved_tensors if x.requires_grad]
            grads = list(_RefuseSecond.apply(len(grads), *grads, *saved))
        return grad, None, None, *grads


class _RefuseSecond(torch.autograd.Function):
    """Return the gradients of the parts; raise if a second derivative is taken through them.

    The weights depend on the loss and the parts alone. Since these are inputs, every second derivative passes through
    this node.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(NO_SECOND)
