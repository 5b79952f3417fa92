"""Shared by the Triton kernels of `total_correlation`: the layout they read, distances in bits, stratified weights.

Multiply-adds are spelled out, and no others are made: joint and marginal of a single dimension are then equal to the
bit, and so is their difference, zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..min_goal.triton_score import cast, div

HALF_LOG2E = tl.constexpr(0.7213475204444817)
ROOT_HALF_LOG2E = tl.constexpr(0.8493218002880191)
REACH = tl.constexpr(80.0)  # in logvar: 2^58, which B of them do not overflow

PAD = 128  # B is padded to a multiple of this with components of no weight,
LINES = 8  # and D to a multiple of this with dimensions where every distance is 0.


@triton.jit
def middle_of(low, high, d, dims):
    """Return the log-variance whose c is C: the middle of the range, if then no exponential can overflow."""
    least = cast(tl.load(low + d, mask=d < dims, other=0), tl.float64)
    most = cast(tl.load(high + d, mask=d < dims, other=0), tl.float64)
    return tl.minimum(0.5 * (least + most), least + REACH)


@triton.jit(do_not_specialize=["count", "batch"])
def prepare(
    z, mu, logvar, low, high, strides, count, batch, dims, padded, zt, mt, st, ct,
    CD: tl.constexpr, LINES: tl.constexpr, COMPS: tl.constexpr,
):  # fmt: skip
    """Write z, mu, s and c - C as [D, B] with their padding. In float64, as they are only B D.

    Of z there may be fewer rows; it is laid out as wide as the others, so that one stride does in every loop. C is in
    the middle of c's range in each dimension, where rounding is least; see middle_of().
    """
    i = tl.program_id(0) * COMPS + tl.arange(0, COMPS)
    d = tl.program_id(1) * LINES + tl.arange(0, LINES)
    used = (d < dims)[:, None] & (i < batch)[None, :]
    b = i.to(tl.int64)[None, :]
    e = d.to(tl.int64)[:, None]
    lv = cast(tl.load(logvar + b * strides[4] + e * strides[5], mask=used, other=0), tl.float64)
    c = tl.where(
        used,
        (middle_of(low, high, d, dims)[:, None] - lv) * HALF_LOG2E,
        tl.where(i < batch, 0.0, -float("inf"))[None, :],
    )
    s = tl.where(used, tl.exp(lv * -0.5) * ROOT_HALF_LOG2E, 0.0)
    at = e * padded + b
    rows = used & (i < count)[None, :]
    tl.store(zt + at, cast(tl.load(z + b * strides[0] + e * strides[1], mask=rows, other=0), CD))
    tl.store(mt + at, cast(tl.load(mu + b * strides[2] + e * strides[3], mask=used, other=0), CD))
    tl.store(st + at, s.to(CD))
    tl.store(ct + at, c.to(CD))


class Laid(NamedTuple):
    """The inputs of every kernel: z, mu, s and c - C [D, B] with their padding, and what the launches share."""

    z: Tensor
    mu: Tensor
    s: Tensor
    c: Tensor
    low: Tensor  # of logvar, [D]
    high: Tensor
    rows: int
    batch: int
    dims: int
    size: int  # of the data set; 1 where none is given
    shared: dict[str, object]

    @property
    def padded(self) -> int:
        return self.z.shape[1]

    @property
    def padded_rows(self) -> int:
        return triton.cdiv(self.rows, PAD) * PAD

    @property
    def tall(self) -> int:
        return 4 if self.z.dtype == torch.float64 else 8  # rows a thread has registers for

    @property
    def lines(self) -> int:
        return self.z.shape[0]


def lay(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int | None, stratified: bool, dtype: torch.dtype) -> Laid:
    rows, (batch, dims) = len(z), mu.shape
    padded, lines = triton.cdiv(batch, PAD) * PAD, triton.cdiv(dims, LINES) * LINES
    laid = [torch.empty(lines, padded, dtype=dtype, device=z.device) for _ in range(4)]
    kind = tl.float64 if dtype == torch.float64 else tl.float32
    shared = dict(CD=kind, enable_fp_fusion=False)
    strides = (*z.stride(), *mu.stride(), *logvar.stride())
    low, high = logvar.aminmax(dim=0)
    prepare[(padded // PAD, lines // LINES)](
        z,
        mu,
        logvar,
        low,
        high,
        strides,
        rows,
        batch,
        dims,
        padded,
        *laid,
        LINES=LINES,
        COMPS=PAD,
        num_warps=4,
        **shared,
    )
    return Laid(*laid, low, high, rows, batch, dims, dataset_size or 1, dict(STRATIFIED=stratified, **shared))


@triton.jit
def weight(mine, comps, batch, size, CD: tl.constexpr):
    """Stratified weights of components in the mixtures of rows drawn from components ``mine``, over 1/M.

    See `bomkern.reference.log_weights`.
    """
    count = tl.full((), size, CD)
    own = div(tl.full((), batch - 1, CD), count)
    next = div(tl.full((), size - batch + 1, CD), count)
    after = tl.where(mine + 1 == batch, 0, mine + 1)
    return tl.where(comps == mine, own, tl.where(comps == after, next, 1.0))


@triton.jit
def near(mine, ROWS: tl.constexpr, comp, COMPS: tl.constexpr):
    """Whether any of ROWS rows may have a weight other than 1 for any of COMPS components: its own or the next one.

    ``mine``: the component that the first of the rows was drawn from.
    """
    return (comp == 0) | ((comp <= mine + ROWS) & (comp + COMPS > mine))


@triton.jit
def bits(z, m, s, c):
    """t of one dimension: z against rows of components m, s, c."""
    y = (z - m) * s
    return tl.fma(-y, y, c)


@triton.jit
def tile(row, comp, TALL: tl.constexpr):
    """Rows [TALL, 1, 8, 1] and components [1, 4, 1, 16] of a tile of 8 TALL by 64, with 4 warps.

    So shaped, a thread of the tile has TALL rows and 4 components, and needs few numbers for many distances.
    """
    rows = row + (tl.arange(0, TALL) * 8)[:, None, None, None] + tl.arange(0, 8)[None, None, :, None]
    comps = comp + (tl.arange(0, 4) * 16)[None, :, None, None] + tl.arange(0, 16)[None, None, None, :]
    return rows, comps


@triton.jit
def joint_bits(
    zt, mt, st, sums, rows, comps, padded, lines,
    CD: tl.constexpr, TALL: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """sum_d t of a tile of rows and components; ``sums`` has the components' sum_d c."""
    total = tl.full((TALL, 4, 8, 16), 0, CD)
    part = total + tl.load(sums + comps)
    d = 0
    while d < lines:
        for _ in tl.static_range(LINES):
            y = (tl.load(zt + rows) - tl.load(mt + comps)) * tl.load(st + comps)
            part = tl.fma(-y, y, part)
            zt += padded
            mt += padded
            st += padded
        total += part  # LINES at a time: fewer roundings follow one another
        part = tl.full((TALL, 4, 8, 16), 0, CD)
        d += LINES
    return total
