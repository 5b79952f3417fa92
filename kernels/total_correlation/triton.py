"""Triton kernels of `total_correlation`, and the launchers; total_correlation.h has the mathematics, in bits.

Everywhere ``count`` is R, how many rows z has, ``batch`` B, how many components there are, and ``first`` the component
that row 0 was drawn from, for which only the stratified weights ask.

Inputs are laid out anew once, [D, B] in the compute dtype, so that every kernel reads whole lines. Forward:
marginals, joint, and a finish that puts them together. Backward takes rows in chunks, so that the joint weights of a
chunk fit a bounded buffer, and has one kernel that owns rows (grad_z) and one that owns components (grad_mu,
grad_logvar). Nothing is added by two programs, so equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..min_goal.triton_score import div
from .triton_tiles import HALF_LOG2E, LINES, bits, joint_bits, lay, middle_of, near, tile, weight

LN2 = tl.constexpr(0.6931471805599453)
TWO_LN2 = tl.constexpr(2 * 0.6931471805599453)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
LOWEST32 = tl.constexpr(-3.0e38)  # where a maximum begins: finite, so that -inf less it is no NaN
LOWEST64 = tl.constexpr(-1.0e308)
FAINT = tl.constexpr(2.0**-60)  # below this sum of exponentials, those that underflowed may count

CHUNK_BYTES = 2**25  # of joint weights, in backward, in either layout; or 128 rows of them
PROGRAMS = 4096  # at a launch, before each is given more to do
LEAST = 16  # blocks of components for a program that owns rows: what it leaves is added up once more


@triton.jit
def _exact_marginal(
    z, mt, st, ct, mine, batch, size, padded,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COMPS: tl.constexpr,
):  # fmt: skip
    """(largest t, weighted sum of 2^(t - largest)), with a running maximum in every lane, exact for any t."""
    top = tl.full((ROWS, COMPS), LOWEST32 if CD == tl.float32 else LOWEST64, CD)  # noqa: SIM300
    sums = tl.full((ROWS, COMPS), 0, CD)
    i = 0
    while i < padded:
        comps = i + tl.arange(0, COMPS)[None, :]
        t = bits(z, tl.load(mt + comps), tl.load(st + comps), tl.load(ct + comps))
        rise = t - top
        less = tl.exp2(-tl.abs(rise))  # of whichever is smaller, over the other
        w = weight(mine, comps, batch, size, CD) if STRATIFIED else 1.0
        sums = tl.where(rise > 0, sums * less + w, sums + less * w)
        top = tl.where(rise > 0, t, top)
        i += COMPS
    most = tl.max(top, 1)
    return most, tl.sum(sums * tl.exp2(top - most[:, None]), 1)


@triton.jit(do_not_specialize=["first", "count", "batch"])
def marginals(
    zt, mt, st, ct, out, first, count, batch, size, padded,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COMPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """For ROWS rows in one dimension: a shift k, and the reciprocal of the weighted sum of 2^(t - k)."""
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    mine = first + rows[:, None]
    line = tl.program_id(1).to(tl.int64) * padded
    z = tl.load(zt + line + rows)[:, None]
    mt += line
    st += line
    ct += line
    sums = tl.full((ROWS, COMPS), 0, CD)
    i = 0
    while i < padded:
        part = tl.full((ROWS, COMPS), 0, CD)  # summed apart: fewer roundings follow one another
        for j in tl.static_range(UNROLL):
            comps = i + j * COMPS + tl.arange(0, COMPS)[None, :]
            e = tl.exp2(bits(z, tl.load(mt + comps), tl.load(st + comps), tl.load(ct + comps)))
            if STRATIFIED and near(first + row, ROWS, i, UNROLL * COMPS):
                e *= weight(mine, comps, batch, size, CD)
            part += e
        sums += part
        i += UNROLL * COMPS
    total = tl.sum(sums, 1)
    shift = tl.full((ROWS,), 0, CD)
    # A single component is taken exactly too: its weight in the mixture is then 1 to the bit.
    faint = ((total < FAINT) | (batch == 1)) & (rows < count)
    if tl.max(faint.to(tl.int32), 0) > 0:
        shift, total = _exact_marginal(z, mt, st, ct, mine, batch, size, padded, STRATIFIED, CD, ROWS, COMPS)
    at = out + tl.program_id(1).to(tl.int64) * count + rows
    tl.store(at, shift, mask=rows < count)
    tl.store(at + tl.num_programs(1).to(tl.int64) * count, div(tl.full((ROWS,), 1, CD), total), mask=rows < count)


@triton.jit(do_not_specialize=["first", "batch"])
def joint_parts(
    zt, mt, st, sums, tops, weights, first, batch, size, padded_rows, padded, lines, per,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, TALL: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """For 8 TALL rows and ``per`` components: the largest sum_d t, and the weighted sum of 2^(sum_d t - largest)."""
    top = tl.full((TALL, 8), LOWEST32 if CD == tl.float32 else LOWEST64, CD)  # noqa: SIM300
    total = tl.full((TALL, 8), 0, CD)
    i = tl.program_id(1) * per
    stop = tl.minimum(i + per, padded)
    while i < stop:
        rows, comps = tile(tl.program_id(0) * TALL * 8, i, TALL)
        t = joint_bits(zt, mt, st, sums, rows, comps, padded, lines, CD, TALL, LINES)
        now = tl.maximum(top, tl.max(tl.max(t, 3), 1))
        e = tl.exp2(t - now[:, None, :, None])  # a NaN that the maximum skips is caught here
        if STRATIFIED:
            e *= weight(first + rows, comps, batch, size, CD)
        total = total * tl.exp2(top - now) + tl.sum(tl.sum(e, 3), 1)
        top = now
        i += 64
    at = tl.program_id(0) * TALL * 8 + (tl.arange(0, TALL) * 8)[:, None] + tl.arange(0, 8)[None, :]
    line = tl.program_id(1).to(tl.int64) * padded_rows
    tl.store(tops + line + at, top)
    tl.store(weights + line + at, total)


@triton.jit(do_not_specialize=["count", "batch", "splits"])
def finish(
    tops, weights, marginal, low, high, joint, out, log_q, count, batch, dims, size, padded_rows, splits,
    STRATIFIED: tl.constexpr, LINE: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the joint, subtract the marginals, convert bits to nats. log_q may be None. LINE: D = 1."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < count
    marginal += rows[None, :]
    apart = tl.full((), dims, tl.int64) * count
    lane = tl.arange(0, LANES)[:, None]
    if LINE:
        top = tl.load(marginal, mask=mask[None, :], other=0)
        inverse = tl.load(marginal + apart, mask=mask[None, :], other=1)
    else:
        tops += rows[None, :] + lane * padded_rows
        weights += rows[None, :] + lane * padded_rows
        lowest = LOWEST32 if CD == tl.float32 else LOWEST64  # noqa: SIM300
        most = tl.full((LANES, ROWS), lowest, CD)
        i = 0
        while i < splits:
            most = tl.maximum(most, tl.load(tops + i * padded_rows, mask=i + lane < splits, other=lowest))
            i += LANES
        top = tl.max(most, 0)[None, :]
        sums = tl.full((LANES, ROWS), 0, CD)
        i = 0
        while i < splits:
            part = tl.load(weights + i * padded_rows, mask=i + lane < splits, other=0)
            sums += part * tl.exp2(tl.load(tops + i * padded_rows, mask=i + lane < splits, other=lowest) - top)
            i += LANES
        sums = tl.sum(sums, 0)[None, :]
        inverse = div(tl.full((1, ROWS), 1, CD), sums)
    tl.store(joint + rows[None, :], top, mask=mask[None, :])
    tl.store(joint + count + rows[None, :], inverse, mask=mask[None, :])
    others = tl.full((LANES, ROWS), 0, tl.float64)
    d = 0
    while d < dims:
        used = (d + lane < dims) & mask[None, :]
        at = marginal + (d + lane).to(tl.int64) * count
        others += tl.load(at, mask=used, other=0).to(tl.float64)
        others -= tl.log2(tl.load(at + apart, mask=used, other=1)).to(tl.float64)
        d += LANES
    both = top.to(tl.float64) - tl.log2(inverse).to(tl.float64)
    value = both - tl.sum(others, 0)[None, :]
    # A single component factorises: what its difference holds is rounding, or NaN.
    nats = tl.full((), LN2, tl.float64) * (tl.full((), batch, tl.int32) != 1).to(tl.float64)
    among = tl.full((), batch, tl.float64)
    if STRATIFIED:
        among -= 1
    else:
        among *= tl.full((), size, tl.float64)
    among = tl.log(among)
    count_d = tl.full((), dims, tl.float64)
    tl.store(out + rows[None, :], (nats * value + (count_d - 1) * among).to(CD), mask=mask[None, :])
    if log_q is not None:
        total = tl.full((LANES,), 0, tl.float64)  # of -C
        d = 0
        while d < dims:
            at = d + tl.arange(0, LANES)
            total += middle_of(low, high, at, dims) * HALF_LOG2E
            d += LANES
        density = tl.full((), LN2, tl.float64) * (both - tl.sum(total, 0)) - count_d * HALF_LOG_2PI - among
        tl.store(log_q + rows[None, :], density, mask=mask[None, :])


@triton.jit(do_not_specialize=["first", "count", "batch"])
def joint_weights(
    zt, mt, st, sums, joint, grad, stride, more, more_stride, by_row, by_comp, begin, width, first, count, batch, size,
    padded, lines,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, TALL: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """p of a chunk of ``width`` rows, times the gradient of the joint: ``grad`` and ``more``, which may be None.

    It is laid out for the kernel that owns rows and for the one that owns components.
    """
    local, comps = tile(tl.program_id(1) * TALL * 8, tl.program_id(0) * 64, TALL)
    rows = begin + local
    t = joint_bits(zt, mt, st, sums, rows, comps, padded, lines, CD, TALL, LINES)
    used = rows < count  # past the end all p are 0
    p = tl.exp2(t - tl.load(joint + rows, mask=used, other=float("inf")))
    pull = tl.load(grad + rows.to(tl.int64) * stride, mask=used, other=0)
    if more is not None:
        other = tl.load(more + rows.to(tl.int64) * more_stride, mask=used, other=0)
        pull = (pull.to(tl.float64) + other).to(CD)
    p *= tl.load(joint + count + rows, mask=used, other=1) * pull
    if STRATIFIED:
        p *= weight(first + rows, comps, batch, size, CD)
    if by_row is not None:
        tl.store(by_row + local * padded + comps, p)
    if by_comp is not None:
        tl.store(by_comp + comps * width + local, p)


@triton.jit(do_not_specialize=["length", "first", "count", "batch", "padded"])
def pull_rows(
    zt, mt, st, ct, marginal, p, grad, stride, out, begin, length, first, count, batch, dims, size, padded, per,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COMPS: tl.constexpr,
):  # fmt: skip
    """grad_z of the rows of a chunk, from ``per`` components: out [splits, length, D]."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(begin + local, count - 1)  # past the end the last row and dimension stand in
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[:, None]
    d = tl.minimum(dim, dims - 1).to(tl.int64)
    line = d * padded
    z = tl.load(zt + d * padded + rows[None, :])[:, :, None]
    cell = marginal + d * count + rows[None, :]
    shift = tl.load(cell)[:, :, None]
    pull = tl.load(grad + rows.to(tl.int64) * stride)[None, :]
    scale = (tl.load(cell + tl.full((), dims, tl.int64) * count) * pull)[:, :, None]  # of q, with its gradient
    p += local[:, None] * padded
    mine = first + begin + tl.program_id(0) * ROWS
    total = tl.full((DIMS, ROWS, COMPS), 0, CD)
    i = tl.program_id(2) * per
    stop = tl.minimum(i + per, padded)
    while i < stop:
        comps = i + tl.arange(0, COMPS)[None, :]
        at = line + comps
        s = tl.load(st + at)[:, None, :]
        y = (z - tl.load(mt + at)[:, None, :]) * s
        q = tl.exp2(tl.fma(-y, y, tl.load(ct + at)[:, None, :]) - shift) * scale
        if STRATIFIED and near(mine, ROWS, i, COMPS):
            q *= weight(first + rows[:, None], comps, batch, size, CD)[None, :, :]
        # In this order: where the difference is 0, what it multiplies may be large.
        total = tl.fma((tl.load(p + comps)[None, :, :] - q) * y, s, total)
        i += COMPS
    out += (tl.program_id(2).to(tl.int64) * length + local[None, :]) * dims + d
    tl.store(out, tl.sum(total, 2) * -TWO_LN2, mask=(dim < dims) & (begin + local < count)[None, :])


@triton.jit(do_not_specialize=["width", "first", "count", "batch"])
def pull_components(
    zt, mt, st, ct, marginal, p, grad, stride, out_mu, out_logvar, begin, width, stop, first, count, batch, dims, size,
    padded,
    STRATIFIED: tl.constexpr, CD: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COMPS: tl.constexpr,
):  # fmt: skip
    """grad_mu and grad_logvar, [B, D], from the first ``stop`` rows of a chunk; later chunks add to it."""
    comp = tl.program_id(0) * COMPS
    comps = comp + tl.arange(0, COMPS)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[:, None]
    # Past the end the last dimension and row stand in, which spares the loop its masks.
    d = tl.minimum(dim, dims - 1).to(tl.int64)
    at = d * padded + comps[None, :]
    mean = tl.load(mt + at)[:, :, None]
    s = tl.load(st + at)
    c = tl.load(ct + at)[:, :, None]
    p += comps[:, None] * width
    zeroth = tl.full((DIMS, COMPS, ROWS), 0, CD)
    once = zeroth
    twice = zeroth
    zt += d * padded
    shifts = marginal + d * count
    scales = shifts + tl.full((), dims, tl.int64) * count
    r = 0
    while r < stop:
        local = r + tl.arange(0, ROWS)[None, :]
        rows = tl.minimum(begin + local, count - 1)
        pull = tl.where(begin + local < count, tl.load(grad + rows.to(tl.int64) * stride), 0)[:, None, :]
        shift = tl.load(shifts + rows)[:, None, :]
        scale = tl.load(scales + rows)[:, None, :] * pull
        y = (tl.load(zt + rows)[:, None, :] - mean) * s[:, :, None]
        q = tl.exp2(tl.fma(-y, y, c) - shift) * scale
        if STRATIFIED and near(first + begin + r, ROWS, comp, COMPS):
            q *= weight(first + rows, comps[:, None], batch, size, CD)[None, :, :]
        # In this order: where the difference is 0, what it multiplies may be large.
        a = tl.load(p + local)[None, :, :] - q
        zeroth += a
        a *= y
        once += a
        twice = tl.fma(a, y, twice)
        r += ROWS
    used = (dim < dims) & (comps < batch)[None, :]
    at = comps.to(tl.int64)[None, :] * dims + d
    more = tl.where(used, begin, 0) > 0
    if out_mu is not None:
        total = tl.sum(once, 2) * s * TWO_LN2
        tl.store(out_mu + at, total + tl.load(out_mu + at, mask=more, other=0), mask=used)
    if out_logvar is not None:
        total = tl.sum(twice, 2) * LN2 - tl.sum(zeroth, 2) * 0.5
        tl.store(out_logvar + at, total + tl.load(out_logvar + at, mask=more, other=0), mask=used)


def _per(blocks: int, others: int, least: int) -> int:
    """Return how many of all blocks one program takes, at least ``least``, beside the other programs."""
    return max(least, triton.cdiv(blocks * others, PROGRAMS))


def launch_forward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int,
    out: Tensor,
    log_q: Tensor | None,
    joint: Tensor,
    marginal: Tensor,
) -> None:
    """Fill ``out`` [R], ``joint`` [2, R], ``marginal`` [2, D, R] in the compute dtype, and ``log_q`` [R] in float64.

    Joint and marginals have, of each mixture, a shift k and the reciprocal of the weighted sum of 2^(t - k): a share of
    it made from these is closer than one from the sum's logarithm.
    """
    x = lay(z, mu, logvar, dataset_size, stratified, out.dtype)
    rows, batch, dims, size, padded_rows, padded = x.rows, x.batch, x.dims, x.size, x.padded_rows, x.padded
    marginals[(triton.cdiv(rows, 32), dims)](
        x.z, x.mu, x.s, x.c, marginal, first, rows, batch, size, padded,
        ROWS=32, COMPS=32, UNROLL=4, num_warps=4, **x.shared,
    )  # fmt: skip
    blocks = padded_rows // (8 * x.tall)
    per = _per(padded // 64, blocks, 1) * 64
    splits = 0 if dims == 1 else triton.cdiv(padded, per)
    tops, weights = torch.empty(2, splits, padded_rows, dtype=out.dtype, device=out.device)
    if splits:
        joint_parts[(blocks, splits)](
            x.z, x.mu, x.s, x.c.sum(0), tops, weights, first, batch, size, padded_rows, padded, x.lines, per,
            TALL=x.tall, LINES=LINES, num_warps=4, **x.shared,
        )  # fmt: skip
    finish[(triton.cdiv(rows, 32),)](
        tops, weights, marginal, x.low, x.high, joint, out, log_q, rows, batch, dims, size, padded_rows, splits,
        LINE=dims == 1, ROWS=32, LANES=16, num_warps=4, **x.shared,
    )  # fmt: skip


def launch_backward(
    grad: Tensor,
    grad_log_q: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginal: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int,
    want: Sequence[bool],
) -> list[Tensor | None]:
    """Return the wanted gradients of z [R, D], mu and logvar [B, D] in the compute dtype; None for the others."""
    x = lay(z, mu, logvar, dataset_size, stratified, joint.dtype)
    rows, batch, dims, size, padded = x.rows, x.batch, x.dims, x.size, x.padded
    new = x.z.new_empty
    grads = [new(n, dims) if wanted else None for n, wanted in zip((rows, batch, batch), want, strict=True)]
    grad_z, grad_mu, grad_logvar = grads
    comps = grad_mu is not None or grad_logvar is not None
    width = min(x.padded_rows, max(1, CHUNK_BYTES // (padded * x.z.element_size() * 128)) * 128)
    by_row = None if grad_z is None else new(width, padded)
    by_comp = new(padded, width) if comps else None
    sums = x.c.sum(0)
    more = (None, 0) if grad_log_q is None else (grad_log_q, grad_log_q.stride(0))
    quads = triton.cdiv(dims, 4)
    for begin in range(0, rows, width):
        length = min(width, rows - begin)
        local = triton.cdiv(length, 128) * 128
        joint_weights[(padded // 64, local // (8 * x.tall))](
            x.z, x.mu, x.s, sums, joint, grad, grad.stride(0), *more, by_row, by_comp, begin, width, first, rows, batch,
            size, padded, x.lines, TALL=x.tall, LINES=LINES, num_warps=4, **x.shared,
        )  # fmt: skip
        if grad_z is not None:
            programs = triton.cdiv(length, 32) * quads
            per = _per(padded // 32, programs, LEAST) * 32
            splits = triton.cdiv(padded, per)
            whole = grad_z[begin : begin + length]
            parts = new(splits, length, dims) if splits > 1 else whole
            pull_rows[(triton.cdiv(length, 32), quads, splits)](
                x.z, x.mu, x.s, x.c, marginal, by_row, grad, grad.stride(0), parts, begin, length, first, rows, batch,
                dims, size, padded, per, DIMS=4, ROWS=32, COMPS=32, num_warps=8, **x.shared,
            )  # fmt: skip
            if splits > 1:
                torch.sum(parts, 0, out=whole)
        if comps:
            pull_components[(triton.cdiv(batch, 16), quads)](
                x.z, x.mu, x.s, x.c, marginal, by_comp, grad, grad.stride(0), grad_mu, grad_logvar, begin, width,
                local, first, rows, batch, dims, size, padded,
                DIMS=4, ROWS=32, COMPS=16, num_warps=8, **x.shared,
            )  # fmt: skip
    return grads
