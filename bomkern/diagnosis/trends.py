"""Statistics of noisy series, for `bomkern.diagnose`; it knows nothing of goals. Series are float64, NaN is missing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of block means to which a trend is fitted: enough for a slope, and few enough to average noise within blocks.
BLOCKS = 24
LEAST_BLOCKS = 6  # with fewer blocks, residuals say nothing about the noise
# Largest autocorrelation of blocks in the correction; beyond it a series is a random walk, and t is nearly 0.
CYCLES, SHORTEST = 8, 4  # a rhythm has at least so many periods in a series, of at least so many rows
MOST_CORRELATED = 0.95
BEST_T = 99.0  # t of a rise without noise
ONSET = 0.03  # part of a rise that noise may have caused before the rise began


class Trend(NamedTuple):
    """A straight line through a series.

    Attributes:
        change: rise from the first row to the last, in units of the series.
        t: change over its standard error, corrected for autocorrelation of the residuals; 0 for too few rows.
    """

    change: float
    t: float


def smooth(series: Tensor, width: int) -> Tensor:
    """Return the centred moving mean along the first axis over ``width`` rows, fewer at the ends.

    Missing values are left out; the result is NaN only if all values of a window are missing.
    """
    half, seen = width // 2, series.isfinite()
    if not len(series):
        return series

    def window(values: Tensor) -> Tensor:  # sums each window anew: differences of a running sum lose small values
        flat = values.reshape(len(series), -1).T[:, None]
        return F.avg_pool1d(flat, 2 * half + 1, 1, half)[:, 0].T.reshape(series.shape)

    return window(torch.where(seen, series, 0)) / window(seen.to(series.dtype))  # 0 / 0 is NaN


def blocks(series: Tensor, count: int) -> Tensor:
    """Return the means of ``count`` nearly equal runs of rows of a series [T, ...]; NaN rows are left out."""
    edges = torch.linspace(0, len(series), count + 1, device="cpu").round().long().tolist()
    return torch.stack([series[a:b].nanmean(0) for a, b in pairwise(edges)])


def trend(series: Tensor) -> Trend:
    """Fit a line to block means for the change, and to their positions in sorted order for t.

    Because t comes from positions, a curved rise counts as a rise too. The standard error is multiplied by
    ``sqrt((1 + r) / (1 - r))``, where r is the autocorrelation of the residuals at lag one, corrected for its bias of
    about ``-(1 + 3r) / n`` (Kendall 1954).
    """
    count = min(BLOCKS, len(series) // 2)
    if count < LEAST_BLOCKS:
        return Trend(0.0, 0.0)
    y = blocks(series, count).double()
    kept = y.isfinite()
    if int(kept.sum()) < LEAST_BLOCKS:
        return Trend(0.0, 0.0)
    x, y = torch.arange(count, dtype=torch.float64, device="cpu")[kept], y[kept]
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
    """Return the position of each value in sorted order; equal values get the mean of their positions.

    If equal values were ordered by time, a series that is mostly 0 would seem to rise.
    """
    _, place, count = y.unique(return_inverse=True, return_counts=True)
    positions: Tensor = (count.cumsum(0).double() - (count + 1) / 2)[place]
    return positions


def _slope(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Return the slope of the line through (x, y), and the residuals."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / (x * x).sum())
    return slope, y - slope * x


def rhythm(series: Tensor) -> tuple[int, float]:
    """Return the period of a series [T] in rows, and how regular it is, in [0, 1]; (0, 0) if there is none.

    A series with period p is like itself p rows later, and its own opposite p / 2 rows later. The regularity is the
    smaller of the two autocorrelations in size. Noise that keeps its value for a while has neither of them.
    """
    values = torch.where(series.isfinite(), series, series.nanmean())
    values, rows = values - values.mean(), len(series)
    power = torch.fft.rfft(values, 2 * rows).abs().square()  # twice as long, so that the end does not meet the start
    like = torch.fft.irfft(power, 2 * rows)[:rows]
    longest = rows // CYCLES
    if longest < SHORTEST or not float(like[0]) > 0:
        return 0, 0.0
    periods = torch.arange(SHORTEST, longest + 1, device="cpu")
    regular = torch.minimum(like[periods], -like[periods // 2]) / like[0]
    best = int(regular.argmax())
    return (int(periods[best]), float(regular[best])) if regular[best] > 0 else (0, 0.0)


def stretches(mask: Tensor, gap: int = 0) -> list[tuple[int, int]]:
    """Return the runs ``[a, b)`` of True in a mask [T]. Runs at most ``gap`` False rows apart are joined."""
    runs: list[tuple[int, int]] = []
    edge = torch.zeros(1, dtype=torch.int8, device="cpu")
    edges = torch.diff(mask.to(torch.int8), prepend=edge, append=edge)
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    for a, b in zip(starts, ends, strict=True):
        if runs and a - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((a, b))
    return runs


def rise(series: Tensor) -> tuple[int, int]:
    """Return ``[a, b)``, the largest rise of a (smoothed) series from its lowest value so far.

    The rise begins at the last row within `ONSET` of its height from the bottom.
    """
    values = torch.where(series.isfinite(), series, torch.inf)
    lowest = values.cummin(0)
    climbed = torch.where(series.isfinite(), series - lowest.values, -torch.inf)
    top = int(climbed.argmax())
    return _leaves(values[: top + 1], lowest.values[top].item(), values[top].item()), top + 1


def last_rise(series: Tensor) -> int:
    """Return the row at which the rise to the end of a (smoothed) series begins, as in `rise`."""
    values = torch.where(series.isfinite(), series, torch.inf)
    kept = values[values < torch.inf]
    return _leaves(values, kept.min().item(), kept[-1].item()) if len(kept) else 0


def _leaves(values: Tensor, bottom: float, top: float) -> int:
    """Return the last row that is within `ONSET` of the bottom."""
    near = values <= bottom + ONSET * (top - bottom)
    return int(near.nonzero().max()) if near.any() else 0


def correlation(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return Pearson's r of two series of equal length and its t; (0, 0) if either is constant or they are short."""
    kept = x.isfinite() & y.isfinite()
    x, y = x[kept] - x[kept].mean(), y[kept] - y[kept].mean()
    scale = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    if len(x) < LEAST_BLOCKS or scale <= 0:
        return 0.0, 0.0
    r = float((x * y).sum()) / scale
    return r, r * math.sqrt((len(x) - 2) / max(1 - r * r, 1e-12))


def ramp(value: float, none: float, full: float) -> float:
    """Return 0 at ``none``, 1 at ``full`` and a linear value between; 0 for NaN. ``none`` may be the larger."""
    if none == full:
        return float(value >= full)
    part = (value - none) / (full - none)
    return 0.0 if math.isnan(part) else min(max(part, 0.0), 1.0)
