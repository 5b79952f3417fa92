"""What differs between types of devices, of which the CPU and CUDA are only two."""

from __future__ import annotations

import torch
from torch import Tensor

HOST = ("cpu", "meta")  # types of devices without a queue and a generator of their own


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest float dtype to compute with where more digits help: MPS and some others have no float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait for the work that the device was given so far."""
    if device.type not in HOST:
        torch.accelerator.synchronize(device)


def rng_state(device: torch.device) -> Tensor:
    """Return the state of the device's generator, without a sync."""
    if device.type in HOST:
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the device's generator."""
    if device.type in HOST:
        torch.set_rng_state(state)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def accelerators() -> list[torch.device]:
    """Return all devices beside the CPU."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return [] if kind is None else [torch.device(kind.type, k) for k in range(torch.accelerator.device_count())]
