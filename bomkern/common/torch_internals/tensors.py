"""Tensors: how they are nested, saved for backward, written to and stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .registry import bind, need

tree_flatten: Callable[[Any], tuple[list[Any], Any]] = bind(
    "torch.utils._pytree.tree_flatten", since="1.8", serves="every op under torch.func"
)
tree_unflatten: Callable[[Any, Any], Any] = bind(
    "torch.utils._pytree.tree_unflatten", since="1.8", serves="every op under torch.func"
)
_saved_tensors_hooks: Callable[[bool], Any] = bind(
    "torch._C._autograd._top_saved_tensors_default_hooks", serves="lazy goals that draw random numbers"
)
need("torch.Tensor._version", since="1.0", serves="refusing a lazy function that writes into its arguments")
sparse_values: Callable[[Tensor], Tensor] = bind(
    "torch.Tensor._values",
    since="1.0",
    serves="StepGuard with sparse gradients",
    instead="torch.Tensor.coalesce().values()",
    without="coalesces them first, which is slower",
    fallback=lambda x: x.coalesce().values(),
)


def pack_hook() -> Any:
    """Return the hook that packs the tensors that autograd saves, or None."""
    hooks = _saved_tensors_hooks(True)
    return hooks and hooks[0]


def write_count(x: Tensor) -> int:
    """Return how often x has been written to."""
    return x._version
