"""Triton kernels of `active_units`, and the launchers; active_units.h has the mathematics.

Forward is two launches, moments of the columns and what they make, or one where one program has the whole matrix. It
leaves by each variance the slopes of both results, so that backward is one elementwise launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_matrix import cast, div, load, options, tile
from .triton_moments import LINE, first_of, gather, merge, merging, plan, put, units

# Rows of what backward needs, [ROWS_LEFT, D]: mean less the first value, variance, slopes of active and of effective.
ROWS_LEFT = 4


@triton.jit
def forward(
    mu, strides, batch, dims, per, parts, columns, active, effective, threshold: tl.float64, temperature: tl.float64,
    IS_WHOLE: tl.constexpr, LINE: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Moments of COLS columns in ``per`` rows; where that is all there is, the rest too."""
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    begin = tl.program_id(0) * per
    offset, squares = gather(mu, strides, begin, tl.minimum(begin + per, batch), cols, dims, CD, ROWS, COLS)
    if IS_WHOLE:
        tl.store(columns + cols, offset, mask=cols < dims)
        tl.store(columns + (dims + cols), div(squares, tl.full((), batch - 1, CD)), mask=cols < dims)
        units(columns + dims, dims, threshold, temperature, active, effective, columns + 2 * dims, CD, LINE)
    else:
        put(parts, 0, offset, squares, cols, dims)


@triton.jit(do_not_specialize=["splits", "per", "batch"])
def finish(
    parts, splits, per, batch, dims, columns, active, effective, threshold: tl.float64, temperature: tl.float64,
    LINE: tl.constexpr, CD: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of every column in one program, and compute the fractions."""
    at = 0
    while at < dims:
        cols = (at + tl.arange(0, WIDE)).to(tl.int64)
        offset, squares = merge(parts, 0, splits, per, batch, cols, dims, CD, SPLITS)
        tl.store(columns + cols, offset, mask=cols < dims)
        tl.store(columns + (dims + cols), div(squares, tl.full((), batch - 1, CD)), mask=cols < dims)
        at += WIDE
    units(columns + dims, dims, threshold, temperature, active, effective, columns + 2 * dims, CD, LINE)


@triton.jit
def backward(
    grad_active, grad_effective, mu, strides, columns, grad_mu, batch, dims,
    CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    inside = cols < dims
    slope = tl.full((COLS,), 0, CD)
    if grad_active is not None:
        slope += tl.load(grad_active) * tl.load(columns + (2 * dims + cols), mask=inside, other=0)
    if grad_effective is not None:
        slope += tl.load(grad_effective) * tl.load(columns + (3 * dims + cols), mask=inside, other=0)
    slope *= div(tl.full((), 2, CD), tl.full((), batch - 1, CD))
    offset = tl.load(columns + cols, mask=inside, other=0)
    zeroth = first_of(mu, strides, cols, dims, CD)
    used = (rows < batch) & inside[None, :]
    apart = (load(mu, strides, rows, cols[None, :], used, CD) - zeroth[None, :]) - offset[None, :]
    at = rows * dims + cols[None, :]
    tl.store(grad_mu + at, cast(slope[None, :] * apart, grad_mu.dtype.element_ty), mask=used)


def launch_forward(
    mu: Tensor, threshold: float, temperature: float, active: Tensor, effective: Tensor, columns: Tensor
) -> None:
    """Fill ``active`` and ``effective`` [], and ``columns`` [ROWS_LEFT, D], in the compute dtype."""
    batch, dims = mu.shape
    p = plan(batch, dims, columns.dtype)
    parts = columns.new_empty(0 if p.whole else 2 * p.splits * dims)
    shared = dict(LINE=LINE, num_warps=p.warps, **options(columns.dtype))
    forward[(p.splits, p.across)](
        mu, mu.stride(), batch, dims, p.per, parts, columns, active, effective, threshold, temperature,
        IS_WHOLE=p.whole, **p.tile, **shared,
    )  # fmt: skip
    if not p.whole:
        shared.update(merging(p.splits, dims, columns.dtype), num_warps=16)
        finish[(1,)](parts, p.splits, p.per, batch, dims, columns, active, effective, threshold, temperature, **shared)


def launch_backward(
    grad_active: Tensor | None, grad_effective: Tensor | None, mu: Tensor, columns: Tensor, grad_mu: Tensor
) -> None:
    """Fill ``grad_mu`` [B, D], contiguous, of mu's dtype. A gradient of None counts as 0."""
    batch, dims = mu.shape
    size = tile(2048, dims)
    backward[(triton.cdiv(batch, size["ROWS"]), triton.cdiv(dims, size["COLS"]))](
        grad_active, grad_effective, mu, mu.stride(), columns, grad_mu, batch, dims,
        num_warps=4, **size, **options(columns.dtype),
    )  # fmt: skip
