"""The allowed difference from float64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 1e-6, unit: float = 0.0) -> None:
    """Check that our largest error against float64 is at most twice eager float32's, or ``slack`` of the largest value.

    ``unit`` is the magnitude of the summed terms, for results that may cancel and have no magnitude of their own.
    """
    ours, eager, exact = (t.detach().double().cpu() for t in (ours, eager, exact))
    assert ours.shape == exact.shape
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities and NaN have no distance
    assert torch.isfinite(ours)[~same].all(), f"got {ours[~same]}, want {exact[~same]}"
    if same.all():
        return
    error, allowed = (ours - exact)[~same].abs().max(), 2 * (eager - exact)[~same].nan_to_num().abs().max()
    size = max(exact[~same].abs().max().item(), unit)
    assert error <= allowed + slack * size, f"error {error:.3g}, allowed {allowed:.3g} + {slack} of {size:.3g}"
