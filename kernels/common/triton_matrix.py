"""Shared by the Triton kernels: [B, D] inputs of any layout, e^x, and the tiles of a matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..min_goal.triton_score import cast, div

__all__ = ["cast", "div", "exp_of", "kind", "load", "options", "strides_of", "tile", "wide"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: times a whole number it is exact
LN2_LOW = tl.constexpr(1.428606820309417e-06)


@triton.jit
def load(x, strides, rows, cols, mask, CD: tl.constexpr):
    """Elements of a matrix of any strides, in the compute dtype; 0 where masked. ``rows``, ``cols``: int64."""
    return cast(tl.load(x + rows * strides[0] + cols * strides[1], mask=mask, other=0), CD)


@triton.jit
def exp_of(x):
    """e^x, x <= 88. Triton's own float32 exp rounds x log2(e), and is 40 units off at x = 80."""
    if x.dtype == tl.float32:
        x = tl.where(x < -104, -104.0, x)  # 0 from there on; -inf would become NaN
        n = tl.floor(tl.fma(x, tl.full((), LOG2E, tl.float32), tl.full((), 0.5, tl.float32)))
        return tl.exp2(((x - n * LN2_HIGH) - n * LN2_LOW) * LOG2E) * tl.exp2(n)
    else:
        return tl.exp(x)


def kind(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def options(dtype: torch.dtype) -> dict[str, object]:
    """Options of every launch. Multiply-adds are never fused, so that variants of a kernel give the same bits."""
    return dict(CD=kind(dtype), enable_fp_fusion=False)


def wide(dims: int, most: int) -> int:
    """Return the columns of a tile: a power of two that holds all columns, or the largest one allowed."""
    return min(triton.next_power_of_2(dims), most)


def tile(cells: int, dims: int, most: int = 1024) -> dict[str, int]:
    """Return the shape of a tile with a number of cells and a maximum of columns."""
    cols = wide(dims, min(cells, most))
    return dict(ROWS=cells // cols, COLS=cols)


def strides_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return all strides in a row; None and 0-dim tensors have none."""
    return tuple(s for x in tensors if x is not None for s in x.stride())
