"""A Triton kernel that computes nothing but exponentials, to measure the peak rate of a GPU's exponential unit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # eight independent streams for each thread of four warps


@triton.jit
def _fill(out, turns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = -0.001 * tl.arange(0, BLOCK).to(tl.float32)
    for _ in range(turns):
        x = tl.exp2(-x)
    tl.store(out + at, x)


def fill(out: Tensor, turns: int) -> None:
    """Compute ``turns`` exponentials for every element of ``out``, whose size is a multiple of `BLOCK`."""
    _fill[(out.numel() // BLOCK,)](out, turns, BLOCK=BLOCK)
