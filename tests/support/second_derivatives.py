"""Ways to ask for a second derivative, and their expected results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vjp
from torch.utils import _pytree as pytree

from tests.support.derivatives import Inputs, Loss

NAMES = {"min_goal": "min_goal_loss"}  # an op's name in error messages


def flat(parts: Any) -> Tensor:
    """Return nested tensors as one vector."""
    return torch.cat([x.detach().reshape(-1) for x in pytree.tree_leaves(parts)])


def matrix_of(rows: Any, inputs: Inputs) -> Tensor:
    """Return a Hessian's blocks as one [N, N] matrix."""
    sizes = [x.numel() for x in inputs]
    found = []
    for n, row in zip(sizes, rows, strict=True):
        found.append(torch.cat([block.reshape(n, m) for m, block in zip(sizes, row, strict=True)], 1))
    return torch.cat(found)


def size_of(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack([(k + 1) * g.square().sum() for k, g in enumerate(grads)]).sum()


def directions(inputs: Inputs) -> Inputs:
    return tuple(
        torch.linspace(-1, 1.5 + k, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for k, x in enumerate(inputs)
    )


def grads_of(value: Tensor, inputs: Sequence[Tensor], **how: Any) -> Inputs:
    return torch.autograd.grad(value, inputs, materialize_grads=True, **how)


def first(loss: Loss, inputs: Inputs) -> Inputs:
    return grads_of(loss(*inputs), inputs)


def slope(loss: Loss, inputs: Inputs, by: slice = slice(None)) -> Inputs:
    """Differentiate the size of the gradient, which is by some inputs or by all."""
    return grads_of(size_of(grads_of(loss(*inputs), inputs[by], create_graph=True)), inputs)


def rows(loss: Loss, inputs: Inputs) -> Tensor:
    """Return the Hessian, [N, N], row by row."""
    grads = torch.cat([g.reshape(-1) for g in grads_of(loss(*inputs), inputs, create_graph=True)])
    return torch.stack([flat(grads_of(g, inputs, retain_graph=True)) for g in grads])


def pushed(loss: Loss, inputs: Inputs) -> Tensor:
    return flat(first(loss, inputs)) @ flat(directions(inputs))


def by_backward(loss: Loss, inputs: Inputs, **how: Any) -> Inputs:
    def taken(value: Tensor, **more: Any) -> Inputs:
        value.backward(**more)
        made = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        return tuple(made)

    named = {"inputs": inputs} if how.get("named") else {}
    return taken(size_of(taken(loss(*inputs), create_graph=True, **named)), **named)


def func_slope(loss: Loss, inputs: Inputs) -> Any:
    n = tuple(range(len(inputs)))
    return grad(lambda *x: size_of(grad(loss, n)(*x)), n)(*inputs)


def func_pulled(loss: Loss, inputs: Inputs) -> Any:
    def made(*x: Tensor) -> Tensor:
        value, pull = vjp(loss, *x)
        return size_of(pull(torch.ones_like(value)))

    value, pull = vjp(made, *inputs)
    return pull(torch.ones_like(value))


def of_all(transform: Callable[..., Any]) -> Callable[[Loss, Inputs], Any]:
    return lambda loss, inputs: transform(loss, tuple(range(len(inputs))))(*inputs)


def twice_jacrev(loss: Loss, n: tuple[int, ...]) -> Any:
    return jacrev(jacrev(loss, n), n)


def dual(loss: Loss, inputs: Inputs, of_gradient: bool) -> Any:
    with forward_ad.dual_level():
        pairs = [forward_ad.make_dual(x, v) for x, v in zip(inputs, directions(inputs), strict=True)]
        value = loss(*pairs)
        made = grads_of(value, pairs, create_graph=True) if of_gradient else [value]
        return [forward_ad.unpack_dual(x).tangent for x in made]


def differs(got: Tensor, want: Tensor) -> str | None:
    got, error = got.cpu(), (got.cpu() - want).abs()
    if (error <= 1e-9 * want.abs() + 1e-11 * (1 + want.abs().max())).all():  # the comparison is false for NaN
        return None
    k = int(error.argmax())
    return f"number {k} is {got[k].item():.9g}, should be {want[k].item():.9g}"
