"""Autograd functions that give a loss the gradient of its owned rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NO_SECOND = 'lazy goals have no second derivative where rows are left out: give route="never", or no create_graph=True'


def attach_rows(loss: Tensor, places: Sequence[Tensor], weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return the loss, with the graphs of the owned rows of its goals.

    Args:
        loss: the loss, 0-dim or [B].
        places: of each goal, [n] int64 on its device, the samples that its rows are of.
        weights: of each goal, [n], the derivative of the loss by these rows.
        parts: of each goal, [n], these rows with a graph.
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
    """Return the gradients of the parts; raise where a second derivative is taken through them.

    The weights depend on the loss and the parts alone. As these are inputs, every second derivative enters this node.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(NO_SECOND)
