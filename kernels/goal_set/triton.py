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
from ..min_goal.triton_score import INF, MIXED, cast, div, judge, load_tile, worst


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
def _judge(values, table, used, K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, KP: tl.constexpr):
    """Deficits and slopes of a [BLOCK, KP] tile."""
    col = tl.arange(0, KP)
    at = table + 4 * col
    center = tl.load(at, mask=used, other=0)[None, :]
    right = tl.load(at + 1, mask=used, other=0)[None, :]
    left = tl.load(at + 2, mask=used, other=0)[None, :]
    tail = tl.load(at + 3, mask=used, other=1)[None, :]
    code = tl.full((KP,), CURVE, tl.int32)
    if CURVE == MIXED:
        for k in tl.static_range(K):
            code = tl.where(col == k, CURVES[k], code)
    d, _, num, den = judge(values, center, right, left, tail, code[None, :], False)
    return d, div(num, den)


@triton.jit
def _means(
    d, K: tl.constexpr, G: tl.constexpr, OWNERS: tl.constexpr, SIZES: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr
):
    """Return the mean deficit of each column's goal [BLOCK, KP], and for each column [KP] that goal, whether it is the
    goal's first member, and 1 over the number of its members.
    """
    col = tl.arange(0, KP)
    if OWNERS is None:  # each column is a goal
        return d, col, col < K, tl.full((KP,), 1, CD)
    else:
        owner = tl.full((KP,), G, tl.int32)
        leads = col == 0
        inverse = tl.full((KP,), 1, CD)
        for k in tl.static_range(K):
            owner = tl.where(col == k, OWNERS[k], owner)
            inverse = tl.where(col == k, div(tl.full((), 1, CD), tl.full((), SIZES[OWNERS[k]], CD)), inverse)
            if k > 0 and OWNERS[k] != OWNERS[k - 1]:
                leads = leads | (col == k)
        mean = d
        for g in tl.static_range(G):
            if SIZES[g] > 1:
                mine = (owner == g)[None, :]
                total = tl.sum(tl.where(mine, d * inverse[None, :], 0), 1)
                mean = tl.where(mine, total[:, None], mean)
        return mean, owner, leads, inverse


@triton.jit
def _put(value, at, record, parts, total, WHOLE: tl.constexpr, mask=None):
    """Value / total to the record where one program has the whole batch, else this program's part, for `finish`."""
    if WHOLE:
        tl.store(record + at, div(value, total), mask=mask)
    else:
        tl.store(parts + at * tl.num_programs(0).to(tl.int64) + tl.program_id(0), value, mask=mask)


@triton.jit
def forward(
    goals, strides, stride_k, table, temperature, multipliers, batch,
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
    d, slope = _judge(values, table, used, K, CURVES, CURVE, KP)
    mean, owner, leads, inverse = _means(d, K, G, OWNERS, SIZES, CD, KP)

    # Here, not at the end: whatever is needed no more leaves registers to what follows.
    _put(tl.sum(tl.where(cells, exp_of(-mean), 0), 0), AT.level + owner, record, parts, total, WHOLE, leads)
    _put(tl.sum(tl.where(cells, mean, 0), 0), AT.deficit + owner, record, parts, total, WHOLE, leads)
    _put(tl.sum(tl.where(cells, values, 0), 0), AT.raw + col, record, parts, total, WHOLE, used)
    seen = tl.where(cells & ((values - values) == 0), values, -INF)
    _put(tl.max(seen, 0), AT.highest + col, record, parts, one, WHOLE, used)

    win = worst(tl.where(leads[None, :], mean, -INF), owner[None, :], KP, 1)
    mine = owner[None, :] == win[:, None]
    top = tl.sum(tl.where(mine & leads[None, :], mean, 0), 1)
    finite = (top - top) == 0
    mu = tl.load(temperature) + tl.zeros((BLOCK,), CD)
    soft = finite & (mu > 0)
    apart = tl.where(soft[:, None], mean - top[:, None], 0)
    term = exp_of(div(apart, tl.where(soft, mu, 1)[:, None] + tl.zeros_like(apart)))
    term = tl.where(soft[:, None], term, mine.to(CD))
    sums = tl.sum(tl.where(leads[None, :], term, 0), 1)
    share = div(term, sums[:, None] + tl.zeros_like(term))
    per_sample = tl.where(soft, top + mu * tl.log(sums), top)
    given = share  # who gets the gradient; share is as the record counts it
    if multipliers is not None:
        given = tl.load(multipliers + owner, mask=used, other=0)[None, :]
        weighed = tl.where(leads[None, :] & (given != 0), mean * given, 0)  # 0 times an infinite deficit is not 0
        per_sample = tl.where(finite, tl.sum(weighed, 1), top)
        finite = (per_sample - per_sample) == 0
        sums = tl.sum(tl.where(leads[None, :], given, 0), 1)
        share = div(given, tl.where(sums > 0, sums, 1)[:, None] + tl.zeros_like(given))
        share = tl.where(finite[:, None], share, mine.to(CD))

    part = div(one, total) if REDUCTION == MEAN else one
    pull = tl.where(finite[:, None], given, 0) * (part * inverse)[None, :]
    pull = tl.where(pull == 0, 0, pull * slope)
    counted = leads[None, :] & mask[:, None]

    tl.store(bottleneck + b, win.to(tl.int64), mask=mask)
    if REDUCTION == NONE:
        tl.store(loss + b, per_sample, mask=mask)
    if REDUCTION == MIN:
        row = worst(tl.where(mask, per_sample, -INF), b, LAST, 0)
        here = b == row
        counted = counted & here[:, None]
        value = tl.sum(tl.where(here, per_sample, 0), 0)
        if SAVE:
            taken = tl.sum(tl.where(here[:, None], pull, 0), 0)
            pull = tl.where(here[:, None], pull, 0) if WHOLE else tl.zeros_like(pull)  # else `finish` puts it there
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


@triton.jit
def _sum_row(row, programs, BLOCK: tl.constexpr):
    """Sum of one row of parts, in an order that depends on its length alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, tl.float64)
    at = 0
    while at < programs:
        total += tl.load(row + at + lane, mask=at + lane < programs, other=0)
        at += BLOCK
    return tl.sum(total, 0)


@triton.jit
def _max_row(row, programs, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -INF, tl.float64)
    at = 0
    while at < programs:
        most = tl.maximum(most, tl.load(row + at + lane, mask=at + lane < programs, other=-INF))
        at += BLOCK
    return tl.max(most, 0)


@triton.jit
def _worst_of(row, programs, BLOCK: tl.constexpr):
    """The program whose sample is the worst: later ones hold later samples, so an equal one never takes over."""
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -INF, tl.float64)
    program = tl.full((BLOCK,), LAST, tl.int64)
    at = 0
    while at < programs:
        value = tl.load(row + at + lane, mask=at + lane < programs, other=-INF)
        take = (value > most) | ((value != value) & (most == most))
        most = tl.where(take, value, most)
        program = tl.where(take, at + lane, program)
        at += BLOCK
    return worst(most, program, LAST, 0)


@triton.jit(do_not_specialize=["programs", "batch"])
def finish(
    parts, part_rows, programs, batch, loss, record, weight,
    K: tl.constexpr, AT: tl.constexpr, PART: tl.constexpr, REDUCTION: tl.constexpr, SAVE: tl.constexpr,
    CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the parts of `forward` together: a program to each number of the record that is not a parameter."""
    pid = tl.program_id(0)
    total = tl.full((), batch, tl.float64)
    step = tl.full((), programs, tl.int64)
    row = parts + pid * step
    if pid < AT.highest:
        if REDUCTION == MIN and pid < AT.level:  # a share
            value = tl.load(row + _worst_of(parts + PART.loss * step, programs, BLOCK))
        else:
            value = _sum_row(row, programs, BLOCK) / total
        tl.store(record + pid, value.to(CD))
    elif pid < PART.loss:
        tl.store(record + pid, _max_row(row, programs, BLOCK).to(CD))
    elif pid == PART.loss:
        if REDUCTION == MIN:
            program = _worst_of(row, programs, BLOCK)
            value = tl.load(row + program)
            if SAVE:
                col = tl.arange(0, KP)
                taken = tl.load(parts + (PART.taken + col) * step + program, mask=col < K)
                at = weight + col * tl.full((), batch, tl.int64) + tl.load(part_rows + program)
                tl.store(at, taken.to(CD), mask=col < K)
        elif REDUCTION == SUM:
            value = _sum_row(row, programs, BLOCK)
        else:
            value = _sum_row(row, programs, BLOCK) / total
        if REDUCTION != NONE:
            tl.store(loss, value.to(CD))
        tl.store(record + AT.loss, value.to(CD))
    else:
        tl.store(record + AT.finite, (_sum_row(row, programs, BLOCK) == 0).to(CD))


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
    out: Outputs,
) -> None:
    """Fills ``out``; its weight may have no elements. ``goals``: one [B, K] tensor, or K tensors [B] or []."""
    batch, count = out.bottleneck.shape[0], len(curves)
    loss, bottleneck, record, weight = out
    matrix, save, made = goals[0].dim() == 2, weight.numel() > 0, groups[-1] + 1
    at, part = layouts(made, count)
    block, warps, programs = plan(batch, count)
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
        params, temperature, multipliers, batch, loss, bottleneck, record, weight, parts, part_rows,
        G=made, CURVES=tuple(curves), CURVE=curves[0] if len(set(curves)) == 1 else MIXED.value,
        LOADS=None if matrix else loads_of(goals), OWNERS=owners,
        SIZES=owners and tuple(owners.count(g) for g in range(made)),
        WHOLE=whole, BLOCK=block, num_warps=warps, **shared,
    )  # fmt: skip
    if not whole:
        finish[(part.taken,)](
            parts, part_rows, programs, batch, loss, record, weight, BLOCK=1024, num_warps=4, **shared
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
