"""Check whether Triton can serve, and load an op's kernels. Triton itself is imported at the first call."""

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
    """Return None if Triton can serve tensors of this device type, else the reason in one sentence."""
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
    """Return the module of an op's kernels, which is imported at its first call."""
    kernels = _ready.get((op, device_type))
    if kernels is None:
        reason = why_not(device_type)
        if reason is not None:
            raise RuntimeError(f"{op}: impl 'triton' cannot serve here: {reason}")
        kernels = _ready[op, device_type] = importlib.import_module(f"bomkern.kernels.{op}.triton")
    return kernels


def guard(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the tensor's device is current, since Triton launches on the current device."""
    elsewhere = t.is_cuda and t.get_device() != torch.cuda.current_device()
    return torch.cuda.device(t.device) if elsewhere else nullcontext()
