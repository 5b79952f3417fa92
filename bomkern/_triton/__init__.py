"""The Triton implementations' bridge to PyTorch, a file for each op: its ops, fakes and autograd.

Import it only where impl "triton" is asked for. It imports triton itself no sooner than the first call, because that
may touch a driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_ready: dict[tuple[str, str], ModuleType] = {}


def why_not(device_type: str) -> str | None:
    """None where Triton can serve tensors of this device type, else the reason, in one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        language = sys.modules.get("triton.language")
        if language is not None and type(language.sum).__name__ != "InterpretedFunction":
            return "triton was imported before TRITON_INTERPRET=1 was set, so its interpreter cannot run"
        return None if device_type in ("cpu", "cuda") else f"triton's interpreter does not serve {device_type} tensors"
    if device_type != "cuda":
        return f"triton serves cuda tensors, not {device_type} ones (its interpreter would: TRITON_INTERPRET=1)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def load(op: str, device_type: str) -> ModuleType:
    """The op's kernels, imported at its first call."""
    kernels = _ready.get((op, device_type))
    if kernels is None:
        reason = why_not(device_type)
        if reason is not None:
            raise RuntimeError(f"{op}: impl 'triton' cannot serve here: {reason}")
        kernels = _ready[op, device_type] = importlib.import_module(f"bomkern.kernels.{op}.triton")
    return kernels


def guard(t: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current one."""
    elsewhere = t.is_cuda and t.get_device() != torch.cuda.current_device()
    return torch.cuda.device(t.device) if elsewhere else nullcontext()


# After what they use from here. Each name is from now on the function, not its module.
from .active_units import active_units  # noqa: E402
from .consistency_variance import consistency_variance  # noqa: E402
from .covariance_penalty import covariance_penalty  # noqa: E402
from .gaussian_kl import gaussian_kl  # noqa: E402
from .goal_set import goal_set  # noqa: E402
from .latent_statistics import latent_statistics  # noqa: E402
from .min_goal import min_goal  # noqa: E402
from .total_correlation import total_correlation  # noqa: E402

__all__ = [
    "active_units",
    "consistency_variance",
    "covariance_penalty",
    "gaussian_kl",
    "goal_set",
    "latent_statistics",
    "min_goal",
    "total_correlation",
    "why_not",
]
