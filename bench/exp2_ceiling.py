"""What the exponential unit of a GPU gives where nothing else is done, by Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # with four warps eight independent streams to a thread


@triton.jit
def _fill(out, turns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = -0.001 * tl.arange(0, BLOCK).to(tl.float32)
    for _ in range(turns):
        x = tl.exp2(-x)
    tl.store(out + at, x)


def fill(out: Tensor, turns: int) -> None:
    """``turns`` exponentials for every element of ``out``, a multiple of `BLOCK` of them."""
    _fill[(out.numel() // BLOCK,)](out, turns, BLOCK=BLOCK)
