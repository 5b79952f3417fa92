"""Triton kernels of `goal_set`, and the launchers that choose a configuration for them.

Forward is one launch where the batch fits one program; otherwise each program leaves partial results and a second
launch puts them together in a fixed order (no float atomics, so equal inputs give equal bits). Backward is one launch,
and a second only for 0-dim goals of a batch larger than one program.

A tile has all K columns. What is said of a goal stands at each of its members; where it counts once, at its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import RecordAt
from ..common.triton_matrix import exp_of, kind, options
from ..min_goal.triton import LAST, MEAN, MIN, NONE, SUM, finish_scalars, plan, plan_columns
from ..min_goal.triton import _groups as loads_of
from ..min_goal.triton_score import INF, MIXED, cast, div, load_tile, worst
from .triton_goals import judge_tile, means, present_means
from .triton_parts import max_row, sum_row, worst_of


class PartsAt(NamedTuple):
    """The rows of partial results that follow those of a record up to ``highest``.

    Attributes:
        loss, infeasible: one row each, the second with how many samples have no finite loss.
        taken: K rows, the weights of a tile's worst sample; for "min" alone.
    """

    loss: int
    infeasible: int
    taken: int


@cache
def layouts(goals: int, columns: int) -> tuple[RecordAt, PartsAt]:
    """Return where the parts of a record, and the partial results of a program, begin."""
    at = RecordAt.of(goals, columns)
    end = at.ideal  # of ``highest``
    return at, PartsAt(end, end + 1, end + 2)


@triton.jit
def _put(value, at, record, parts, total, WHOLE: tl.constexpr, mask=None):
    """Value / total to the record where one program has the whole batch, else this program's part, for `finish`."""
    if WHOLE:
        tl.store(record + at, div(value, total), mask=mask)
    else:
        tl.store(parts + at * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value, mask=mask)


@triton.jit
def forward(
    goals, strides, stride_k, table, temperature, multipliers, present, counts, batch,
    loss, bottleneck, record, weight, parts, part_rows,
    K: tl.constexpr, G: tl.constexpr, AT: tl.constexpr, PART: tl.constexpr,
    CURVES: tl.constexpr, CURVE: tl.constexpr, LOADS: tl.constexpr,
    OWNERS: tl.constexpr, SIZES: tl.constexpr, REDUCTION: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK samples: their losses, bottlenecks and weights, and the tile's part of the record.

    AT is the record's `RecordAt`. The tile's partial results are rows up to ``AT.ideal`` and then those of PART.
    """
    pid = tl.program_id(0)
    b = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    total = tl.full((), batch, CD)
    one = tl.full((), 1, CD)
    rows = tl.full((), batch, tl.int64)
    col = tl.arange(0, KP)
    used = col < K
    cells = mask[:, None] & used[None, :]
    values = load_tile(goals, strides, stride_k, b, cells, K, LOADS, CD, KP, BLOCK)
    if present is None:
        d, slope = judge_tile(values, table, used, K, CURVES, CURVE, KP)
        mean, owner, leads, inverse = means(d, K, G, OWNERS, SIZES, CD, KP)
        inverse = inverse[None, :]
        here, there, goal_total, column_total = cells, cells, total, total
        first = leads[None, :]
    else:
        here = cells & (tl.load(present + col[None, :] * rows + b[:, None], mask=cells, other=0) != 0)
        values = tl.where(here, values, 0)
        d, slope = judge_tile(values, table, used, K, CURVES, CURVE, KP)
        mean, owner, leads, inverse, there = present_means(d, here, K, G, OWNERS, SIZES, CD, KP)
        goal_total = tl.load(counts + 1 + owner, mask=used, other=1)
        column_total = tl.load(counts + 1 + G + col, mask=used, other=1)
        total = tl.maximum(tl.load(counts), one)
        first = leads[None, :] & there

    # Here, not at the end: whatever is needed no more leaves registers to what follows.
    level = exp_of(tl.where(mean < 0, 0, -mean))
    _put(tl.sum(tl.where(there, level, 0), 0), AT.level + owner, record, parts, goal_total, WHOLE, leads)
    _put(tl.sum(tl.where(there, mean, 0), 0), AT.deficit + owner, record, parts, goal_total, WHOLE, leads)
    _put(tl.sum(tl.where(here, values, 0), 0), AT.raw + col, record, parts, column_total, WHOLE, used)
    seen = tl.where(here & ((values - values) == 0), values, -INF)
    _put(tl.max(seen, 0), AT.highest + col, record, parts, one, WHOLE, used)

    win = worst(tl.where(first, mean, -INF), owner[None, :], KP, 1)
    some = mask  # samples with a goal
    if present is not None:
        some = tl.sum(tl.where(first, 1, 0), 1) > 0
        win = tl.where(some, win, -1)
    mine = owner[None, :] == win[:, None]
    top = tl.sum(tl.where(mine & leads[None, :], mean, 0), 1)
    finite = (top - top) == 0
    mu = tl.load(temperature) + tl.zeros((BLOCK,), CD)
    soft = finite & (mu > 0)
    apart = tl.where(soft[:, None], mean - top[:, None], 0)
    term = exp_of(div(apart, tl.where(soft, mu, 1)[:, None] + tl.zeros_like(apart)))
    term = tl.where(soft[:, None], term, mine.to(CD))
    if present is not None:
        term = tl.where(there, term, 0)
    sums = tl.sum(tl.where(leads[None, :], term, 0), 1)
    if present is not None:
        sums = tl.where(some, sums, 1)
    share = div(term, sums[:, None] + tl.zeros_like(term))
    per_sample = tl.where(soft, top + mu * tl.log(sums), top)
    given = share  # who gets the gradient; share is as the record counts it
    if multipliers is not None:
        given = tl.load(multipliers + owner, mask=used, other=0)[None, :]
        if present is not None:
            every = tl.sum(tl.where(leads[None, :], given * goal_total[None, :], 0), 1)
            given = tl.where(there, given, 0)
        weighed = tl.where(leads[None, :] & (given != 0), mean * given, 0)  # 0 times an infinite deficit is not 0
        per_sample = tl.where(finite, tl.sum(weighed, 1), top)
        finite = (per_sample - per_sample) == 0
        if present is None or REDUCTION == MIN:
            sums = tl.sum(tl.where(leads[None, :], given, 0), 1)
            share = div(given, tl.where(sums > 0, sums, 1)[:, None] + tl.zeros_like(given))
        else:
            share = div(given * total, tl.where(every > 0, every, 1)[:, None] + tl.zeros_like(given))
        share = tl.where(finite[:, None], share, mine.to(CD))

    part = div(one, total) if REDUCTION == MEAN else one
    pull = tl.where(finite[:, None], given, 0) * (part * inverse)
    if present is not None:
        pull = tl.where(here, pull, 0)
    pull = tl.where(pull == 0, 0, pull * slope)
    counted = leads[None, :] & mask[:, None]

    tl.store(bottleneck + b, win.to(tl.int64), mask=mask)
    if REDUCTION == NONE:
        tl.store(loss + b, per_sample, mask=mask)
    if REDUCTION == MIN:
        row = worst(tl.where(mask & some, per_sample, -INF), b, LAST, 0)
        taking = b == row
        counted = counted & taking[:, None]
        value = tl.sum(tl.where(taking, per_sample, 0), 0)
        if present is not None and not WHOLE:  # a tile without a goal is never the worst; `finish` makes its loss 0
            value = tl.where(tl.sum(tl.where(taking & some, 1, 0), 0) > 0, value, -INF)
        if SAVE:
            taken = tl.sum(tl.where(taking[:, None], pull, 0), 0)
            pull = tl.where(taking[:, None], pull, 0) if WHOLE else tl.zeros_like(pull)  # else `finish` puts it there
        if WHOLE:
            tl.store(loss, value)
        else:
            tl.store(part_rows + pid, row)
            if SAVE:
                _put(taken, PART.taken + col, record, parts, one, WHOLE, used)
        _put(value, AT.loss if WHOLE else PART.loss, record, parts, one, WHOLE)
        _put(tl.sum(tl.where(counted, share, 0), 0), AT.share + owner, record, parts, one, WHOLE, leads)
    else:
        value = tl.sum(tl.where(mask, per_sample, 0), 0)
        if WHOLE and REDUCTION != NONE:
            tl.store(loss, value if REDUCTION == SUM else div(value, total))
        _put(value, AT.loss if WHOLE else PART.loss, record, parts, one if REDUCTION == SUM else total, WHOLE)
        _put(tl.sum(tl.where(counted, share, 0), 0), AT.share + owner, record, parts, total, WHOLE, leads)
    if SAVE:
        tl.store(weight + col[None, :] * rows + b[:, None], pull, mask=cells)

    bad = tl.sum((mask & (finite == 0)).to(tl.int32), 0)
    if WHOLE:
        tl.store(record + AT.finite, (bad == 0).to(CD))
    else:
        _put(bad.to(CD), PART.infeasible, record, parts, one, WHOLE)
    if pid == 0:
        tl.store(record + AT.ideal + col, tl.load(table + 4 * col, mask=used), mask=used)
        tl.store(record + AT.slope + col, tl.load(table + 4 * col + 1, mask=used), mask=used)


@triton.jit(do_not_specialize=["programs", "batch"])
def finish(
    parts, part_rows, programs, batch, counts, loss, record, weight,
    K: tl.constexpr, AT: tl.constexpr, PART: tl.constexpr, REDUCTION: tl.constexpr, SAVE: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the parts of `forward` together: a program to each number of the record that is not a parameter."""
    pid = tl.program_id(0)
    total = tl.full((), batch, tl.float64)
    if counts is not None:
        total = tl.maximum(tl.load(counts).to(tl.float64), 1)
    step = tl.full((), programs, tl.int64)
    row = parts + pid * step
    if pid < AT.highest:
        if REDUCTION == MIN and pid < AT.level:  # a share
            value = tl.load(row + worst_of(parts + PART.loss * step, programs, BLOCK))
        else:
            over = total
            if counts is not None and pid >= AT.level:  # by each goal's samples, and by each column's
                at = pid - AT.level
                if pid >= AT.deficit:
                    at = pid - AT.deficit
                if pid >= AT.raw:
                    at = pid - AT.raw + AT.level
                over = tl.load(counts + 1 + at).to(tl.float64)
            value = sum_row(row, programs, BLOCK) / over
        tl.store(record + pid, value.to(CD))
    elif pid < PART.loss:
        tl.store(record + pid, max_row(row, programs, BLOCK).to(CD))
    elif pid == PART.loss:
        if REDUCTION == MIN:
            program = worst_of(row, programs, BLOCK)
            value = tl.load(row + program)
            if counts is not None:
                value = tl.where(value == -INF, 0, value)
            if SAVE:
                col = tl.arange(0, KP)
                taken = tl.load(parts + (PART.taken + col) * step + program, mask=col < K)
                at = weight + col * tl.full((), batch, tl.int64) + tl.load(part_rows + program)
                tl.store(at, taken.to(CD), mask=col < K)
        elif REDUCTION == SUM:
            value = sum_row(row, programs, BLOCK)
        else:
            value = sum_row(row, programs, BLOCK) / total
        if REDUCTION != NONE:
            tl.store(loss, value.to(CD))
        tl.store(record + AT.loss, value.to(CD))
    else:
        tl.store(record + AT.finite, (sum_row(row, programs, BLOCK) == 0).to(CD))


@triton.jit
def _times(weight, grad):
    """A weight of 0 stops an infinite or NaN gradient from above."""
    return tl.where(weight == 0, 0, weight * grad)


@triton.jit
def backward_columns(
    grads, grad, stride, weight, parts, batch,
    K: tl.constexpr, SCALARS: tl.constexpr, WHOLE: tl.constexpr, CD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of K goals. A grad that is None is not wanted; SCALARS[k] >= 0 numbers the 0-dim ones."""
    pid = tl.program_id(0)
    b = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    rows = tl.full((), batch, tl.int64)
    above = tl.load(grad + b * stride, mask=mask, other=0)
    for k in tl.static_range(K):
        if grads[k] is not None:
            own = _times(tl.load(weight + k * rows + b, mask=mask, other=0), above)
            if SCALARS[k] < 0:
                tl.store(grads[k] + b, cast(own, grads[k].dtype.element_ty), mask=mask)
            else:
                value = tl.sum(own.to(tl.float64), 0)
                if WHOLE:
                    tl.store(grads[k], cast(value, grads[k].dtype.element_ty))
                else:
                    tl.store(parts + SCALARS[k] * tl.num_programs(0).to(tl.int64) + pid, value)


@triton.jit
def backward_rows(
    grads, grad, stride, weight, batch, K: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of one [B, K] tensor, written row by row."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < batch
    col = tl.arange(0, KP)
    cells = mask[:, None] & (col < K)[None, :]
    above = tl.load(grad + b * stride, mask=mask, other=0)
    share = tl.load(weight + col[None, :] * tl.full((), batch, tl.int64) + b[:, None], mask=cells, other=0)
    own = _times(share, above[:, None])
    tl.store(grads + b[:, None] * K + col[None, :], cast(own, grads.dtype.element_ty), mask=cells)


class Outputs(NamedTuple):
    loss: Tensor
    bottleneck: Tensor
    record: Tensor
    weight: Tensor


def launch_forward(
    goals: Sequence[Tensor],
    params: Tensor,
    curves: Sequence[int],
    groups: Sequence[int],
    temperature: Tensor,
    reduction: int,
    multipliers: Tensor | None,
    present: Tensor | None,
    counts: Tensor | None,
    out: Outputs,
) -> None:
    """Fills ``out``; its weight may have no elements. ``goals``: one [B, K] tensor, or K tensors [B] or []."""
    batch, count = out.bottleneck.shape[0], len(curves)
    loss, bottleneck, record, weight = out
    matrix, save, made = goals[0].dim() == 2, weight.numel() > 0, groups[-1] + 1
    at, part = layouts(made, count)
    block, warps, programs = plan(batch, count)
    if present is not None:  # a mask takes registers: half as many cells a thread
        block, warps = (1024 if count <= 32 else 512) // triton.next_power_of_2(count), 8
        programs = triton.cdiv(batch, block)
    whole = programs == 1
    # In double: there may be thousands of them.
    rows = 0 if whole else part.taken + (count if save and reduction == MIN.value else 0)
    parts = torch.empty(rows * programs, dtype=torch.float64, device=loss.device)
    part_rows = torch.empty(0 if whole else programs, dtype=torch.int64, device=loss.device)
    owners = tuple(groups) if made < count else None
    shared = dict(K=count, AT=at, PART=part, REDUCTION=reduction, SAVE=save, KP=triton.next_power_of_2(count))
    shared.update(options(record.dtype))
    forward[(programs,)](
        tuple(goals), tuple(g.stride(0) if g.dim() else 0 for g in goals), goals[0].stride(1) if matrix else 0,
        params, temperature, multipliers, present, counts, batch, loss, bottleneck, record, weight, parts, part_rows,
        G=made, CURVES=tuple(curves), CURVE=curves[0] if len(set(curves)) == 1 else MIXED.value,
        LOADS=None if matrix else loads_of(goals), OWNERS=owners,
        SIZES=owners and tuple(owners.count(g) for g in range(made)),
        WHOLE=whole, BLOCK=block, num_warps=warps, **shared,
    )  # fmt: skip
    if not whole:
        finish[(part.taken,)](
            parts, part_rows, programs, batch, counts, loss, record, weight, BLOCK=1024, num_warps=4, **shared
        )


def launch_backward(grads: Sequence[Tensor | None], grad: Tensor, weight: Tensor) -> None:
    """Fills ``grads``: one [B, K] tensor, or K tensors [B] or [], None where no gradient is wanted.

    Args:
        grad: the gradient of the loss, [B] or [], in the compute dtype.
        weight: [K, B], as `launch_forward` made it.
    """
    count, batch = weight.shape
    stride = grad.stride(0) if grad.dim() else 0
    shared = dict(K=count, **options(weight.dtype))
    if grads[0] is not None and grads[0].dim() == 2:
        block, warps, programs = plan(batch, count)
        wide = triton.next_power_of_2(count)
        backward_rows[(programs,)](
            grads[0], grad, stride, weight, batch, KP=wide, BLOCK=block, num_warps=warps, **shared
        )
        return
    block, warps, programs = plan_columns(batch)
    scalars = [k for k, g in enumerate(grads) if g is not None and g.dim() == 0]
    apart = programs > 1 and len(scalars) > 0
    parts = torch.empty(len(scalars) * programs if apart else 0, dtype=torch.float64, device=weight.device)
    backward_columns[(programs,)](
        tuple(grads), grad, stride, weight, parts, batch,
        SCALARS=tuple(scalars.index(k) if k in scalars else -1 for k in range(count)),
        WHOLE=programs == 1, BLOCK=block, num_warps=warps, **shared,
    )  # fmt: skip
    if apart:
        finish_scalars[(len(scalars),)](
            tuple(grads[k] for k in scalars), parts, programs, COUNT=len(scalars), CD=kind(torch.float64), BLOCK=1024,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
