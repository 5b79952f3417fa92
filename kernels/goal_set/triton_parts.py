"""Reductions of one row of partial results, in a fixed order, for the Triton kernels of `goal_set`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..min_goal.triton import LAST
from ..min_goal.triton_score import INF, worst


@triton.jit
def sum_row(row, programs, BLOCK: tl.constexpr):
    """Sum of one row of parts, in an order that depends on its length alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0, tl.float64)
    at = 0
    while at < programs:
        total += tl.load(row + at + lane, mask=at + lane < programs, other=0)
        at += BLOCK
    return tl.sum(total, 0)


@triton.jit
def max_row(row, programs, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -INF, tl.float64)
    at = 0
    while at < programs:
        most = tl.maximum(most, tl.load(row + at + lane, mask=at + lane < programs, other=-INF))
        at += BLOCK
    return tl.max(most, 0)


@triton.jit
def worst_of(row, programs, BLOCK: tl.constexpr):
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
