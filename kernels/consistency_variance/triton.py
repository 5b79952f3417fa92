"""Triton kernels of `consistency_variance`, and the launchers; consistency_variance.h has the mathematics.

One launch each way, straight from the V tensors wherever they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_matrix import cast, load, options, strides_of, tile


@triton.jit
def _view(views, strides, v: tl.constexpr, rows, cols, used, CD: tl.constexpr):
    return load(views[v], (strides[2 * v], strides[2 * v + 1]), rows, cols, used, CD)


@triton.jit
def forward(
    views, strides, out, batch, dims, scale: tl.float64,
    V: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The variances of ROWS samples: mean and squares of differences from view 0, updated view by view."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    total = tl.full((ROWS, COLS), 0, CD)
    first = 0
    while first < dims:
        cols = (first + tl.arange(0, COLS)).to(tl.int64)[None, :]
        used = (rows < batch) & (cols < dims)
        zeroth = _view(views, strides, 0, rows, cols, used, CD)
        mean = tl.full((ROWS, COLS), 0, CD)
        for v in tl.static_range(1, V):
            rise = (_view(views, strides, v, rows, cols, used, CD) - zeroth) - mean
            mean += rise * (1.0 / (v + 1))
            total = tl.fma(rise * (v / (v + 1)), rise, total)
        first += COLS
    tl.store(out + row, tl.sum(total, 1) * tl.full((), scale, CD), mask=row < batch)


@triton.jit
def backward(
    grad, stride, views, strides, grads, batch, dims, scale: tl.float64,
    V: tl.constexpr, CD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of every gradient; one that is None is not wanted."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS))[None, :]
    used = (rows < batch) & (cols < dims)
    zeroth = _view(views, strides, 0, rows, cols, used, CD)
    apart = (tl.full((ROWS, COLS), 0, CD),)
    mean = tl.full((ROWS, COLS), 0, CD)
    for v in tl.static_range(1, V):
        apart = apart + (_view(views, strides, v, rows, cols, used, CD) - zeroth,)  # noqa: RUF005
        mean += apart[v]
    mean *= 1.0 / V
    pull = tl.load(grad + rows * stride, mask=rows < batch, other=0) * tl.full((), 2 * scale, CD)
    for v in tl.static_range(V):
        if grads[v] is not None:
            own = pull * (apart[v] - mean)
            tl.store(grads[v] + rows * dims + cols, cast(own, grads[v].dtype.element_ty), mask=used)


def _scale(views: Sequence[Tensor], correction: float) -> float:
    return 1 / ((len(views) - correction) * views[0].shape[1])


def _tile(views: Sequence[Tensor]) -> dict[str, int]:
    return tile(1024 if len(views) <= 4 else 512, views[0].shape[1])  # the compiler loads all views at once


def launch_forward(views: Sequence[Tensor], correction: float, out: Tensor) -> None:
    """Fill ``out`` [B], in the compute dtype, from V tensors [B, D]."""
    batch, dims = views[0].shape
    size = _tile(views)
    forward[(triton.cdiv(batch, size["ROWS"]),)](
        tuple(views), strides_of(*views), out, batch, dims, _scale(views, correction),
        V=len(views), num_warps=4, **size, **options(out.dtype),
    )  # fmt: skip


def launch_backward(grad: Tensor, views: Sequence[Tensor], correction: float, grads: Sequence[Tensor | None]) -> None:
    """Fill the gradients that are not None, [B, D] contiguous, each in its view's dtype."""
    batch, dims = views[0].shape
    size = _tile(views)
    backward[(triton.cdiv(batch, size["ROWS"]), triton.cdiv(dims, size["COLS"]))](
        grad, grad.stride(0), tuple(views), strides_of(*views), tuple(grads), batch, dims, _scale(views, correction),
        V=len(views), num_warps=4, **size, **options(grad.dtype),
    )  # fmt: skip
