"""Triton kernels of `gaussian_kl`, and the launchers; gaussian_kl.h has the mathematics. One launch each way.

Blocks of the prior lie along an axis of their own, GROUP of them in a tile, WIDE dimensions of each at a time. The last
has numbers of its own, and the columns that it lacks are masked. PLAIN: a row is one block that shares nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_matrix import cast, load, options, wide
from .triton_variance import variance_of

CELLS = 1024  # of a tile, with 4 warps


@triton.jit
def _place(group, inner, batch, dims, block, GROUP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, 1, 1], columns [1, GROUP, WIDE] and the mask of a tile that begins ``inner`` into blocks."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    within = inner + tl.arange(0, WIDE)[None, None, :]
    cols = (group + tl.arange(0, GROUP)[None, :, None]).to(tl.int64) * block + within
    return rows, cols, (rows < batch) & (within < block) & (cols < dims)


@triton.jit
def _own(
    whole: tl.float64, last: tl.float64, group, dims, block,
    ALIKE: tl.constexpr, CD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A number for each block of a tile, [1, GROUP]: the last block has its own. ALIKE: one for all, [1, 1]."""
    if ALIKE:
        return tl.full((1, 1), whole, CD)
    else:
        ends = (group + tl.arange(0, GROUP)[None, :] + 1).to(tl.int64) * block
        return tl.where(ends < dims, tl.full((), whole, CD), tl.full((), last, CD))


@triton.jit
def _weigh(shared, of_blocks, ALIKE: tl.constexpr):
    """Their product; 0 for a last block that shares nothing, where it could be NaN."""
    if ALIKE:
        return shared * of_blocks
    else:
        return tl.where(shared != 0, shared * of_blocks, 0)


@triton.jit
def forward(
    mu, logvar, mu_strides, logvar_strides, out, batch, dims, block,
    precision: tl.float64, shared: tl.float64, diagonal: tl.float64,
    last_precision: tl.float64, last_shared: tl.float64, last_diagonal: tl.float64, constant: tl.float64,
    PLAIN: tl.constexpr, ALIKE: tl.constexpr, CD: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The divergences of ROWS samples."""
    twice = tl.full((ROWS, GROUP, WIDE), 0, CD)
    squares = tl.full((ROWS, GROUP), 0, CD)
    group = 0
    while group * block < dims:
        scale = _own(precision, last_precision, group, dims, block, ALIKE, CD, GROUP)[:, :, None]
        ratio = _own(diagonal, last_diagonal, group, dims, block, ALIKE, CD, GROUP)[:, :, None]
        sums = tl.full((ROWS, GROUP, WIDE), 0, CD)
        inner = 0
        while inner < block:
            rows, cols, used = _place(group, inner, batch, dims, block, GROUP, WIDE, ROWS)
            m = load(mu, mu_strides, rows, cols, used, CD)
            v = load(logvar, logvar_strides, rows, cols, used, CD)
            e, _ = variance_of(v)
            if PLAIN:
                twice += tl.fma(m, m, (e - 1) - v)  # outside the mask 0
            else:
                twice += tl.fma(scale * m, m, ratio * (e - 1) - v)
                sums += m
            inner += WIDE
        if not PLAIN:
            total = tl.sum(sums, 2)
            squares += _weigh(_own(shared, last_shared, group, dims, block, ALIKE, CD, GROUP), total * total, ALIKE)
        group += GROUP
    value = tl.sum(tl.sum(twice, 2), 1)
    if not PLAIN:
        value = value - tl.sum(squares, 1) + tl.full((), constant, CD)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(out + row, value * 0.5, mask=row < batch)


@triton.jit
def backward(
    grad, stride, mu, logvar, mu_strides, logvar_strides, grad_mu, grad_logvar, batch, dims, block,
    precision: tl.float64, shared: tl.float64, diagonal: tl.float64,
    last_precision: tl.float64, last_shared: tl.float64, last_diagonal: tl.float64,
    PLAIN: tl.constexpr, ALIKE: tl.constexpr, CD: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS samples in GROUP blocks. A block wider than a tile is read twice, for its sum first."""
    group = tl.program_id(1) * GROUP
    scale = _own(precision, last_precision, group, dims, block, ALIKE, CD, GROUP)[:, :, None]
    ratio = _own(diagonal, last_diagonal, group, dims, block, ALIKE, CD, GROUP)[:, :, None]
    pulled = tl.full((ROWS, GROUP, 1), 0, CD)
    if grad_mu is not None and not PLAIN:
        sums = tl.full((ROWS, GROUP, WIDE), 0, CD)
        inner = 0
        while inner < block:
            rows, cols, used = _place(group, inner, batch, dims, block, GROUP, WIDE, ROWS)
            sums += load(mu, mu_strides, rows, cols, used, CD)
            inner += WIDE
        own = _own(shared, last_shared, group, dims, block, ALIKE, CD, GROUP)
        pulled = _weigh(own, tl.sum(sums, 2), ALIKE)[:, :, None]
    inner = 0
    while inner < block:
        rows, cols, used = _place(group, inner, batch, dims, block, GROUP, WIDE, ROWS)
        g = tl.load(grad + rows * stride, mask=rows < batch, other=0)
        at = rows * dims + cols
        if grad_mu is not None:
            m = load(mu, mu_strides, rows, cols, used, CD)
            tl.store(grad_mu + at, cast(g * (scale * m - pulled), grad_mu.dtype.element_ty), mask=used)
        if grad_logvar is not None:
            _, slope = variance_of(load(logvar, logvar_strides, rows, cols, used, CD))
            tl.store(grad_logvar + at, cast(g * (0.5 * (ratio * slope - 1)), grad_logvar.dtype.element_ty), mask=used)
        inner += WIDE


class _Block(NamedTuple):
    """Return the numbers of one block as in gaussian_kl.h, and its share of twice the constant."""

    precision: float
    shared: float
    diagonal: float
    twice: float


def _block(dims: int, rho: float) -> _Block:
    if dims == 1:
        return _Block(1.0, 0.0, 1.0, 0.0)
    precision, largest = 1 / (1 - rho), 1 - rho + dims * rho
    diagonal = precision * (1 - rho / largest)
    logdet = (dims - 1) * math.log(1 - rho) + math.log(largest)
    return _Block(precision, precision * rho / largest, diagonal, dims * (diagonal - 1) + logdet)


def _prior(dims: int, block: int, rho: float) -> tuple[tuple[float, ...], bool]:
    """Return precision, shared and diagonal of a whole block and of the last one, twice the constant, and whether both
    blocks are alike.
    """
    before = (dims - 1) // block  # blocks before the last
    whole, last = _block(block, rho), _block(dims - before * block, rho)
    return (*whole[:3], *last[:3], before * whole.twice + last.twice), whole == last


def _tile(dims: int, block: int, plain: bool) -> dict[str, int]:
    across = wide(block, CELLS)
    group = 1 if plain else wide(triton.cdiv(dims, block), CELLS // across)
    return dict(ROWS=CELLS // (across * group), GROUP=group, WIDE=across)


def launch_forward(mu: Tensor, logvar: Tensor, block_size: int, rho: float, out: Tensor) -> None:
    """Fill ``out`` [B], in the compute dtype."""
    batch, dims = mu.shape
    plain = block_size == 1 or rho == 0
    block = dims if plain else block_size
    size = _tile(dims, block, plain)
    prior, alike = _prior(dims, block_size, rho)
    forward[(triton.cdiv(batch, size["ROWS"]),)](
        mu, logvar, mu.stride(), logvar.stride(), out, batch, dims, block, *prior,
        PLAIN=plain, ALIKE=alike, num_warps=4, **size, **options(out.dtype),
    )  # fmt: skip


def launch_backward(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    block_size: int,
    rho: float,
    grads: Sequence[Tensor],
    want: Sequence[bool],
) -> None:
    """Fill the gradients of mu and logvar that are wanted, [B, D] contiguous, each in its input's dtype."""
    batch, dims = mu.shape
    plain = block_size == 1 or rho == 0
    # Where dimensions have nothing to do with one another, a "block" is what fits a tile.
    block = wide(dims, CELLS) if plain else block_size
    size = _tile(dims, block, plain)
    prior, alike = _prior(dims, block_size, rho)
    grad_mu, grad_logvar = (g if wanted else None for g, wanted in zip(grads, want, strict=True))
    backward[(triton.cdiv(batch, size["ROWS"]), triton.cdiv(dims, block * size["GROUP"]))](
        grad, grad.stride(0), mu, logvar, mu.stride(), logvar.stride(), grad_mu, grad_logvar, batch, dims, block,
        *prior[:6], PLAIN=plain, ALIKE=alike, num_warps=4, **size, **options(grad.dtype),
    )  # fmt: skip
