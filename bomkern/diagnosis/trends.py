"""Statistics of noisy series, for `bomkern.diagnose`; it knows nothing of goals. Series are float64, NaN is missing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A trend is judged on so many block means: enough for a slope, few enough that each averages the noise of its steps.
BLOCKS = 24
LEAST_BLOCKS = 6  # below which residuals say nothing about the noise
# The largest autocorrelation of blocks that is allowed for; beyond it a series is a random walk, and t is nearly 0.
MOST_CORRELATED = 0.95
BEST_T = 99.0  # of a rise without noise
ONSET = 0.03  # part of a rise that noise may have made before it began


class Trend(NamedTuple):
    """A straight line through a series.

    Attributes:
        change: how far it rises from the first row to the last, in units of the series.
        t: change over its standard error, autocorrelation of the residuals allowed for; 0 where nothing can be said.
    """

    change: float
    t: float


def smooth(series: Tensor, width: int) -> Tensor:
    """Centred moving mean along the first axis over ``width`` rows, fewer at the ends; NaN only where all are."""
    half, seen = width // 2, series.isfinite()
    if not len(series):
        return series

    def window(values: Tensor) -> Tensor:  # summed anew at every row: differences of one long sum forget what is small
        flat = values.reshape(len(series), -1).T[:, None]
        return F.avg_pool1d(flat, 2 * half + 1, 1, half)[:, 0].T.reshape(series.shape)

    return window(torch.where(seen, series, 0)) / window(seen.to(series.dtype))  # 0 / 0 is NaN


def blocks(series: Tensor, count: int) -> Tensor:
    """[T, ...] -> means of ``count`` nearly equal runs of rows, NaN rows left out."""
    edges = torch.linspace(0, len(series), count + 1).round().long().tolist()
    return torch.stack([series[a:b].nanmean(0) for a, b in pairwise(edges)])


def trend(series: Tensor) -> Trend:
    """Fit a line to block means for the change, and to their positions in sorted order for t.

    By positions a bent rise counts as a rise.
    The standard error is widened by ``sqrt((1 + r) / (1 - r))``, r the residuals' autocorrelation at lag one, corrected
    for its bias of about ``-(1 + 3r) / n`` (Kendall 1954).
    """
    count = min(BLOCKS, len(series) // 2)
    if count < LEAST_BLOCKS:
        return Trend(0.0, 0.0)
    y = blocks(series, count).double()
    kept = y.isfinite()
    if int(kept.sum()) < LEAST_BLOCKS:
        return Trend(0.0, 0.0)
    x, y = torch.arange(count, dtype=torch.float64)[kept], y[kept]
    change = _slope(x, y)[0] * (count - 1)
    slope, left = _slope(x, _positions(y))
    squares, n = float((left * left).sum()), len(x)
    if squares <= 1e-9 * n**3:
        return Trend(change, math.copysign(BEST_T, slope) if slope else 0.0)
    r = float((left[1:] * left[:-1]).sum()) / squares
    r = min(max(r + (1 + 3 * r) / n, 0.0), MOST_CORRELATED)
    error = math.sqrt(squares / (n - 2) / float((x - x.mean()).square().sum()) * (1 + r) / (1 - r))
    return Trend(change, min(max(slope / error, -BEST_T), BEST_T))


def _positions(y: Tensor) -> Tensor:
    """Return the position of each value in sorted order. Equal values share the mean of theirs.

    Positions by order of time would make a series rise that is mostly 0.
    """
    _, place, count = y.unique(return_inverse=True, return_counts=True)
    positions: Tensor = (count.cumsum(0).double() - (count + 1) / 2)[place]
    return positions


def _slope(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Return the slope of the line through (x, y), and the residuals."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / (x * x).sum())
    return slope, y - slope * x


def stretches(mask: Tensor, gap: int = 0) -> list[tuple[int, int]]:
    """Runs ``[a, b)`` of True in a [T] mask, joined across at most ``gap`` False rows."""
    found: list[tuple[int, int]] = []
    edge = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(mask.to(torch.int8), prepend=edge, append=edge)
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    for a, b in zip(starts, ends, strict=True):
        if found and a - found[-1][1] <= gap:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return found


def rise(series: Tensor) -> tuple[int, int]:
    """``[a, b)``, the largest rise of a (smoothed) series to a row from the lowest before it.

    It begins where the series last was within `ONSET` of the rise from its bottom.
    """
    values = torch.where(series.isfinite(), series, torch.inf)
    lowest = values.cummin(0)
    climbed = torch.where(series.isfinite(), series - lowest.values, -torch.inf)
    top = int(climbed.argmax())
    return _leaves(values[: top + 1], lowest.values[top].item(), values[top].item()), top + 1


def last_rise(series: Tensor) -> int:
    """Where the rise to the end of a (smoothed) series begins: where it last was within `ONSET` of its bottom."""
    values = torch.where(series.isfinite(), series, torch.inf)
    kept = values[values < torch.inf]
    return _leaves(values, kept.min().item(), kept[-1].item()) if len(kept) else 0


def _leaves(values: Tensor, bottom: float, top: float) -> int:
    near = values <= bottom + ONSET * (top - bottom)
    return int(near.nonzero().max()) if near.any() else 0


def correlation(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Pearson's r of two series of equal length and its t; (0, 0) where either is constant or they are short."""
    kept = x.isfinite() & y.isfinite()
    x, y = x[kept] - x[kept].mean(), y[kept] - y[kept].mean()
    scale = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    if len(x) < LEAST_BLOCKS or scale <= 0:
        return 0.0, 0.0
    r = float((x * y).sum()) / scale
    return r, r * math.sqrt((len(x) - 2) / max(1 - r * r, 1e-12))


def ramp(value: float, none: float, full: float) -> float:
    """0 at ``none``, 1 at ``full``, straight between (``none`` may be the larger); 0 where a number is missing."""
    if none == full:
        return float(value >= full)
    part = (value - none) / (full - none)
    return 0.0 if math.isnan(part) else min(max(part, 0.0), 1.0)
