"""What every op's tests share: the implementations to run, and how close is close enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bomkern import _impl

torch.manual_seed(0)


def servers(op: str) -> list[object]:
    """(impl, device) pairs for parametrize; those that cannot serve here are skipped with the reason."""
    pairs = [("reference", "cpu"), ("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda"), ("reference", "cuda")]
    out = []
    for impl, device in pairs:
        reason = None if device == "cpu" or torch.cuda.is_available() else "no GPU here"
        reason = reason or _impl.why_not(op, impl, device)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        out.append(pytest.param((impl, device), id=f"{impl}-{device}", marks=marks))
    return out


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 1e-6) -> None:
    """Our largest error against float64 is at most twice eager float32's, or ``slack`` of the largest value."""
    ours, eager, exact = (t.detach().double().cpu() for t in (ours, eager, exact))
    assert ours.shape == exact.shape
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities and NaN have no distance
    assert torch.isfinite(ours)[~same].all(), f"got {ours[~same]}, want {exact[~same]}"
    if same.all():
        return
    error, allowed = (ours - exact)[~same].abs().max(), 2 * (eager - exact)[~same].nan_to_num().abs().max()
    size = exact[~same].abs().max()
    assert error <= allowed + slack * size, f"error {error:.3g}, allowed {allowed:.3g} + {slack} of {size:.3g}"
