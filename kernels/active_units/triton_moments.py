"""Mean and variance of columns in Triton, and the active fractions that active_units.h computes from variances.

Values are taken less the column's first one, and merged as Chan, Golub & LeVeque (1983) do: every lane of a tile keeps
a mean and the squares about it, then a program's lanes are put together, then the programs. So a constant column has
variance exactly 0, and no digits are lost far from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.triton_matrix import div, exp_of, load, wide

PROGRAMS = 256  # that leave moments of a column: two for each multiprocessor, and no more than one program merges
WHOLE = 16384  # elements that one program takes by itself, which saves the second launch
LINE = 1024  # columns at a time where only [D] numbers are at hand
COLS = 128  # of a tile, at most

TINY = tl.constexpr(2.0**-126)  # a share of the variance below it has no say; the device's log would make it -inf


class Plan(NamedTuple):
    """The split of columns: ``splits`` programs of ``per`` rows, in tiles, for each of ``across`` groups of columns."""

    tile: dict[str, int]
    warps: int
    splits: int
    per: int
    across: int

    @property
    def whole(self) -> bool:
        """Return whether one program has all rows."""
        return self.splits * self.across == 1


def plan(batch: int, dims: int, dtype: torch.dtype, cells: int = 4096) -> Plan:
    """Return tiles of ``cells`` cells with 8 warps, half as many in float64; a small matrix takes one program of 16."""
    cols = wide(dims, COLS)
    across = triton.cdiv(dims, cols)
    shrink = 2 if dtype == torch.float64 else 1
    if across == 1 and batch * cols <= WHOLE:
        return Plan(dict(ROWS=4096 // shrink // cols, COLS=cols), 16, 1, batch, 1)
    rows = cells // shrink // cols
    tiles = triton.cdiv(batch, rows)
    per = triton.cdiv(tiles, max(1, PROGRAMS // across)) * rows
    return Plan(dict(ROWS=rows, COLS=cols), 8, triton.cdiv(batch, per), per, across)


def merging(splits: int, dims: int, dtype: torch.dtype, cells: int = 8192) -> dict[str, int]:
    """The tile in which one program merges: all parts of as many columns as 16 warps have registers for.

    128 or more of them where they fit, however few there are: that leaves fewer variants to compile.
    """
    height = triton.next_power_of_2(splits)
    return dict(SPLITS=height, WIDE=wide(max(128, dims), cells // (2 if dtype == torch.float64 else 1) // height))


@triton.jit
def first_of(x, strides, cols, dims, CD: tl.constexpr):
    """The first sample's values in these columns."""
    return load(x, strides, cols * 0, cols, cols < dims, CD)


@triton.jit
def step(u, used, k, mean, squares):
    """Add the k-th value, counted from 1, to each lane that is used."""
    share = div(tl.full((), 1, u.dtype), tl.full((), k, u.dtype))
    rise = tl.where(used, u - mean, 0)
    return tl.fma(rise, share, mean), tl.fma(rise * (1 - share), rise, squares)


@triton.jit
def _together(mean, squares, held, count):
    """Mean and squares about it of columns of means, each of ``held`` values, and the squares about them."""
    center = div(tl.sum(held * mean, 0), count)
    center += div(tl.sum(held * (mean - center[None, :]), 0), count)  # what that sum's rounding left
    apart = mean - center[None, :]
    return center, tl.sum(tl.fma(held * apart, apart, squares), 0)


@triton.jit
def fold(mean, squares, count, ROWS: tl.constexpr):
    """Mean and squares about it, [COLS], of ``count`` values of a column that were dealt out to ROWS lanes."""
    lane = tl.arange(0, ROWS)[:, None]
    held = ((count - lane + ROWS - 1) // ROWS).to(mean.dtype)
    return _together(mean, squares, held, tl.full((), count, mean.dtype))


@triton.jit
def gather(x, strides, begin, stop, cols, dims, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Mean, less the column's first value, and squares about it, of rows from begin to stop: [COLS] each."""
    zeroth = first_of(x, strides, cols, dims, CD)[None, :]
    mean = tl.full((ROWS, COLS), 0, CD)
    squares = mean
    k = 0
    while begin + k * ROWS < stop:
        rows = (begin + k * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        used = (rows < stop) & (cols < dims)[None, :]
        k += 1
        mean, squares = step(load(x, strides, rows, cols[None, :], used, CD) - zeroth, used, k, mean, squares)
    return fold(mean, squares, stop - begin, ROWS)


@triton.jit
def put(parts, which, mean, squares, cols, dims):
    """Store a program's moments for `merge`: the pair ``which`` of parts [.., 2, splits, D]."""
    at = parts + ((2 * which) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * dims + cols
    tl.store(at, mean, mask=cols < dims)
    tl.store(at + tl.num_programs(0).to(tl.int64) * dims, squares, mask=cols < dims)


@triton.jit
def merge(parts, which, splits, per, batch, cols, dims, CD: tl.constexpr, SPLITS: tl.constexpr):
    """Merge what ``splits`` programs stored by `put`, each of ``per`` rows but the last: [columns] each."""
    split = tl.arange(0, SPLITS)[:, None]
    used = (split < splits) & (cols < dims)[None, :]
    at = parts + ((2 * which) * splits + split).to(tl.int64) * dims + cols[None, :]
    mean = tl.load(at, mask=used, other=0)
    squares = tl.load(at + tl.full((), splits, tl.int64) * dims, mask=used, other=0)
    held = tl.where(split < splits, tl.minimum(per, batch - split * per), 0).to(CD)
    return _together(mean, squares, held, tl.full((), batch, CD))


@triton.jit
def units(variance, dims, threshold, temperature, active, effective, slopes, CD: tl.constexpr, LINE: tl.constexpr):
    """Active and effective fraction of variances [D], and their slopes by each variance, [2, D]."""
    tl.debug_barrier()  # the variances may have been stored just now, by other threads
    lane = tl.arange(0, LINE)
    count = tl.full((), dims, CD)
    bar = tl.full((), threshold, CD)
    sharp = div(tl.full((), 1, CD), tl.full((), temperature, CD))
    total = tl.full((LINE,), 0, CD)
    awake = total
    at = 0
    while at < dims:
        v = tl.load(variance + at + lane, mask=at + lane < dims, other=0)
        total += v
        x = (v - bar) * sharp
        e = exp_of(-tl.abs(x))
        awake += tl.where(at + lane < dims, tl.where(x < 0, e, 1) / (1 + e), 0)
        at += LINE
    tl.store(active, div(tl.sum(awake, 0), count))
    whole = tl.sum(total, 0)
    none = whole == 0
    whole = tl.where(none, 1, whole)
    entropy = tl.full((LINE,), 0, CD)
    at = 0
    while at < dims:
        p = div(tl.load(variance + at + lane, mask=at + lane < dims, other=0), whole)
        entropy -= p * tl.log(tl.where(p < TINY, 1, p))
        at += LINE
    spread = tl.sum(entropy, 0)
    fraction = tl.where(none, 0, div(exp_of(spread), count))
    tl.store(effective, fraction)
    at = 0
    while at < dims:
        used = at + lane < dims
        v = tl.load(variance + at + lane, mask=used, other=0)
        e = exp_of(-tl.abs((v - bar) * sharp))
        tl.store(slopes + at + lane, e / ((1 + e) * (1 + e)) * div(sharp, count), mask=used)
        p = div(v, whole)
        slope = (tl.log(tl.where(p < TINY, 1, p)) + spread) * -div(fraction, whole)
        tl.store(slopes + (dims + at + lane), tl.where(p < TINY, 0, slope), mask=used)
        at += LINE
