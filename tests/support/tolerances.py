"""How close to float64 a result has to be."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 1e-6, unit: float = 0.0) -> None:
    """Our largest error against float64 is at most twice eager float32's, or ``slack`` of the largest value.

    ``unit``: the size of what was added up, where the result may cancel to nothing and has no size of its own.
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
