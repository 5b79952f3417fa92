"""Triton kernels of `latent_statistics`, and the launchers; latent_statistics.h has the mathematics.

Forward is two launches, or one where one program has everything; each input is read once, by programs of some rows and
some columns. What they leave, moments of columns and parts of rows that are cut, `finish` puts together. It leaves the
slopes of active and effective by each variance, so that backward is one elementwise launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..active_units.triton_moments import LINE, first_of, fold, merge, merging, plan, put, step, units
from ..common.triton_matrix import cast, div, load, options, strides_of, tile
from ..gaussian_kl.triton_variance import variance_of

RUN = 512  # samples that a program of `finish` takes


@triton.jit
def _put_rows(kl, level, square, rows, used, dims, out):
    """Store three sums over the dimensions of samples as results."""
    count = tl.full((), dims, kl.dtype)
    tl.store(out[0] + rows, kl * 0.5, mask=used)
    tl.store(out[1] + rows, div(level, count), mask=used)
    tl.store(out[2] + rows, div(square, count), mask=used)


@triton.jit
def _put_columns(x, strides, offset, squares, batch, dims, cols, mean, variance, offsets, CD: tl.constexpr):
    """Store a column's moments as results, and its offset for backward."""
    inside = cols < dims
    tl.store(offsets + cols, offset, mask=inside)
    tl.store(mean + cols, first_of(x, strides, cols, dims, CD) + offset, mask=inside)
    tl.store(variance + cols, div(squares, tl.full((), batch - 1, CD)), mask=inside)


@triton.jit
def forward(
    z, mu, logvar, strides, batch, dims, per, parts, row_parts, out, columns,
    threshold: tl.float64, temperature: tl.float64,
    IS_WHOLE: tl.constexpr, CUT: tl.constexpr, LINE: tl.constexpr,
    CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Moments of COLS columns in ``per`` rows, and sums over these columns of the rows; CUT: there are others.

    ``out``: the nine results, in order.
    """
    of_z = (strides[0], strides[1])
    of_mu = (strides[2], strides[3])
    of_logvar = (strides[4], strides[5])
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    begin = tl.program_id(0) * per
    stop = tl.minimum(begin + per, batch)
    z_first = first_of(z, of_z, cols, dims, CD)[None, :]
    mu_first = first_of(mu, of_mu, cols, dims, CD)[None, :]
    z_mean = tl.full((ROWS, COLS), 0, CD)
    z_squares = z_mean
    mu_mean = z_mean
    mu_squares = z_mean
    k = 0
    while begin + k * ROWS < stop:
        row = (begin + k * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        rows = row[:, None]
        used = (rows < stop) & (cols < dims)[None, :]
        k += 1
        value = load(z, of_z, rows, cols[None, :], used, CD)
        m = load(mu, of_mu, rows, cols[None, :], used, CD)
        v = load(logvar, of_logvar, rows, cols[None, :], used, CD)
        z_mean, z_squares = step(value - z_first, used, k, z_mean, z_squares)
        mu_mean, mu_squares = step(m - mu_first, used, k, mu_mean, mu_squares)
        e, _ = variance_of(v)
        kl = tl.sum(tl.fma(m, m, (e - 1) - v), 1)  # outside the mask 0, as are the others
        level = tl.sum(v, 1)
        square = tl.sum(v * v, 1)
        if CUT:
            at = row_parts + tl.program_id(1).to(tl.int64) * 3 * batch + row
            apart = tl.full((), batch, tl.int64)
            tl.store(at, kl, mask=row < stop)
            tl.store(at + apart, level, mask=row < stop)
            tl.store(at + 2 * apart, square, mask=row < stop)
        else:
            _put_rows(kl, level, square, row, row < stop, dims, out)
    z_mean, z_squares = fold(z_mean, z_squares, stop - begin, ROWS)
    mu_mean, mu_squares = fold(mu_mean, mu_squares, stop - begin, ROWS)
    if IS_WHOLE:
        _put_columns(z, of_z, z_mean, z_squares, batch, dims, cols, out[3], out[4], columns, CD)
        _put_columns(mu, of_mu, mu_mean, mu_squares, batch, dims, cols, out[5], out[6], columns + dims, CD)
        units(out[6], dims, threshold, temperature, out[7], out[8], columns + 2 * dims, CD, LINE)
    else:
        put(parts, 0, mu_mean, mu_squares, cols, dims)
        put(parts, 1, z_mean, z_squares, cols, dims)


@triton.jit(do_not_specialize=["splits", "per", "batch"])
def finish(
    z, mu, strides, parts, row_parts, splits, per, across, batch, dims, out, columns,
    threshold: tl.float64, temperature: tl.float64,
    LINE: tl.constexpr, RUN: tl.constexpr, CD: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program 0 merges the columns of mu and computes the fractions, program 1 those of z, the others merge rows."""
    pid = tl.program_id(0)
    if pid == 0:
        at = 0
        while at < dims:
            cols = (at + tl.arange(0, WIDE)).to(tl.int64)
            offset, squares = merge(parts, 0, splits, per, batch, cols, dims, CD, SPLITS)
            of_mu = (strides[2], strides[3])
            _put_columns(mu, of_mu, offset, squares, batch, dims, cols, out[5], out[6], columns + dims, CD)
            at += WIDE
        units(out[6], dims, threshold, temperature, out[7], out[8], columns + 2 * dims, CD, LINE)
    elif pid == 1:
        at = 0
        while at < dims:
            cols = (at + tl.arange(0, WIDE)).to(tl.int64)
            offset, squares = merge(parts, 1, splits, per, batch, cols, dims, CD, SPLITS)
            of_z = (strides[0], strides[1])
            _put_columns(z, of_z, offset, squares, batch, dims, cols, out[3], out[4], columns, CD)
            at += WIDE
    else:
        row = (pid - 2).to(tl.int64) * RUN + tl.arange(0, RUN)
        kl = tl.full((RUN,), 0, CD)
        level = kl
        square = kl
        apart = tl.full((), batch, tl.int64)
        i = 0
        while i < across:
            at = row_parts + i * 3 * apart + row
            kl += tl.load(at, mask=row < batch, other=0)
            level += tl.load(at + apart, mask=row < batch, other=0)
            square += tl.load(at + 2 * apart, mask=row < batch, other=0)
            i += 1
        _put_rows(kl, level, square, row, row < batch, dims, out)


@triton.jit
def _of_rows(grads, strides, field: tl.constexpr, rows, batch):
    return tl.load(grads[field] + rows * strides[field], mask=rows < batch, other=0)


@triton.jit
def _of_columns(grads, strides, field: tl.constexpr, cols, dims):
    return tl.load(grads[field] + cols * strides[field], mask=cols < dims, other=0)


@triton.jit
def _apart(values, x, strides, offsets, cols, dims, CD: tl.constexpr):
    """The differences of values from their column's mean."""
    offset = tl.load(offsets + cols, mask=cols < dims, other=0)
    return (values - first_of(x, strides, cols, dims, CD)[None, :]) - offset[None, :]


@triton.jit
def backward(
    grads, grad_strides, z, mu, logvar, strides, columns, grad_z, grad_mu, grad_logvar, batch, dims,
    CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of every gradient that is wanted. ``grads`` are those of the nine results; None counts as 0."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    cols = col[None, :]
    used = (rows < batch) & (cols < dims)
    at = rows * dims + cols
    count = tl.full((), batch, CD)
    twice = div(tl.full((), 2, CD), count - 1)
    if grad_z is not None:
        pull = tl.full((ROWS, COLS), 0, CD)
        if grads[3] is not None:
            pull += div(_of_columns(grads, grad_strides, 3, cols, dims), count)
        if grads[4] is not None:
            of_z = (strides[0], strides[1])
            apart = _apart(load(z, of_z, rows, cols, used, CD), z, of_z, columns, col, dims, CD)
            pull = tl.fma(_of_columns(grads, grad_strides, 4, cols, dims) * twice, apart, pull)
        tl.store(grad_z + at, cast(pull, grad_z.dtype.element_ty), mask=used)
    if grad_mu is not None:
        of_mu = (strides[2], strides[3])
        m = load(mu, of_mu, rows, cols, used, CD)
        pull = tl.full((ROWS, COLS), 0, CD)
        if grads[5] is not None:
            pull += div(_of_columns(grads, grad_strides, 5, cols, dims), count)
        if grads[0] is not None:
            pull = tl.fma(_of_rows(grads, grad_strides, 0, rows, batch), m, pull)
        if grads[6] is not None or grads[7] is not None or grads[8] is not None:
            slope = tl.full((1, COLS), 0, CD)
            if grads[6] is not None:
                slope += _of_columns(grads, grad_strides, 6, cols, dims)
            if grads[7] is not None:
                slope += tl.load(grads[7]) * tl.load(columns + (2 * dims + cols), mask=cols < dims, other=0)
            if grads[8] is not None:
                slope += tl.load(grads[8]) * tl.load(columns + (3 * dims + cols), mask=cols < dims, other=0)
            pull = tl.fma(slope * twice, _apart(m, mu, of_mu, columns + dims, col, dims, CD), pull)
        tl.store(grad_mu + at, cast(pull, grad_mu.dtype.element_ty), mask=used)
    if grad_logvar is not None:
        v = load(logvar, (strides[4], strides[5]), rows, cols, used, CD)
        pull = tl.full((ROWS, COLS), 0, CD)
        if grads[0] is not None:
            _, slope = variance_of(v)
            pull += _of_rows(grads, grad_strides, 0, rows, batch) * (0.5 * (slope - 1))
        if grads[1] is not None:
            pull += div(_of_rows(grads, grad_strides, 1, rows, batch), tl.full((), dims, CD))
        if grads[2] is not None:
            share = div(_of_rows(grads, grad_strides, 2, rows, batch), tl.full((), dims, CD))
            pull = tl.fma(2 * share, v, pull)
        tl.store(grad_logvar + at, cast(pull, grad_logvar.dtype.element_ty), mask=used)


def launch_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float, outputs: Sequence[Tensor]
) -> None:
    """Fill ``outputs``, in the compute dtype: the nine results, then what backward needs of each column.

    That is [4, D]: of z and of mu the mean less the first value, and the slopes of active and of effective.
    """
    *out, columns = outputs
    batch, dims = z.shape
    p = plan(batch, dims, columns.dtype, 2048)
    cut = p.across > 1
    parts = columns.new_empty(0 if p.whole else 4 * p.splits * dims)
    row_parts = columns.new_empty(3 * p.across * batch if cut else 0)
    shared = dict(LINE=LINE, num_warps=p.warps, **options(columns.dtype))
    forward[(p.splits, p.across)](
        z, mu, logvar, strides_of(z, mu, logvar), batch, dims, p.per, parts, row_parts, tuple(out), columns,
        threshold, temperature, IS_WHOLE=p.whole, CUT=cut, **p.tile, **shared,
    )  # fmt: skip
    if not p.whole:
        shared.update(merging(p.splits, dims, columns.dtype), num_warps=16)
        finish[(2 + (triton.cdiv(batch, RUN) if cut else 0),)](
            z, mu, strides_of(z, mu), parts, row_parts, p.splits, p.per, p.across, batch, dims, tuple(out), columns,
            threshold, temperature, RUN=RUN, **shared,
        )  # fmt: skip


def launch_backward(
    grads: Sequence[Tensor | None],
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    columns: Tensor,
    made: Sequence[Tensor],
    want: Sequence[bool],
) -> None:
    """Fill the gradients of z, mu and logvar that are wanted, [B, D] contiguous, each in its input's dtype.

    Args:
        grads: of the nine results; None counts as 0.
        columns: as `launch_forward` left them.
    """
    batch, dims = z.shape
    size = tile(1024, dims)
    wanted = (g if w else None for g, w in zip(made, want, strict=True))
    backward[(triton.cdiv(batch, size["ROWS"]), triton.cdiv(dims, size["COLS"]))](
        tuple(grads), tuple(g.stride(0) if g is not None and g.dim() else 0 for g in grads),
        z, mu, logvar, strides_of(z, mu, logvar), columns, *wanted, batch, dims,
        num_warps=4, **size, **options(columns.dtype),
    )  # fmt: skip
