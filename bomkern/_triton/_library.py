"""How an op and its backward op are made known to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._func import loop_under_vmap


def register(
    op: str,
    forward: tuple[str, Callable[..., Any], Callable[..., Any]],
    backward: tuple[str, Callable[..., Any], Callable[..., Any]],
    save: Callable[..., None],
    pull_back: Callable[..., tuple[Any, ...]],
) -> torch.library.Library:
    """Defines ``op_triton`` and ``op_triton_backward``, each by its signature, what runs it, and its fake.

    Args:
        save, pull_back: autograd of the first, see `torch.library.register_autograd`. The second has none, and says so.
    """

    def twice(ctx: Any, *_: object) -> None:
        raise RuntimeError(f"{op} cannot be differentiated twice (impl 'triton'); impl='reference' can.")

    library = torch.library.Library("bomkern", "FRAGMENT")
    for suffix, (signature, run, fake) in (("triton", forward), ("triton_backward", backward)):
        name = f"{op}_{suffix}"
        library.define(name + signature)
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"bomkern::{name}", fake, lib=library)
        loop_under_vmap(name, library)
    torch.library.register_autograd(f"bomkern::{op}_triton", pull_back, setup_context=save, lib=library)
    torch.library.register_autograd(f"bomkern::{op}_triton_backward", twice, lib=library)
    return library
