"""Deficits of a tile of raw values, and the means of their goals, for the Triton kernels of `goal_set`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..min_goal.triton_score import MIXED, div, judge


@triton.jit
def judge_tile(values, table, used, K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, KP: tl.constexpr):
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
def means(
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
def present_means(
    d, here, K: tl.constexpr, G: tl.constexpr, OWNERS: tl.constexpr, SIZES: tl.constexpr, CD: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Return `means` over the members that are present, ``here`` [BLOCK, KP], with the last as [BLOCK, KP]; and whether
    the goal is there, [BLOCK, KP].
    """
    d = tl.where(here, d, 0)
    mean, owner, leads, _ = means(d, K, G, OWNERS, SIZES, CD, KP)
    members = here.to(CD)
    if OWNERS is not None:
        for g in tl.static_range(G):
            if SIZES[g] > 1:
                mine = (owner == g)[None, :]
                count = tl.sum(tl.where(mine & here, 1, 0).to(CD), 1)
                members = tl.where(mine, count[:, None], members)
                part = div(tl.full(count.shape, 1, CD), tl.where(count > 0, count, 1))
                total = tl.sum(tl.where(mine, d * part[:, None], 0), 1)
                mean = tl.where(mine, total[:, None], mean)
    each = div(tl.full(members.shape, 1, CD), tl.where(members > 0, members, 1))
    return mean, owner, leads, each, members > 0
