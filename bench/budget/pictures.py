"""Draw PSNR and the worst goal against seconds of training, and the noise that a budget adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.budget.arms import EXACT
from bench.budget.results import PSNR, SECONDS, WORST, Record, Results, at_steps, curve
from bench.policies.arms import TUNED
from bench.policies.report import NAMES
from bomkern.report.charts import LIGHT

# Colour, dashes and width of each arm that is drawn.
Styles = dict[str, tuple[str, str, float]]
STYLES: Styles = {
    "sum": ("#8a8f98", "--", 1.4),
    "hard": (LIGHT[2], "-.", 1.4),
    EXACT: (LIGHT[0], "-", 1.8),
    "budget 1": (LIGHT[1], ":", 1.8),
    "budget 2": (LIGHT[5], "-", 2.4),
    "budget 3": (LIGHT[3], "--", 1.6),
}
# FAMO is in the table alone: it hardly leaves its start, and would flatten the other curves.
PEERS: Styles = {
    "sum": STYLES["sum"],
    TUNED: (LIGHT[7], ":", 1.8),
    "STCH": (LIGHT[2], "-.", 1.6),
    "UPGrad": (LIGHT[3], "--", 1.8),
    EXACT: STYLES[EXACT],
    "budget 2": STYLES["budget 2"],
}
LABELS = {
    **{name: name for name in PEERS},
    TUNED: "best of 30 weightings",
    "sum": "plain sum",
    "hard": "hard minimum",
    EXACT: "spill 1/2, all rows",
    "budget 1": "spill 1/2, budget 1",
    "budget 2": "spill 1/2, budget 2",
    "budget 3": "spill 1/2, budget 3",
}
EARLY = 0.25  # part of the time whose curves the axes may cut off: all rise alike there


def curves(sets: Mapping[str, Results], to: Path, styles: Styles = STYLES) -> None:
    """Draw the median over seeds and the band from the lowest to the highest; dots are the steps of a run."""
    datas = sorted(sets, key=lambda data: data != "photographs")
    figure, axes = plt.subplots(2, len(datas), figsize=(6.2 * len(datas), 7.4), squeeze=False)
    for column, data in enumerate(datas):
        for ax, figure_of, name in zip(
            axes[:, column], (PSNR, WORST), ("held-out PSNR, dB", "worst held-out goal"), strict=True
        ):
            _panel(ax, sets[data], figure_of, styles)
            ax.set_ylabel(name)
            ax.set_xlabel("seconds of training, one core")
            ax.grid(alpha=0.3)
        axes[0, column].set_title(f"{NAMES[data]}: higher is better")
        axes[1, column].set_title("lower is better (1: no better than nothing)", fontsize=10)
    most = max(axes[0], key=lambda ax: len(ax.get_legend_handles_labels()[1]))
    most.legend(loc="lower right", fontsize=8, title="dot: the steps of a run", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def _panel(ax: Axes, results: Results, column: int, styles: Styles) -> None:
    """Draw one figure of one data set against seconds, up to those of the exact rule's steps."""
    end = float(np.median([r["clock"] for r in results.runs(EXACT)]))
    grid = np.linspace(0, end, 200)
    shown: list[np.ndarray] = []
    for arm, (colour, dashes, width) in styles.items():
        runs = results.runs(arm)
        if not runs:
            continue
        lines = np.array([_on(grid, r, column, end) for r in runs])
        begun = ~np.isnan(lines).any(0)
        x, middle = grid[begun], np.median(lines[:, begun], axis=0)
        low, high = lines[:, begun].min(0), lines[:, begun].max(0)
        ax.plot(x, middle, color=colour, ls=dashes, lw=width, label=LABELS[arm], zorder=3)
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        shown += [part[x >= EARLY * end] for part in (low, high)]
        seconds = end * float(np.median(results.values(arm, lambda r: at_steps(SECONDS)(r) / r["clock"])))
        value = float(np.median(results.values(arm, at_steps(column))))
        if seconds <= 1.001 * end:
            ax.plot(seconds, value, "o", color=colour, ms=5, zorder=4)
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if len(values) and float(np.ptp(values)) > 0:
        edge = 0.05 * float(np.ptp(values))
        ax.set_ylim(float(values.min()) - edge, float(values.max()) + edge)
    ax.set_xlim(0, 1.02 * end)


def _on(grid: np.ndarray, r: Record, column: int, end: float) -> np.ndarray:
    """Return a figure of a run at the seconds of the grid, NaN where there is none.

    The run's seconds are scaled so that the exact rule beside it ends at ``end``: seeds may meet another load.
    """
    seconds, values = curve(r, column)
    return np.interp(grid, seconds * (end / r["clock"]) * (1 + 1e-9), values, left=np.nan, right=np.nan)


def variance(measured: Mapping[str, Any], to: Path) -> None:
    """Draw the noise that drawn rows add to that of the batches, against the budget."""
    figure, axes = plt.subplots(1, len(measured), figsize=(5.6 * len(measured), 4.2), squeeze=False)
    for ax, (data, found) in zip(axes[0], measured.items(), strict=True):
        for index, (ratio, at) in enumerate(found["ratios"].items()):
            budgets = [float(budget) for budget in at["budgets"]]
            noise = [at["budgets"][budget]["nested"] / at["batches"] for budget in at["budgets"]]
            ax.plot(budgets, noise, "os^D"[index % 4] + "-", color=LIGHT[index], label=f"ratio {ratio}", ms=5)
        ax.axhline(1, color="#8a8f98", lw=1, ls="--")
        ax.annotate("as much as the batches", (0.98, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    fontsize=8, color="#57606a")  # fmt: skip
        ax.set_yscale("log")
        ax.set_xlabel("budget, in batches of rows")
        ax.set_ylabel("variance by drawn rows / by batches")
        ax.set_title(f"{NAMES[data]}, B = {found['batch']}, {len(found['goals'])} goals")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)
