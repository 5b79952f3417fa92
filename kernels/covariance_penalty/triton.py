"""Triton kernels of `covariance_penalty` around a library's matrix products, and the launchers.

With u a column less its mean and x = u * inverse, inverse = 1 / deviation (0 of a constant column) or 1, S = x'x and
O = S with a diagonal of zeros:
  part_b = c x_b . y_b, y = x O, c = B / (D (B-1)^2);   penalty = |O|^2 / (D (B-1)^2).
Where D > B the samples' products K = x x' stand in (DUAL): y = K x - v * x, v_d = sum_b x_bd^2,
  part_b = c (|K_b|^2 - sum_d v_d x_bd^2);   penalty = (|K|^2 - sum_d v_d^2) / (D (B-1)^2).
Gradients by x are h = s t, of parts
  t_b = g_b y_b + (x offdiag(x' diag(g) x))_b, or with M_bi = K_bi (g_b + g_i) and w_d = sum_i g_i x_id^2 (DUAL)
  t_b = (M x)_b - (g_b v + w) * x_b,
with s = 2 c; where all g are equal, both terms are, and t = g y, s = 4 c. Of the penalty t = g y, s = 4 / (D (B-1)^2).
Then, as x sums to 0 in every column, and where normalised has squares that sum to B - 1,
  grad_z = inverse * (h - m - e * x),   m = mean_b h,   e = sum_b h x / (B-1) if normalize, else 0.
In all kernels t = g (P - v x) + (Q - w x), where what does not apply is None.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.products import matmul
from ..active_units.triton_moments import first_of
from ..common.triton_matrix import cast, div, load, options, tile
from .triton_columns import Columns, added, measure, pulled, stride_of


@triton.jit
def push(
    z, strides, columns, batch, dims, splits, grad, stride, p, q, weights, parts, scale: tl.float64,
    grad_z,
    TIMES: tl.constexpr, DUAL: tl.constexpr, NORMALIZE: tl.constexpr, SPLITS: tl.constexpr,
    CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of grad_z. ``parts``: sums over rows of t and, over TIMES, of t x."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = cols < dims
    used = (rows < batch) & inside
    zeroth = first_of(z, strides, cols, dims, CD)
    offset = tl.load(columns + cols, mask=inside, other=0)
    inverse = tl.load(columns + (dims + cols), mask=inside, other=0)
    v = tl.load(columns + (2 * dims + cols), mask=inside, other=0) if DUAL else None
    w = None if weights is None else added(weights, 1, splits, cols, dims, SPLITS)
    x = ((load(z, strides, rows, cols, used, CD) - zeroth) - offset) * inverse
    g = tl.load(grad + rows * stride, mask=rows < batch, other=0)
    at = rows * dims + cols
    t = pulled(x, g, v, w, p, q, at, used, CD)
    if parts is not None:
        t -= div(added(parts, 0, splits, cols, dims, SPLITS), tl.full((), batch, CD))
        if NORMALIZE:
            whole = added(parts, 1, splits, cols, dims, SPLITS) * TIMES
            t = tl.fma(-div(whole, tl.full((), batch - 1, CD)), x, t)
    own = inverse * (tl.full((), scale, CD) * t)
    tl.store(grad_z + at, cast(own, grad_z.dtype.element_ty), mask=used)


@triton.jit
def dots(
    x, second, square, out, batch, dims, scale: tl.float64,
    DUAL: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The parts of ROWS samples: ``second`` is y, or K where DUAL."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    total = tl.full((ROWS, COLS), 0, CD)
    first = 0
    while first < dims:
        cols = (first + tl.arange(0, COLS)).to(tl.int64)[None, :]
        used = (rows < batch) & (cols < dims)
        own = tl.load(x + rows * dims + cols, mask=used, other=0)
        if DUAL:
            total = tl.fma(-tl.load(square + cols, mask=cols < dims, other=0) * own, own, total)
        else:
            total = tl.fma(own, tl.load(second + rows * dims + cols, mask=used, other=0), total)
        first += COLS
    if DUAL:
        first = 0
        while first < batch:
            cols = (first + tl.arange(0, COLS)).to(tl.int64)[None, :]
            k = tl.load(second + rows * batch + cols, mask=(rows < batch) & (cols < batch), other=0)
            total = tl.fma(k, k, total)
            first += COLS
    tl.store(out + row, tl.sum(total, 1) * tl.full((), scale, CD), mask=row < batch)


@triton.jit
def _settle(total, square, dims, out, scale, DUAL: tl.constexpr, CD: tl.constexpr, LINE: tl.constexpr):
    """The penalty, from the squares of O or K."""
    if DUAL:
        own = tl.full((LINE,), 0, CD)
        first = 0
        while first < dims:
            at = first + tl.arange(0, LINE)
            v = tl.load(square + at, mask=at < dims, other=0)
            own = tl.fma(v, v, own)
            first += LINE
        total -= tl.sum(own, 0)
    tl.store(out, total * tl.full((), scale, CD))


@triton.jit
def squares(
    matrix, side, parts, square, dims, out, scale: tl.float64,
    IS_WHOLE: tl.constexpr, DUAL: tl.constexpr, CD: tl.constexpr, LINE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum of squares of a tile of S or K; the diagonal of S becomes 0 first."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    used = (rows < side) & (cols < side)
    at = matrix + rows * side + cols
    c = tl.load(at, mask=used, other=0)
    if not DUAL:
        c = tl.where((rows == cols) & (c == c), 0, c)  # of one column there is nothing else that a NaN would show in
        tl.store(at, c, mask=used & (rows == cols))
    total = tl.sum(tl.sum(c * c, 1), 0)
    if IS_WHOLE:
        _settle(total, square, dims, out, scale, DUAL, CD, LINE)
    else:
        tl.store(parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit(do_not_specialize=["programs"])
def total(
    parts, programs, square, dims, out, scale: tl.float64, DUAL: tl.constexpr, CD: tl.constexpr, LINE: tl.constexpr
):
    """The penalty, from the sums that the programs of `squares` stored."""
    own = tl.full((LINE,), 0, CD)
    first = 0
    while first < programs:
        at = first + tl.arange(0, LINE)
        own += tl.load(parts + at, mask=at < programs, other=0)
        first += LINE
    _settle(tl.sum(own, 0), square, dims, out, scale, DUAL, CD, LINE)


@triton.jit
def weigh(k, grad, stride, out, side, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of K_bi (g_b + g_i)."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS))[None, :]
    used = (rows < side) & (cols < side)
    at = rows * side + cols
    g = tl.load(grad + rows * stride, mask=rows < side, other=0)
    g += tl.load(grad + cols * stride, mask=cols < side, other=0)
    tl.store(out + at, tl.load(k + at, mask=used, other=0) * g, mask=used)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product in the inputs' dtype at full precision, despite autocast and TF32."""
    with torch.autocast(a.device.type, enabled=False):
        return matmul(a, b)


def _grid(rows: int, cols: int, size: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, size["ROWS"]), triton.cdiv(cols, size["COLS"])


def launch_forward(
    z: Tensor, normalize: bool, per_sample: bool, save: bool, out: Tensor, columns: Tensor
) -> Tensor | None:
    """Fill ``out``, [B] or [], and ``columns`` [3, D], in the compute dtype.

    Returns what backward needs, if it will be called: K [B, B] where D > B, else y [B, D] per sample, O [D, D] in all.
    """
    batch, dims = z.shape
    dual = dims > batch
    measure(z, normalize, columns)
    view = Columns(z, columns, dual)
    x = view.new()
    view.walk(x=x)
    second = _product(x, x.t()) if dual else _product(x.t(), x)
    scale = 1 / (dims * (batch - 1) ** 2)
    shared = dict(DUAL=dual, **options(columns.dtype))
    if per_sample:
        if not dual:
            second = _product(x, second.fill_diagonal_(0))
        size = tile(1024, dims)
        dots[(triton.cdiv(batch, size["ROWS"]),)](
            x, second, columns[2], out, batch, dims, batch * scale, num_warps=4, **size, **shared
        )
        return second if save else None
    side = len(second)
    size = tile(4096, side)
    grid = _grid(side, side, size)
    programs = grid[0] * grid[1]
    parts = columns.new_empty(programs)
    shared.update(LINE=1024)
    squares[grid](
        second, side, parts, columns[2], dims, out, scale, IS_WHOLE=programs == 1, num_warps=8, **size, **shared
    )
    if programs > 1:
        total[(1,)](parts, programs, columns[2], dims, out, scale, num_warps=4, **shared)
    return second if save else None


def launch_backward(
    grad: Tensor,
    z: Tensor,
    saved: Tensor,
    columns: Tensor,
    normalize: bool,
    per_sample: bool,
    grad_z: Tensor,
) -> None:
    """Fill ``grad_z`` [B, D], contiguous, of z's dtype.

    Args:
        grad: [B], or [] in all; the compute dtype. An expanded number is known by its stride of 0.
        saved, columns: what `launch_forward` returned and filled.
    """
    batch, dims = z.shape
    view = Columns(z, columns, dims > batch)
    stride = stride_of(grad)
    equal = stride == 0
    p = q = weights = parts = None
    times = 1
    if not view.dual and per_sample:
        p = saved
        if not equal:
            x, gx, parts, times = view.new(), view.new(), view.sums(), 2
            view.walk(x=x, gx=gx, grad=grad, p=p, parts=parts)
            q = _product(x, _product(x.t(), gx).fill_diagonal_(0))
    elif equal:
        x = view.new()
        view.walk(x=x)
        p = _product(saved, x) if view.dual else _product(x, saved)
    else:
        x, weights = view.new(), view.sums()
        view.walk(x=x, grad=grad, parts=weights, own=True)
        weighed = torch.empty_like(saved)
        size = tile(2048, batch)
        weigh[_grid(batch, batch, size)](
            saved, grad, stride, weighed, batch, num_warps=4, **size, **options(columns.dtype)
        )
        q = _product(weighed, x)
    if parts is None and (normalize or not equal):
        parts = view.sums()
        view.walk(grad=grad, p=p, q=q, weights=weights, parts=parts)
    scale = (4 if equal else 2) * (batch if per_sample else 1) / (dims * (batch - 1) ** 2)
    size = tile(2048, dims, 64)
    push[_grid(batch, dims, size)](
        z, z.stride(), columns, batch, dims, view.splits, grad, stride, p, q, weights, parts, scale, grad_z,
        TIMES=times, DUAL=view.dual, NORMALIZE=normalize, SPLITS=view.tile["SPLITS"], num_warps=4,
        **size, **options(columns.dtype),
    )  # fmt: skip
