"""Which implementation serves a call, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

IMPLS = ("reference", "cpu", "cuda", "triton")


def resolve(op: str, device: str, impl: str | None) -> Callable[..., Any]:
    from . import reference

    return getattr(reference, op)
