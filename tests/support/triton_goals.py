"""Goals and constraints that lead to the different launches of min_goal."""

from __future__ import annotations

import torch
from torch import Tensor

from bomkern import Box, BoxAsymmetric, Constraint, ConstraintTable, Lower, Minimize, MinimizeHard, Upper
from tests.support.triton_device import DEVICE

NONE, MEAN, SUM, MIN = range(4)
MIXED = [
    Minimize(0.7, 0.1),
    MinimizeHard(0.5),
    Upper(0.2, 0.31),
    Lower(0.4, 0.21),
    Box(-0.5, 1.0),
    BoxAsymmetric(-1, 0.2, 0.9),
]
CONSTRAINTS: dict[str, list[Constraint] | None] = {
    "scores": None,
    "linear": [Minimize(s / 7) for s in range(1, 7)],
    "hard": [MinimizeHard(s / 7) for s in range(1, 7)],
    "barrier": [Box(-s / 7, s / 5) for s in range(1, 7)],
    "mixed": MIXED,
}
LAYOUTS = ("rows", "slice", "transposed", "columns", "strided", "batch-level")


def make(layout: str, batch: int, dtypes: list[torch.dtype], low: float = 0.01, high: float = 1.6) -> list[Tensor]:
    """Return six goals as leaves that require grad, in one of LAYOUTS.

    A single tensor has the first dtype.
    """
    x = torch.rand(batch, 6, generator=torch.Generator().manual_seed(batch)) * (high - low) + low
    if layout in ("rows", "slice", "transposed"):
        x = x.to(dtypes[0])
        if layout == "slice":
            x = torch.full((2 * batch + 3, 9), 7.0, dtype=x.dtype)[3::2, 2:8].copy_(x)
        elif layout == "transposed":
            x = x.t().contiguous().t()
        return [x.to(DEVICE).requires_grad_() if layout == "rows" else on_device(x)]
    goals = [x[:, k].to(dtypes[k % len(dtypes)]) for k in range(6)]
    if layout == "strided":
        goals = [torch.full((3 * batch,), 7.0, dtype=g.dtype)[::3].copy_(g) for g in goals]
        goals[2] = goals[2][:1].expand(batch)
    elif layout == "batch-level":
        goals = [g[0].clone() if k in (1, 4) else g.contiguous() for k, g in enumerate(goals)]
    else:
        goals = [g.contiguous() for g in goals]
    return [on_device(g) for g in goals]


def on_device(x: Tensor) -> Tensor:
    """Return x on the device, with its strides."""
    return (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x).requires_grad_()
        if x.dim() and 0 not in x.stride()
        else x.detach().to(DEVICE).requires_grad_()
    )


def table(constraints: list[Constraint] | None, dtype: torch.dtype) -> tuple[Tensor | None, list[int]]:
    if constraints is None:
        return None, []
    made = ConstraintTable(constraints, DEVICE, dtype)
    return made.params, made.curves
