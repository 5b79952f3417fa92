"""Matrix products in full float32 precision, whatever precision torch is set to.

`torch.set_float32_matmul_precision` and similar settings let a GPU multiply in TF32, of 11 bits, and a CPU in bfloat16,
of 8. They are global: turning them off around a product would affect other threads, and restoring them could undo what
another thread has set. A product that would lose digits is therefore computed in float64. csrc/products.h does the same
in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decorators import constant
from .torch_internals import cpu_has_amx_fp16


@constant
def loses_digits(device_type: str) -> bool:
    """Return whether torch multiplies float32 matrices on this type of device in less than float32 precision."""
    backends: dict[str, Any] = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}
    precision = backends[device_type].matmul.fp32_precision if device_type in backends else ""
    if precision == "tf32" and device_type == "cpu":  # which needs AMX for float16
        return cpu_has_amx_fp16()
    return precision in ("tf32", "bf16")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.mm(a, b)`` in the full precision of its dtype. The caller turns autocast off, see `exactly`."""
    if a.dtype == torch.float32 and loses_digits(a.device.type):
        return torch.mm(a.double(), b.double()).float()
    return torch.mm(a, b)
