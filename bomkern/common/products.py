"""Matrix products that keep float32's digits, whatever torch has been told to give up for speed.

`torch.set_float32_matmul_precision` and its kin have a GPU multiply in TF32, of 11 bits, and a CPU in bfloat16, of 8.
They are global: turned off around a product they would be off for other threads too, and a thread that restores what it
saw could undo what another has set. So a product that would lose digits is one of float64 instead. csrc/products.h is
the same in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decorators import constant
from .torch_internals import cpu_has_amx_fp16


@constant
def loses_digits(device_type: str) -> bool:
    """Whether a product of float32 matrices on such a device has fewer digits than float32."""
    backends: dict[str, Any] = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}
    precision = backends[device_type].matmul.fp32_precision if device_type in backends else ""
    if precision == "tf32" and device_type == "cpu":  # which takes AMX for float16
        return cpu_has_amx_fp16()
    return precision in ("tf32", "bf16")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm(a, b)`` to all digits of their dtype; autocast is the caller's business, see common/autocast.py."""
    if a.dtype == torch.float32 and loses_digits(a.device.type):
        return torch.mm(a.double(), b.double()).float()
    return torch.mm(a, b)
