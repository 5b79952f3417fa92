"""Typed versions of torch's decorators without annotations: a decorated function keeps its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .torch_internals import mark_constant

F = TypeVar("F", bound=Callable[..., Any])


def fake(op: str, library: torch.library.Library) -> Callable[[F], F]:
    """Register the fake kernel of ``bomkern::op``."""

    def register(kernel: F) -> F:
        torch.library.register_fake(f"bomkern::{op}", kernel, lib=library)
        return kernel

    return register


def constant(fn: F) -> F:
    """Call ``fn`` once while a graph is traced, and make its result a constant of the graph."""
    mark_constant(fn)
    return fn
