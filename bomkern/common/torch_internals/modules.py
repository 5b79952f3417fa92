"""Modules, and their buffers: reading them quickly, loading them, and converting them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .registry import need

for _name in ("_buffers", "_modules"):
    need(
        f"torch.nn.Module.{_name}",
        since="1.0",
        serves="GoalSet and its history",
        instead="attributes of the module, which cost as much as a small op",
        without="raises AttributeError",
        owner=nn.Module,
    )
need(
    "torch.nn.Module._load_from_state_dict",
    serves="loading a GoalSet's state by the names of its goals",
    instead="torch.nn.Module.register_load_state_dict_pre_hook",
    without="loads by position",
)
need(
    "torch.nn.Module._apply",
    since="1.0",
    serves="constraints that stay float32 in a model of halves",
    without="half() rounds them",
)


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the buffers by name; reading an attribute of a module costs as much as a small op."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """Return the submodules by name."""
    return module._modules


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers keep their precision under ``half()`` and ``bfloat16()`` of a model that contains it.

    Buffers that leave the meta device, by ``to_empty`` of a model, get their first values: see `reset_parameters`.
    """

    def reset_parameters(self) -> None:
        """Give all buffers, which may hold anything, the values that they had when the module was made."""
        raise NotImplementedError

    def _before_loading(self, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
        """Change a state, whose names have a prefix, before it is loaded. Return whether it can be loaded."""
        return True

    def _after_loading(self) -> None:
        """Finish what a loaded state has begun, before the states of submodules are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if self._before_loading(state_dict, prefix, arguments[-1]):
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            self._after_loading()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecisionBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if old.is_floating_point() and new.dtype not in (torch.float32, torch.float64):
                setattr(self, name, old.to(new.device))
        if any(b.is_meta for b in before.values()) and not any(b.is_meta for b in self.buffers(recurse=False)):
            self.reset_parameters()
        return self
