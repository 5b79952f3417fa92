"""The arithmetic of `min_goal` in Triton: deficits, their slopes, and the worst of them.

NaN and ties are spelled out with ``where``: Triton's own ``max`` and ``argmax`` skip NaN, and promise no order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# bomkern.constraints' curve codes, then two of our own: inputs that are scores already, and a mix of curves.
LINEAR = tl.constexpr(0)
HARD = tl.constexpr(1)
BARRIER = tl.constexpr(2)
SCORE = tl.constexpr(3)
MIXED = tl.constexpr(4)

INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(2.0**-126)  # smallest normal float32


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype; float64 and half types go through float32, because not every backend converts directly."""
    if x.dtype == dtype:
        return x
    else:
        return x.to(tl.float32).to(dtype)


@triton.jit
def div(a, b):
    """a / b, correctly rounded: Triton's own float32 division is up to two units off."""
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
def _judge_score(x):
    d = tl.where(x <= 0, INF, -_log(x))
    return d, x, tl.full(x.shape, -1, x.dtype), x


@triton.jit
def _judge_raw(x, center, right, left, tail, code):
    u = x - center
    flat = tl.where(right == left, right, 0)
    s = tl.where(u > 0, right, tl.where(u < 0, left, flat))
    r = tl.where((s == 0) & (u == u), 0, u * s)

    # One log serves both curves that need one: log(1 + y), with what rounding lost in 1 + y put back to first order.
    hard = code == HARD
    inside = (code == BARRIER) & (r <= 1 - tail) & (r < 1)  # 1 - tail may round to 1
    outside = (code == BARRIER) & (inside == 0)
    far = hard & (tl.abs(r) > 1e8)  # 1 + r^2 overflows further out; from here on it is r^2 to the last bit
    y = tl.where(hard & (far == 0), r * r, tl.where(inside, -r, 0))
    p = 1 + y
    log = tl.log(tl.where(far, tl.abs(r), p)) + (y - (p - 1)) / p
    bound = tl.where(outside, tail, 1)  # other curves' tail is 0
    ramp = tl.where(outside, div(r - 1 + tail, bound), r)

    d = tl.where(inside, -log, tl.where(hard, tl.where(far, 2 * log, log), ramp - tl.log(bound)))
    below = tl.exp(-ramp)
    score = tl.where(inside, p, tl.where(hard, tl.where(far, 0, 1 / p), tl.where(outside, bound * below, below)))
    num = tl.where(hard, tl.where(far, 2 * s, 2 * r * s), s)
    den = tl.where(far, r, tl.where(hard | inside, p, tl.where(outside, bound, 1)))
    return d, score, num, den


@triton.jit
def judge(x, center, right, left, tail, code, IS_SCORE: tl.constexpr):
    """(deficit, score, num, den) of raw values, where num / den is the deficit's slope; see `bomkern.constraints`.

    ``code`` is an int32 tensor; where it is a constant the compiler drops the other curves. An infeasible entry, one
    with deficit inf, scores 0; a value that beats its ideal scores 1.
    """
    if IS_SCORE:
        d, score, num, den = _judge_score(x)
    else:
        d, score, num, den = _judge_raw(x, center, right, left, tail, code)
    d = tl.where(d == -INF, INF, d)
    return d, tl.where(d == INF, 0, tl.where(score > 1, 1, score)), num, den


@triton.jit
def worst(d, index, last: tl.constexpr, axis: tl.constexpr):
    """Lowest ``index`` (all below ``last``) of the largest ``d`` along ``axis``; a NaN is worse than all.

    Lanes that hold no goal are -inf, which no deficit is.
    """
    nan = (d != d).to(tl.int32)
    any_nan = tl.max(nan, axis, keep_dims=True)
    top = tl.max(tl.where(nan > 0, -INF, d), axis, keep_dims=True)
    hit = tl.where(any_nan > 0, nan, (d == top).to(tl.int32))
    return tl.min(tl.where(hit > 0, index, last), axis)


@triton.jit
def load_tile(
    goals, strides, stride_k, b, cells,
    K: tl.constexpr, GROUPS: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK, KP] values, from one [B, K] tensor (GROUPS is None) or from K separate tensors.

    The K pointers become a vector of addresses, one load for each group of goals that share a dtype and whether their
    samples are adjacent. GROUPS[k] is (group, whether k is its first goal, whether adjacent).
    """
    col = tl.arange(0, KP)
    if GROUPS is None:
        apart = col.to(tl.int64) * stride_k  # of a [K, B] tensor's transpose: K B may pass 2^31
        values = cast(tl.load(goals[0] + b[:, None] * strides[0] + apart[None, :], mask=cells, other=1), CD)
    else:
        address = tl.full((KP,), 0, tl.int64)
        step = tl.full((KP,), 0, tl.int64)
        group = tl.full((KP,), 0, tl.int32)
        for k in tl.static_range(K):
            address = tl.where(col == k, goals[k].to(tl.int64), address)
            step = tl.where(col == k, strides[k], step)
            group = tl.where(col == k, GROUPS[k][0], group)
        values = tl.full((BLOCK, KP), 1, CD)
        for k in tl.static_range(K):
            if GROUPS[k][1]:
                mine = (group == GROUPS[k][0])[None, :]
                start = address.to(tl.pointer_type(goals[k].dtype.element_ty))[None, :]
                at = start + b[:, None] if GROUPS[k][2] else start + b[:, None] * step[None, :]
                values = tl.where(mine, cast(tl.load(at, mask=cells & mine, other=1), CD), values)
    return values


@triton.jit
def scan(
    values, table, cells,
    K: tl.constexpr, CURVES: tl.constexpr, CURVE: tl.constexpr, CD: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Bottleneck of each row of a [BLOCK, KP] tile: deficit, winner, num, den [BLOCK], and the sum of scores [KP]."""
    col = tl.arange(0, KP)
    used = col < K
    if CURVE == SCORE:
        d, score, _, _ = judge(values, 0, 0, 0, 0, 0, True)
        # Scores are compared as they are: of two that are close the logarithms may round to the same.
        rank = tl.where((values > 0) & (d < INF), -values, d)
    else:
        at = table + 4 * col
        center = tl.load(at, mask=used, other=0)[None, :]
        right = tl.load(at + 1, mask=used, other=0)[None, :]
        left = tl.load(at + 2, mask=used, other=0)[None, :]
        tail = tl.load(at + 3, mask=used, other=1)[None, :]
        if CURVE == MIXED:
            code = tl.full((KP,), 0, tl.int32)
            for k in tl.static_range(K):
                code = tl.where(col == k, CURVES[k], code)
        else:
            code = tl.full((KP,), CURVE, tl.int32)
        d, score, _, _ = judge(values, center, right, left, tail, code[None, :], False)
        rank = d
    winner = worst(tl.where(used[None, :], rank, -INF), col[None, :], KP, 1)
    levels = tl.sum(tl.where(cells, score, 0), 0)
    # The winner's own value, judged once more: cheaper than carrying num and den for every cell.
    mine = col[None, :] == winner[:, None]
    own = tl.sum(tl.where(mine, values, 0), 1)
    if CURVE == SCORE:
        best, _, num, den = judge(own, 0, 0, 0, 0, 0, True)
    else:
        if CURVE == MIXED:
            own_code = tl.sum(tl.where(mine, code[None, :], 0), 1)
        else:
            own_code = tl.full(own.shape, CURVE, tl.int32)
        at = table + 4 * winner
        best, _, num, den = judge(own, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), own_code, False)
    return best, winner, num, den, levels
