"""What a processor can do."""

from __future__ import annotations

from collections.abc import Callable

from .registry import bind

cpu_has_amx_fp16: Callable[[], bool] = bind(
    "torch.cpu._is_amx_fp16_supported",
    serves="products that keep float32's digits on a CPU",
    without="assumes that every CPU has it, and multiplies in float64",
    fallback=lambda: True,
)
