"""Goals of the bottleneck rule: constraints of every kind, layouts, and leaves with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import (
    Box,
    BoxAsymmetric,
    Lower,
    Minimize,
    MinimizeHard,
    Upper,
)

REDUCTIONS = ("none", "mean", "sum", "min")
SIX = (
    Minimize(0.4),
    MinimizeHard(0.3),
    Upper(0.5, 0.1),
    Lower(0.5, 0.1),
    Box(-0.1, 1.2),
    BoxAsymmetric(-0.2, 0.3, 1.4),
)


def leaf(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return x.to(device=device, dtype=dtype).detach().clone().requires_grad_()


LAYOUTS = {
    "matrix": lambda g: torch.stack(g, 1),
    "transposed matrix": lambda g: torch.stack(g, 0).t(),
    "matrix slice": lambda g: torch.stack([*g, g[0]], 1)[:, :-1],
    "every other row": lambda g: torch.stack(g, 1).repeat_interleave(2, 0)[::2],
    "columns of a matrix": lambda g: list(torch.stack(g, 1).unbind(1)),
    "offset": lambda g: [torch.cat([x[:3], x])[3:] for x in g],
    "strided": lambda g: [x.repeat_interleave(3)[::3] for x in g],
    "reversed twice": lambda g: [x.flip(0).flip(0) for x in g],
    "tuple": tuple,
}


def grad_of(x: Tensor) -> Tensor:
    """Return the gradient of a leaf, or zeros if it is undefined, as for a goal without a share."""
    return torch.zeros_like(x) if x.grad is None else x.grad
