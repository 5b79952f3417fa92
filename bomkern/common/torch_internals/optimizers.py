"""Optimizers and gradient scalers: steps that the device decides on, without a wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import bind, need

need(
    "torch.optim.SGD(fused=True)._step_supports_amp_scaling",  # and the attribute found_inf, which it promises to read
    since="1.13",
    serves="StepGuard with fused optimizers",
    without="each step waits for the device",
    owner=lambda: torch.optim.SGD([torch.zeros(1)], fused=True),
)
_unscale: Any = bind(
    "torch._amp_foreach_non_finite_check_and_unscale_",  # called by torch.amp.GradScaler: one launch for many tensors
    since="1.8",
    serves="StepGuard",
    instead="torch.isfinite, several launches for each tensor",
    without="uses torch.isfinite, which is slower",
    fallback=None,
)
need(
    "torch.amp.GradScaler._per_optimizer_states",
    since="1.6",
    serves="StepGuard(scaler=)",
    without="gradients that were unscaled for one optimizer of several are unscaled twice",
    owner=lambda: torch.amp.GradScaler("cpu"),
)


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of Accelerate and Fabric, which keep it as ``optimizer``."""
    for _ in range(8):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            break
        optimizer = inner
    return optimizer


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step_unless` can step the optimizer without waiting for the device."""
    return bool(getattr(innermost(optimizer), "_step_supports_amp_scaling", False))


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer unless ``found_inf``, 0-dim float32 on its device, is 1, as torch.amp.GradScaler does."""
    inner = innermost(optimizer)  # a wrapper calls its step, which looks for the attribute in itself
    inner.found_inf = found_inf
    try:
        optimizer.step()
    finally:
        del inner.found_inf


class SteppedByScaler:
    """A class whose ``step`` torch.amp.GradScaler calls without waiting, after it has set two attributes.

    They are ``found_inf``, and ``grad_scale`` if the gradients are still scaled.
    """

    _step_supports_amp_scaling = True


def inside_scaler(stepped: SteppedByScaler) -> bool:
    """Return whether a GradScaler is calling ``step``."""
    return "found_inf" in stepped.__dict__


def from_scaler(stepped: SteppedByScaler) -> tuple[Tensor | None, Tensor | None]:
    """Return (found_inf, grad_scale); None for what was not given."""
    found_inf, scale = (stepped.__dict__.get(name) for name in ("found_inf", "grad_scale"))
    return found_inf if isinstance(found_inf, Tensor) else None, scale


def forget_scaler(stepped: SteppedByScaler) -> None:
    """Remove the attributes, as a GradScaler does after a step that raised no error."""
    for name in ("found_inf", "grad_scale"):
        stepped.__dict__.pop(name, None)


def already_unscaled(scaler: torch.amp.GradScaler, optimizer: object) -> bool:
    """Return whether ``scaler.unscale_`` or ``step`` was called for an optimizer since the last ``update``."""
    states: dict[int, dict[str, Any]] = getattr(scaler, "_per_optimizer_states", {})
    return id(optimizer) in states and bool(states[id(optimizer)].get("found_inf_per_device"))


def flag_non_finite(grads: list[Tensor], found_inf: Tensor, factor: Tensor, scaled: bool = False) -> None:
    """Set ``found_inf``, 0-dim float32, to 1 if any gradient, all of one dtype, has a value that is not finite.

    Args:
        factor: 0-dim float32 on the same device, by which the gradients are multiplied in place.
        scaled: whether the factor may differ from 1.
    """
    if _unscale is not None and grads[0].device.type in ("cpu", "cuda"):  # other devices may lack it
        _unscale(grads, found_inf, factor)  # times 1 changes no bit
        return
    for grad in grads:
        torch.maximum(found_inf, (~grad.isfinite().all()).to(found_inf), out=found_inf)
        if scaled:
            grad.mul_(factor)
