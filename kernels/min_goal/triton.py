"""Triton kernels of `min_goal`, and the launchers that choose a configuration for them.

Forward is one launch where a sample's loss is all that is asked for, or where the batch fits one program; otherwise
each program leaves partial results and a second launch puts them together in a fixed order (no float atomics, so equal
inputs give equal bits). Backward is one launch, and a second only for 0-dim goals of a batch larger than one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.reductions import Reduction
from .triton_score import INF, MIXED, SCORE, cast, div, load_tile, scan, worst

NONE = tl.constexpr(int(Reduction.NONE))
MEAN = tl.constexpr(int(Reduction.MEAN))
SUM = tl.constexpr(int(Reduction.SUM))
MIN = tl.constexpr(int(Reduction.MIN))
# Rows of the partial results [rows, programs]: loss or worst deficit, slope there, infeasible samples, level, share.
SLOPE_ROW = tl.constexpr(1)
BAD_ROW = tl.constexpr(2)
LEVEL_ROW = tl.constexpr(3)

LAST = tl.constexpr(2**63 - 1)  # after every flat index


@triton.jit
def _put(value, out, parts, row, total, WHOLE: tl.constexpr, mask=None):
    """Value / total where one program has the whole batch, else this program's part of it, for `finish`."""
    if WHOLE:
        tl.store(out, div(value, total), mask=mask)
    else:
        tl.store(parts + row * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value, mask=mask)


@triton.jit
def forward(
    goals, strides, stride_k, table, batch,
    loss, winner, slope, bottleneck, share, level, finite, parts, part_flat,
    K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, REDUCTION: tl.constexpr,
    GROUPS: tl.constexpr, STATS: tl.constexpr, SAVE: tl.constexpr, WHOLE: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK samples: the bottleneck of each, and of the tile what the reduction and the statistics need."""
    pid = tl.program_id(0)
    b = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    total = tl.full((), batch, CD)
    cells = mask[:, None] & (tl.arange(0, KP) < K)[None, :]
    values = load_tile(goals, strides, stride_k, b, cells, K, GROUPS, CD, KP, BLOCK)
    best, win, num, den, levels = scan(values, table, cells, K, CURVES, CURVE, CD, KP)
    feasible = best < INF  # False for NaN too
    rise = tl.where(feasible, div(num, den), 0)

    if REDUCTION == NONE:
        tl.store(loss + b, best, mask=mask)
    elif REDUCTION == MIN:
        flat = tl.where(mask, b * K + win, LAST)
        at = worst(tl.where(mask, best, -INF), flat, LAST, 0)
        here = flat == at
        most = tl.sum(tl.where(here, best, 0), 0)
        rise_there = tl.sum(tl.where(here, rise, 0), 0)
        if WHOLE:
            _store_worst(most, rise_there, at, loss, winner, slope, share, K, KP, STATS, SAVE)
        else:
            _put(most, loss, parts, 0, 1, WHOLE)
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
        k = tl.arange(0, KP)
        _put(levels, level + k, parts, LEVEL_ROW + k, total, WHOLE, k < K)
        if REDUCTION != MIN:
            taken = tl.sum(((k[:, None] == win[None, :]) & mask[None, :]).to(tl.int32), 1).to(CD)
            _put(taken, share + k, parts, LEVEL_ROW + K + k, total, WHOLE, k < K)


@triton.jit
def _store_worst(
    most, rise, flat, loss, winner, slope, share,
    K: tl.constexpr, KP: tl.constexpr, STATS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """reduction="min": the one entry that is the loss; its goal has all the share."""
    tl.store(loss, most)
    if SAVE:
        tl.store(winner, flat)
        tl.store(slope, rise)
    if STATS:
        k = tl.arange(0, KP)
        tl.store(share + k, (flat % K == k).to(most.dtype), mask=k < K)


@triton.jit
def _sum_row(parts, row, programs, CD: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of one row of partial results, in an order that depends on its length alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, CD)
    start = parts + row.to(tl.int64) * programs
    at = 0
    while at < programs:
        total += tl.load(start + at + lane, mask=at + lane < programs, other=0)
        at += BLOCK
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs", "batch"])
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
            at = 0
            while at < programs:
                used = at + lane < programs
                d = tl.load(parts + at + lane, mask=used, other=-INF)
                # Later programs hold later samples, so an equal one never takes over.
                take = (d > best) | ((d != d) & (best == best))
                best = tl.where(take, d, best)
                flat = tl.where(take, tl.load(part_flat + at + lane, mask=used, other=LAST), flat)
                rise = tl.where(take, tl.load(parts + programs + at + lane, mask=used, other=0), rise)
                at += BLOCK
            where = worst(best, flat, LAST, 0)
            most = tl.sum(tl.where(flat == where, best, 0), 0)
            rise_there = tl.sum(tl.where(flat == where, rise, 0), 0)
            _store_worst(most, rise_there, where, loss, winner, slope, share, K, KP, STATS, SAVE)
        elif REDUCTION != NONE:
            value = _sum_row(parts, pid, programs, CD, BLOCK)
            tl.store(loss, div(value, total) if REDUCTION == MEAN else value)
    elif pid == 1:
        tl.store(finite, _sum_row(parts, pid + 1, programs, CD, BLOCK) == 0)
    else:
        value = div(_sum_row(parts, pid + 1, programs, CD, BLOCK), total)
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
        pull = div(tl.load(grad), tl.full((), batch, CD))
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
                tl.store(grads[k] + b, cast(own, grads[k].dtype.element_ty), mask=mask)
            else:
                value = tl.sum(tl.where(mask, own, 0), 0)
                if WHOLE:
                    tl.store(grads[k], cast(value, grads[k].dtype.element_ty))
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
    tl.store(grads + b[:, None] * K + col[None, :], cast(own, grads.dtype.element_ty), mask=cells)


@triton.jit(do_not_specialize=["programs"])
def finish_scalars(grads, parts, programs, COUNT: tl.constexpr, CD: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the 0-dim goals from the parts `backward_columns` left; one program a goal."""
    pid = tl.program_id(0)
    value = _sum_row(parts, pid, programs, CD, BLOCK)
    for j in tl.static_range(COUNT):
        if pid == j:
            tl.store(grads[j], cast(value, grads[j].dtype.element_ty))


class Plan(NamedTuple):
    """The division of a batch: ``block`` samples a program, each with ``warps`` warps."""

    block: int
    warps: int
    programs: int


def plan(batch: int, count: int) -> Plan:
    """The few configurations there are: one program for a batch that fits it, full tiles of cells for a larger one."""
    wide = triton.next_power_of_2(count)
    for cells, warps in ((1024, 4), (4096, 16)):
        if batch <= cells // wide:
            return Plan(cells // wide, warps, 1)
    return Plan(2048 // wide, 8, triton.cdiv(batch, 2048 // wide))


def plan_columns(batch: int) -> Plan:
    """As `plan`, for the kernel that takes one goal after another."""
    for block, warps in ((128, 4), (1024, 8)):
        if batch <= block:
            return Plan(block, warps, 1)
    return Plan(1024, 8, triton.cdiv(batch, 1024))


def _kind(dtype: torch.dtype) -> tl.constexpr:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _groups(goals: Sequence[Tensor]) -> tuple[tuple[int, bool, bool], ...]:
    """For each goal (group, whether it is the group's first, whether its samples are adjacent), see `load_tile`."""
    seen: dict[tuple[torch.dtype, bool], int] = {}
    out = []
    for goal in goals:
        key = (goal.dtype, goal.dim() == 1 and goal.stride(0) == 1)
        first = key not in seen
        out.append((seen.setdefault(key, len(seen)), first, key[1]))
    return tuple(out)


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
    """Fills ``outputs``: loss, winner, slope, bottleneck, share, level, finite, as its caller allocates them.

    Args:
        goals: one [B, K] tensor, or K tensors [B] or [].
        params: [K, 4] in the compute dtype ``dtype``, or None where goals are scores.
        save, stats: whether winner and slope, and the last four outputs, are written; else they may be empty.
    """
    loss, winner, slope, bottleneck, share, level, finite = outputs
    one = goals[0].dim() == 2
    block, warps, programs = plan(batch, count)
    codes = tuple(curves) if params is not None else (SCORE.value,) * count
    whole = programs == 1
    apart = not whole and (stats or reduction != NONE.value)
    parts = torch.empty((3 + 2 * count if stats else 2) * programs if apart else 0, dtype=dtype, device=loss.device)
    part_flat = torch.empty(programs if apart and reduction == MIN.value else 0, dtype=torch.int64, device=loss.device)
    shared = dict(K=count, REDUCTION=reduction, STATS=stats, SAVE=save, CD=_kind(dtype))
    shared.update(KP=triton.next_power_of_2(count), enable_fp_fusion=False)
    forward[(programs,)](
        tuple(goals), tuple(g.stride(0) if g.dim() else 0 for g in goals),
        goals[0].stride(1) if one else 0, params, batch,
        loss, winner, slope, bottleneck, share, level, finite, parts, part_flat,
        CURVES=codes, CURVE=codes[0] if len(set(codes)) == 1 else MIXED.value,
        GROUPS=None if one else _groups(goals), WHOLE=whole, BLOCK=block, num_warps=warps, **shared,
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
    block, warps, programs = plan(batch, count) if rows else plan_columns(batch)
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
