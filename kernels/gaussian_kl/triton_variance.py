"""A log-variance's exponential and its slope in Triton, as variance.h defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_matrix import exp_of

LIMIT = tl.constexpr(80.0)


@triton.jit
def variance_of(logvar):
    """(e^v, its slope), above v = 80 the tangent there: finite in float32. NaN stays NaN."""
    beyond = logvar > LIMIT
    slope = exp_of(tl.where(beyond, LIMIT, logvar))
    return tl.fma(slope, tl.where(beyond, logvar - LIMIT, 0), slope), slope
