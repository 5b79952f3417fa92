"""The columns in `covariance_penalty`, in Triton: their moments, x itself, and sums over rows for backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..active_units.triton_moments import first_of, gather, merge, plan, put
from ..common.triton_matrix import div, load, options, wide

PROGRAMS = 256
SPLITS = 64  # programs that leave sums of a column, at most: whoever needs the sums adds them up


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _put_columns(z, strides, offset, squares, batch, dims, cols, columns, NORMALIZE: tl.constexpr, CD: tl.constexpr):
    """columns [3, D]: offset, inverse and v."""
    inverse = tl.full(cols.shape, 1, CD)
    if NORMALIZE:
        deviation = _root(div(squares, tl.full((), batch - 1, CD)))
        mean = first_of(z, strides, cols, dims, CD) + offset
        constant = deviation <= (2.0**-23 if CD == tl.float32 else 2.0**-52) * tl.abs(mean)  # noqa: SIM300
        inverse = tl.where(constant, 0, div(inverse, tl.where(constant, 1, deviation)))
        inverse = tl.where(deviation < float("inf"), inverse, float("nan"))  # no 0 of squares that overflowed
    tl.store(columns + cols, offset, mask=cols < dims)
    tl.store(columns + (dims + cols), inverse, mask=cols < dims)
    tl.store(columns + (2 * dims + cols), (squares * inverse) * inverse, mask=cols < dims)


@triton.jit
def moments(
    z, strides, batch, dims, per, parts, columns,
    SPLIT: tl.constexpr, NORMALIZE: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Moments of COLS columns in ``per`` rows, for `finish` if rows are SPLIT."""
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    begin = tl.program_id(0) * per
    offset, squares = gather(z, strides, begin, tl.minimum(begin + per, batch), cols, dims, CD, ROWS, COLS)
    if SPLIT:
        put(parts, 0, offset, squares, cols, dims)
    else:
        _put_columns(z, strides, offset, squares, batch, dims, cols, columns, NORMALIZE, CD)


@triton.jit(do_not_specialize=["splits", "per", "batch"])
def finish(
    z, strides, parts, splits, per, batch, dims, columns,
    NORMALIZE: tl.constexpr, CD: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = (tl.program_id(0) * COLS + tl.arange(0, COLS)).to(tl.int64)
    offset, squares = merge(parts, 0, splits, per, batch, cols, dims, CD, SPLITS)
    _put_columns(z, strides, offset, squares, batch, dims, cols, columns, NORMALIZE, CD)


@triton.jit
def added(parts, which, splits, cols, dims, SPLITS: tl.constexpr):
    """Sums [1, COLS] of the parts [2, splits, D] that the programs of `centre` stored."""
    split = tl.arange(0, SPLITS)[:, None]
    at = parts + (which * splits + split).to(tl.int64) * dims + cols
    return tl.sum(tl.load(at, mask=(split < splits) & (cols < dims), other=0), 0)[None, :]


@triton.jit
def pulled(x, g, v, w, p, q, at, used, CD: tl.constexpr):
    """t of a tile."""
    t = tl.full(used.shape, 0, CD)
    if p is not None:
        t += tl.load(p + at, mask=used, other=0)
    if v is not None:
        t = tl.fma(-v, x, t)
    t *= g
    if q is not None:
        t += tl.load(q + at, mask=used, other=0)
    if w is not None:
        t = tl.fma(-w, x, t)
    return t


@triton.jit
def centre(
    z, strides, columns, batch, dims, per, x, gx, grad, stride, p, q, weights, parts,
    OWN: tl.constexpr, DUAL: tl.constexpr, SPLITS: tl.constexpr,
    CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x, g x and the sums over rows of t and t x, each where it is not None. OWN: t is g x, to make w."""
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    cols = col[None, :]
    inside = cols < dims
    begin = tl.program_id(0) * per
    stop = tl.minimum(begin + per, batch)
    zeroth = first_of(z, strides, cols, dims, CD)
    offset = tl.load(columns + cols, mask=inside, other=0)
    inverse = tl.load(columns + (dims + cols), mask=inside, other=0)
    v = tl.load(columns + (2 * dims + cols), mask=inside, other=0) if DUAL else None
    w = None if weights is None else added(weights, 1, tl.num_programs(0), cols, dims, SPLITS)
    once = tl.full((ROWS, COLS), 0, CD)
    twice = once
    i = begin
    while i < stop:
        rows = (i + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        used = (rows < stop) & inside
        at = rows * dims + cols
        own = ((load(z, strides, rows, cols, used, CD) - zeroth) - offset) * inverse
        if x is not None:
            tl.store(x + at, own, mask=used)
        if grad is not None:
            g = tl.load(grad + rows * stride, mask=rows < stop, other=0)
            if gx is not None:
                tl.store(gx + at, g * own, mask=used)
            if parts is not None:
                t = g * own if OWN else pulled(own, g, v, w, p, q, at, used, CD)
                t = tl.where(used, t, 0)
                once += t
                twice = tl.fma(t, own, twice)
        i += ROWS
    if parts is not None:
        at = parts + tl.program_id(0).to(tl.int64) * dims + col
        tl.store(at, tl.sum(once, 0), mask=col < dims)
        tl.store(at + tl.num_programs(0).to(tl.int64) * dims, tl.sum(twice, 0), mask=col < dims)


def _cut(batch: int, dims: int, cells: int) -> tuple[dict[str, int], int, int, int]:
    """Return (tile, splits, rows of a program, groups of columns) of `centre`."""
    cols = wide(dims, 32)
    rows, across = cells // cols, triton.cdiv(dims, cols)
    splits = min(SPLITS, max(1, PROGRAMS // across))
    per = triton.cdiv(triton.cdiv(batch, rows), splits) * rows
    splits = triton.cdiv(batch, per)
    return dict(ROWS=rows, COLS=cols, SPLITS=triton.next_power_of_2(splits)), splits, per, across


def measure(z: Tensor, normalize: bool, columns: Tensor) -> None:
    """Fill ``columns`` [3, D], in the compute dtype: mean less the first value, inverse, v."""
    batch, dims = z.shape
    p = plan(batch, dims, columns.dtype)
    split = p.splits > 1
    parts = columns.new_empty(2 * p.splits * dims if split else 0)
    shared = dict(NORMALIZE=normalize, **options(columns.dtype))
    moments[(p.splits, p.across)](
        z, z.stride(), batch, dims, p.per, parts, columns, SPLIT=split, num_warps=p.warps, **p.tile, **shared
    )
    if split:
        finish[(triton.cdiv(dims, 16),)](
            z, z.stride(), parts, p.splits, p.per, batch, dims, columns,
            SPLITS=triton.next_power_of_2(p.splits), COLS=16, num_warps=8, **shared,
        )  # fmt: skip


class Columns:
    """A pass over z: x = (z - first - offset) * inverse, and what to compute from it."""

    def __init__(self, z: Tensor, columns: Tensor, dual: bool) -> None:
        self.z, self.columns, self.dual = z, columns, dual
        self.tile, self.splits, self.per, self.across = _cut(*z.shape, 1024 if columns.element_size() == 8 else 2048)

    def new(self) -> Tensor:
        return self.columns.new_empty(self.z.shape)

    def sums(self) -> Tensor:
        """Return memory for the parts of the sums over rows of t and of t x."""
        return self.columns.new_empty(2, self.splits, self.z.shape[1])

    def walk(
        self,
        x: Tensor | None = None,
        gx: Tensor | None = None,
        grad: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        weights: Tensor | None = None,
        parts: Tensor | None = None,
        own: bool = False,
    ) -> None:
        """Launch `centre` once; its docstring explains the arguments."""
        batch, dims = self.z.shape
        centre[(self.splits, self.across)](
            self.z, self.z.stride(), self.columns, batch, dims, self.per, x, gx, grad, stride_of(grad), p, q,
            weights, parts, OWN=own, DUAL=self.dual, num_warps=8, **self.tile, **options(self.columns.dtype),
        )  # fmt: skip


def stride_of(grad: Tensor | None) -> int:
    """Return the stride from sample to sample; 0 for a single number."""
    return grad.stride(0) if grad is not None and grad.dim() else 0
