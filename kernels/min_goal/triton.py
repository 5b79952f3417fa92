"""Triton kernels of `min_goal`, and the launchers that choose a configuration for them.

Forward is one launch where a sample's loss is all that is asked for, or where the batch fits one program; otherwise
each program leaves partial results and a second launch puts them together in a fixed order (no float atomics, so equal
inputs give equal bits). Backward is one launch, and a second only for 0-dim goals of a batch larger than one program.

NaN and ties are spelled out with ``where``: Triton's own ``max`` and ``argmax`` skip NaN, and promise no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# bomkern.constraints' curve codes, then two of this file: inputs that are scores already, and a mix of curves.
LINEAR = tl.constexpr(0)
HARD = tl.constexpr(1)
BARRIER = tl.constexpr(2)
SCORE = tl.constexpr(3)
MIXED = tl.constexpr(4)
# bomkern.reference's reduction codes.
NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
MIN = tl.constexpr(3)
# Rows of the partial results [rows, programs]: loss or worst deficit, slope there, infeasible samples, level, share.
SLOPE_ROW = tl.constexpr(1)
BAD_ROW = tl.constexpr(2)
LEVEL_ROW = tl.constexpr(3)

INF = tl.constexpr(float("inf"))
LAST = tl.constexpr(2**63 - 1)  # after every flat index
TINY = tl.constexpr(2.0**-126)  # smallest normal float32


@triton.jit
def _div(a, b):
    """a / b, correctly rounded: Triton's own float32 division is two units off."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _log(x):
    """log x; the device's float32 log flushes subnormal arguments to 0, so they are scaled up first."""
    if x.dtype == tl.float32:
        small = x < TINY
        log = tl.log(tl.where(small, x * 33554432.0, x))
        return tl.where(small, log - 17.328679513998632, log)
    else:
        return tl.log(x)


@triton.jit
def _log1p(y):
    """log(1 + y), with what rounding lost in 1 + y put back to first order."""
    u = 1 + y
    return tl.log(u) + (y - (u - 1)) / u


@triton.jit
def _exp(x):
    """exp x; the device's float32 exp loses |x| * 2^-24 relative, so whole powers of two are split off exactly."""
    if x.dtype == tl.float32:
        x = tl.where(x > 89.0, 89.0, tl.where(x < -110.0, -110.0, x))
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        return tl.exp(x - n * 0.693359375 + n * 2.12194440e-4) * tl.exp2(n)
    else:
        return tl.exp(x)


@triton.jit
def _linear(r, s):
    return r, _exp(-r), s, tl.full(r.shape, 1, r.dtype)


@triton.jit
def _hard(r, s):
    far = tl.abs(r) > 1e8  # 1 + r^2 overflows further out; from here it is r^2 to the last bit
    square = tl.where(far, 0, r * r)
    d = tl.where(far, 2 * tl.log(tl.where(far, tl.abs(r), 1)), _log1p(square))
    den = tl.where(far, r, 1 + square)
    return d, tl.where(far, 0, 1 / (1 + square)), tl.where(far, 2 * s, 2 * r * s), den


@triton.jit
def _barrier(r, s, tail):
    inside = r <= 1 - tail
    y = tl.where(inside, -r, 0)
    over = (r - 1 + tail) / tl.where(tail < 1e-30, 1e-30, tail)
    d = tl.where(inside, -_log1p(y), over - tl.log(tail))
    score = tl.where(inside, 1 + y, tail * _exp(-over))
    return d, score, s, tl.where(inside, 1 + y, tail)


@triton.jit
def _judge(x, center, right, left, tail, code, CURVE: tl.constexpr):
    """(deficit, score, num, den) of raw values, where num / den is the deficit's slope. See `bomkern.constraints`."""
    if CURVE == SCORE:
        d = tl.where(x <= 0, INF, -_log(x))
        score = x
        num = tl.full(x.shape, -1, x.dtype)
        den = x
    else:
        u = x - center
        flat = tl.where(right == left, right, 0)
        s = tl.where(u > 0, right, tl.where(u < 0, left, flat))
        r = tl.where((s == 0) & (u == u), 0, u * s)
        if CURVE == LINEAR:
            d, score, num, den = _linear(r, s)
        elif CURVE == HARD:
            d, score, num, den = _hard(r, s)
        elif CURVE == BARRIER:
            d, score, num, den = _barrier(r, s, tail)
        else:
            d, score, num, den = _linear(r, s)
            d1, score1, num1, den1 = _hard(r, s)
            d2, score2, num2, den2 = _barrier(r, s, tail)
            d = tl.where(code == HARD, d1, tl.where(code == BARRIER, d2, d))
            score = tl.where(code == HARD, score1, tl.where(code == BARRIER, score2, score))
            num = tl.where(code == HARD, num1, tl.where(code == BARRIER, num2, num))
            den = tl.where(code == HARD, den1, tl.where(code == BARRIER, den2, den))
    d = tl.where(d == -INF, INF, d)
    return d, tl.where(d == INF, 0, score), num, den


@triton.jit
def _worst(d, index, axis: tl.constexpr):
    """Lowest ``index`` of the largest ``d`` along ``axis``; a NaN is worse than all. Unused lanes hold -inf."""
    nan = (d != d).to(tl.int32)
    any_nan = tl.max(nan, axis, keep_dims=True)
    top = tl.max(tl.where(nan > 0, -INF, d), axis, keep_dims=True)
    hit = tl.where(any_nan > 0, nan, (d == top).to(tl.int32))
    return tl.min(tl.where(hit > 0, index, LAST), axis)


@triton.jit
def _put(value, out, parts, row, total, WHOLE: tl.constexpr, mask=None):
    """Value / total where one program has the whole batch, else this program's part of it, for `finish`."""
    if WHOLE:
        tl.store(out, _div(value, total), mask=mask)
    else:
        tl.store(parts + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value, mask=mask)


@triton.jit
def _scan_columns(
    goals, strides, params, level, parts, b, mask, total,
    K: tl.constexpr, CURVES: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    CD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bottleneck of each sample from K pointers, one goal after another: (deficit, winner, num, den), each [BLOCK]."""
    best = tl.full((BLOCK,), -INF, CD)
    winner = tl.full((BLOCK,), 0, tl.int32)
    num = tl.full((BLOCK,), 0, CD)
    den = tl.full((BLOCK,), 1, CD)
    for k in tl.static_range(K):
        x = tl.load(goals[k] + b * strides[k], mask=mask, other=1).to(CD)
        if CURVES[k] == SCORE:
            d, score, n, m = _judge(x, 0, 0, 0, 0, 0, SCORE)
        else:
            center = tl.load(params + 4 * k)
            right = tl.load(params + 4 * k + 1)
            left = tl.load(params + 4 * k + 2)
            tail = tl.load(params + 4 * k + 3)
            d, score, n, m = _judge(x, center, right, left, tail, 0, CURVES[k])
        take = (d > best) | ((d != d) & (best == best))
        best = tl.where(take, d, best)
        winner = tl.where(take, k, winner)
        num = tl.where(take, n, num)
        den = tl.where(take, m, den)
        if STATS:
            _put(tl.sum(tl.where(mask, score, 0), 0), level + k, parts, LEVEL_ROW + k, total, WHOLE)
    return best, winner, num, den


@triton.jit
def _scan_rows(
    x, stride_b, stride_k, params, level, parts, b, mask, total,
    K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, STATS: tl.constexpr, WHOLE: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """`_scan_columns` of one [B, K] tensor, read row by row as a [BLOCK, KP] tile."""
    col = tl.arange(0, KP)
    used = col < K
    cells = mask[:, None] & used[None, :]
    values = tl.load(x + b[:, None] * stride_b + (col * stride_k)[None, :], mask=cells, other=1).to(CD)
    code = tl.full((KP,), 0, tl.int32)
    if CURVE == SCORE:
        d, score, n, m = _judge(values, 0, 0, 0, 0, 0, SCORE)
    else:
        at = params + 4 * col
        center = tl.load(at, mask=used, other=0)
        right = tl.load(at + 1, mask=used, other=0)
        left = tl.load(at + 2, mask=used, other=0)
        tail = tl.load(at + 3, mask=used, other=1)
        if CURVE == MIXED:
            for k in tl.static_range(K):
                code = tl.where(col == k, CURVES[k], code)
        d, score, n, m = _judge(
            values, center[None, :], right[None, :], left[None, :], tail[None, :], code[None, :], CURVE
        )
    winner = _worst(tl.where(used[None, :], d, -INF), col[None, :].to(tl.int64), 1).to(tl.int32)
    if STATS:
        _put(tl.sum(tl.where(cells, score, 0), 0), level + col, parts, LEVEL_ROW + col, total, WHOLE, used)
    # The winner's own value again, then its deficit once more: cheaper than carrying num and den for every cell.
    own = tl.sum(tl.where(col[None, :] == winner[:, None], values, 0), 1)
    if CURVE == SCORE:
        best, score1, num, den = _judge(own, 0, 0, 0, 0, 0, SCORE)
    else:
        at1 = params + 4 * winner
        own_code = tl.sum(tl.where(col[None, :] == winner[:, None], code[None, :], 0), 1)
        best, score1, num, den = _judge(
            own, tl.load(at1), tl.load(at1 + 1), tl.load(at1 + 2), tl.load(at1 + 3), own_code, CURVE
        )
    return best, winner, num, den


@triton.jit
def forward(
    goals, strides, stride_k, params, batch,
    loss, winner, slope, bottleneck, share, level, finite, parts, part_flat,
    K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, REDUCTION: tl.constexpr,
    STATS: tl.constexpr, SAVE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK samples: the bottleneck of each, and of the tile what the reduction and the statistics need."""
    pid = tl.program_id(0)
    b = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    total = tl.full((), batch, CD)
    if ROWS:
        best, win, num, den = _scan_rows(
            goals[0], strides[0], stride_k, params, level, parts, b, mask, total,
            K, CURVES, CURVE, STATS, WHOLE, CD, KP,
        )  # fmt: skip
    else:
        best, win, num, den = _scan_columns(
            goals, strides, params, level, parts, b, mask, total, K, CURVES, STATS, WHOLE, CD, BLOCK
        )
    feasible = best < INF  # False for NaN too
    rise = tl.where(feasible, _div(num, den), 0)

    if REDUCTION == NONE:
        tl.store(loss + b, best, mask=mask)
    elif REDUCTION == MIN:
        flat = tl.where(mask, b * K + win, LAST)
        at = _worst(tl.where(mask, best, -INF), flat, 0)
        here = flat == at
        worst = tl.sum(tl.where(here, best, 0), 0)
        rise_there = tl.sum(tl.where(here, rise, 0), 0)
        if WHOLE:
            _store_worst(worst, rise_there, at, loss, winner, slope, share, K, KP, STATS, SAVE)
        else:
            _put(worst, loss, parts, 0, 1, WHOLE)
            _put(rise_there, slope, parts, SLOPE_ROW, 1, WHOLE)
            tl.store(part_flat + pid, at)
    else:
        scale = total if REDUCTION == MEAN else tl.full((), 1, CD)
        _put(tl.sum(tl.where(mask, best, 0), 0), loss, parts, 0, scale, WHOLE)

    if SAVE and REDUCTION != MIN:
        tl.store(winner + b, win.to(tl.uint8), mask=mask)
        tl.store(slope + b, rise, mask=mask)
    if STATS:
        tl.store(bottleneck + b, win.to(tl.int64), mask=mask)
        bad = tl.sum((mask & (feasible == 0)).to(tl.int32), 0)
        if WHOLE:
            tl.store(finite, bad == 0)
        else:
            _put(bad.to(CD), finite, parts, BAD_ROW, 1, WHOLE)
        if REDUCTION != MIN:
            for k in tl.static_range(K):
                taken = tl.sum((mask & (win == k)).to(tl.int32), 0).to(CD)
                _put(taken, share + k, parts, LEVEL_ROW + K + k, total, WHOLE)


@triton.jit
def _store_worst(
    worst, rise, flat, loss, winner, slope, share,
    K: tl.constexpr, KP: tl.constexpr, STATS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """reduction="min": the one entry that is the loss; its goal has all the share."""
    tl.store(loss, worst)
    if SAVE:
        tl.store(winner, flat)
        tl.store(slope, rise)
    if STATS:
        k = tl.arange(0, KP)
        tl.store(share + k, (flat % K == k).to(worst.dtype), mask=k < K)


@triton.jit
def _sum_row(parts, row, programs, CD: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of one row of partial results, in an order that depends on its length alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, CD)
    start = parts + row.to(tl.int64) * programs
    for at in range(0, programs, BLOCK):
        total += tl.load(start + at + lane, mask=at + lane < programs, other=0)
    return tl.sum(total, 0)


@triton.jit
def finish(
    parts, part_flat, programs, batch, loss, winner, slope, share, level, finite,
    K: tl.constexpr, REDUCTION: tl.constexpr, STATS: tl.constexpr, SAVE: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the partial results of `forward` together. Program 0: the loss; 1: the flag; then K levels and K shares."""
    pid = tl.program_id(0)
    total = tl.full((), batch, CD)
    if pid == 0:
        if REDUCTION == MIN:
            lane = tl.arange(0, BLOCK)
            best = tl.full((BLOCK,), -INF, CD)
            rise = tl.full((BLOCK,), 0, CD)
            flat = tl.full((BLOCK,), LAST, tl.int64)
            for at in range(0, programs, BLOCK):
                used = at + lane < programs
                d = tl.load(parts + at + lane, mask=used, other=-INF)
                # Later programs hold later samples, so an equal one never takes over.
                take = (d > best) | ((d != d) & (best == best))
                best = tl.where(take, d, best)
                flat = tl.where(take, tl.load(part_flat + at + lane, mask=used, other=LAST), flat)
                rise = tl.where(take, tl.load(parts + programs + at + lane, mask=used, other=0), rise)
            where = _worst(best, flat, 0)
            worst = tl.sum(tl.where(flat == where, best, 0), 0)
            rise_there = tl.sum(tl.where(flat == where, rise, 0), 0)
            _store_worst(worst, rise_there, where, loss, winner, slope, share, K, KP, STATS, SAVE)
        elif REDUCTION != NONE:
            value = _sum_row(parts, pid, programs, CD, BLOCK)
            tl.store(loss, _div(value, total) if REDUCTION == MEAN else value)
    elif pid == 1:
        tl.store(finite, _sum_row(parts, pid + 1, programs, CD, BLOCK) == 0)
    else:
        value = _div(_sum_row(parts, pid + 1, programs, CD, BLOCK), total)
        if pid < 2 + K:
            tl.store(level + pid - 2, value)
        elif REDUCTION != MIN:
            tl.store(share + pid - 2 - K, value)


@triton.jit
def _pull(grad, stride, winner, slope, b, mask, batch, K: tl.constexpr, REDUCTION: tl.constexpr, CD: tl.constexpr):
    """(goal that gets the gradient of each sample, or K for none, and that gradient), each [BLOCK]."""
    if REDUCTION == MIN:
        flat = tl.load(winner)
        win = tl.where(b == flat // K, (flat % K).to(tl.int32), K)
        rise = tl.load(slope) + tl.zeros(b.shape, CD)
    else:
        win = tl.load(winner + b, mask=mask, other=K).to(tl.int32)
        rise = tl.load(slope + b, mask=mask, other=0)
    if REDUCTION == NONE:
        pull = tl.load(grad + b * stride, mask=mask, other=0)
    elif REDUCTION == MEAN:
        pull = _div(tl.load(grad), tl.full((), batch, CD))
    else:
        pull = tl.load(grad)
    # A slope of 0 stops an infinite or NaN gradient from above too.
    return win, tl.where(rise == 0, 0, rise * pull)


@triton.jit
def backward_columns(
    grads, grad, stride, winner, slope, parts, batch,
    K: tl.constexpr, SCALARS: tl.constexpr, REDUCTION: tl.constexpr, WHOLE: tl.constexpr,
    CD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dense gradients of K goals. A grad that is None is not wanted; SCALARS[k] >= 0 numbers the 0-dim ones."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    win, pull = _pull(grad, stride, winner, slope, b, mask, batch, K, REDUCTION, CD)
    for k in tl.static_range(K):
        if grads[k] is not None:
            own = tl.where(win == k, pull, 0)
            if SCALARS[k] < 0:
                tl.store(grads[k] + b, own.to(grads[k].dtype.element_ty), mask=mask)
            else:
                value = tl.sum(tl.where(mask, own, 0), 0)
                if WHOLE:
                    tl.store(grads[k], value.to(grads[k].dtype.element_ty))
                else:
                    _put(value, grads[k], parts, SCALARS[k], 1, WHOLE)


@triton.jit
def backward_rows(
    grads, grad, stride, winner, slope, batch,
    K: tl.constexpr, REDUCTION: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The dense gradient of one [B, K] tensor, written row by row."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    win, pull = _pull(grad, stride, winner, slope, b, mask, batch, K, REDUCTION, CD)
    col = tl.arange(0, KP)
    own = tl.where(win[:, None] == col[None, :], pull[:, None], 0)
    cells = mask[:, None] & (col < K)[None, :]
    tl.store(grads + b[:, None] * K + col[None, :], own.to(grads.dtype.element_ty), mask=cells)


@triton.jit
def finish_scalars(grads, parts, programs, COUNT: tl.constexpr, CD: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the 0-dim goals from the parts `backward_columns` left; one program a goal."""
    pid = tl.program_id(0)
    value = _sum_row(parts, pid, programs, CD, BLOCK)
    for j in tl.static_range(COUNT):
        if pid == j:
            tl.store(grads[j], value.to(grads[j].dtype.element_ty))


class Plan(NamedTuple):
    """How a batch is cut: BLOCK samples a program, ``warps`` of threads each."""

    block: int
    warps: int
    programs: int


def plan(batch: int, count: int, rows: bool) -> Plan:
    """The few configurations there are: a batch that one program can take gets one, a larger one gets full tiles."""
    if rows:
        wide = triton.next_power_of_2(count)
        for cells, warps in ((4096, 4), (16384, 16)):
            if batch <= cells // wide:
                return Plan(cells // wide, warps, 1)
        block, warps = 4096 // wide, 4
    else:
        for block, warps in ((128, 4), (1024, 8)) if count > 16 else ((128, 4), (1024, 8), (4096, 16)):
            if batch <= block:
                return Plan(block, warps, 1)
        block, warps = (512, 8) if count > 16 else (1024, 8)
    return Plan(block, warps, triton.cdiv(batch, block))


def _kind(dtype: torch.dtype) -> tl.constexpr:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _is_rows(goals: Sequence[Tensor]) -> bool:
    """Whether goals is one [B, K] tensor whose rows, not columns, lie together."""
    return len(goals) == 1 and goals[0].dim() == 2 and goals[0].stride(1) <= max(goals[0].stride(0), 1)


def launch_forward(
    goals: Sequence[Tensor],
    params: Tensor | None,
    curves: Sequence[int],
    reduction: int,
    stats: bool,
    save: bool,
    batch: int,
    count: int,
    dtype: torch.dtype,
    outputs: Sequence[Tensor],
) -> None:
    """Fills ``outputs``: loss, winner, slope, bottleneck, share, level, finite, as `bomkern._triton` allocates them.

    Args:
        goals: one [B, K] tensor, or K tensors [B] or [].
        params: [K, 4] in the compute dtype ``dtype``, or None where goals are scores.
        save, stats: whether winner and slope, and the last four outputs, are written; else they may be empty.
    """
    loss, winner, slope, bottleneck, share, level, finite = outputs
    rows = _is_rows(goals)
    stride_k = goals[0].stride(1) if rows else 0
    if not rows and goals[0].dim() == 2:
        goals = goals[0].unbind(1)
    block, warps, programs = plan(batch, count, rows)
    codes = tuple(curves) if params is not None else (SCORE.value,) * count
    whole = programs == 1
    apart = not whole and (stats or reduction != NONE.value)
    parts = torch.empty((3 + 2 * count if stats else 2) * programs if apart else 0, dtype=dtype, device=loss.device)
    part_flat = torch.empty(programs if apart and reduction == MIN.value else 0, dtype=torch.int64, device=loss.device)
    shared = dict(K=count, REDUCTION=reduction, STATS=stats, SAVE=save, CD=_kind(dtype))
    shared.update(KP=triton.next_power_of_2(count), enable_fp_fusion=False)
    forward[(programs,)](
        tuple(goals), tuple(g.stride(0) if g.dim() else 0 for g in goals), stride_k, params, batch,
        loss, winner, slope, bottleneck, share, level, finite, parts, part_flat,
        CURVES=codes, CURVE=codes[0] if len(set(codes)) == 1 else MIXED.value,
        WHOLE=whole, ROWS=rows, BLOCK=block, num_warps=warps, **shared,
    )  # fmt: skip
    if apart:
        finish[(2 + 2 * count if stats else 1,)](
            parts, part_flat, programs, batch, loss, winner, slope, share, level, finite,
            BLOCK=1024, num_warps=4, **shared,
        )  # fmt: skip


def launch_backward(
    grads: Sequence[Tensor | None],
    grad: Tensor,
    winner: Tensor,
    slope: Tensor,
    reduction: int,
    batch: int,
    count: int,
) -> None:
    """Fills ``grads``: one [B, K] tensor, or K tensors [B] or [], None where no gradient is wanted.

    Args:
        grad: the gradient of the loss, [B] for reduction "none", else []; the compute dtype.
        winner, slope: as `launch_forward` saved them.
    """
    rows = len(grads) == 1 and grads[0] is not None and grads[0].dim() == 2
    block, warps, programs = plan(batch, count, rows)
    shared = dict(K=count, REDUCTION=reduction, CD=_kind(slope.dtype), enable_fp_fusion=False)
    stride = grad.stride(0) if grad.dim() else 0
    if rows:
        wide = triton.next_power_of_2(count)
        backward_rows[(programs,)](
            grads[0], grad, stride, winner, slope, batch, KP=wide, BLOCK=block, num_warps=warps, **shared
        )
        return
    scalars = [g for g in grads if g is not None and g.dim() == 0]
    numbers, seen = [], 0
    for g in grads:
        numbers.append(seen if g is not None and g.dim() == 0 else -1)
        seen += numbers[-1] >= 0
    apart = programs > 1 and seen > 0
    parts = torch.empty(seen * programs if apart else 0, dtype=slope.dtype, device=slope.device)
    backward_columns[(programs,)](
        tuple(grads), grad, stride, winner, slope, parts, batch,
        SCALARS=tuple(numbers), WHOLE=programs == 1, BLOCK=block, num_warps=warps, **shared,
    )  # fmt: skip
    if apart:
        finish_scalars[(seen,)](
            tuple(scalars), parts, programs, COUNT=seen, CD=_kind(slope.dtype), BLOCK=1024, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
