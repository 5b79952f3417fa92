"""Plot the study: the measure against the worst goal, and the measure under faults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.policies.arms import ARMS, BRIGHT, DEFAULT, EQUAL, TUNED
from bench.policies.peers import SUMS
from bench.policies.problems import NAMES, PROBLEMS
from bench.policies.results import Results, interval, worst

OURS, PEER, LEAD = "#2a6fbb", "#8a8f98", "#c8401e"
# Labelled arms, and the offset of each label from its point.
LABELS = {
    DEFAULT: (-7, 9),
    "spill 1/2": (6, -9),
    "anchored": (-7, -16),
    EQUAL: (6, 4),
    "gradient norms": (6, -9),
    "STCH": (6, -9),
    "UPGrad": (6, 4),
    TUNED: (9, -4),
}
FAR = 1.05  # arms no better than nothing are in the table alone
BAD = 2  # as are errors so many times those of equal weights
FAULTY = ("auto", "anchored", "spill 1/2", DEFAULT, EQUAL, TUNED)
COLUMNS = 4


def _colour(arm: str) -> str:
    return LEAD if arm == DEFAULT else PEER if arm in (TUNED, BRIGHT) or ARMS[arm].peer else OURS


def front(sets: Mapping[str, Results], to: Path) -> None:
    """Plot each problem's measure against the worst goal, with intervals for each arm, and every random sum."""
    columns = min(COLUMNS, len(sets))
    lines = -(-len(sets) // columns)
    size = 6.5 if columns <= 2 else 4.6
    figure, axes = plt.subplots(lines, columns, figsize=(size * columns, 0.8 * size * lines), squeeze=False)
    for ax in axes.flat[len(sets) :]:
        ax.set_axis_off()
    for ax, (data, results) in zip(axes.flat, sets.items(), strict=False):
        _front(ax, results)
        ax.set_title(NAMES[data], fontsize=10)
    if axes[0, 0].get_legend_handles_labels()[1]:
        axes[0, 0].legend(loc="lower left", fontsize=8)
    figure.suptitle(
        "Up and to the left is better (worst held-out goal: 0 ideal, 1 no better than nothing)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def _front(ax: Axes, results: Results) -> None:
    points = [(worst(r), results.main(r)) for r in results.sums]
    points = [point for point in points if np.isfinite(point).all() and point[0] < FAR]
    if points:
        ax.scatter(*zip(*points, strict=True), s=14, color="#c9cdd3", label=f"{SUMS} random weighted sums", zorder=1)
    for arm in results.arms:
        x, y = (interval(results.values(arm, "none", read)) for read in (worst, results.main))
        if not (np.isfinite([*x, *y]).all() and x[0] < FAR):
            continue
        ax.errorbar(
            x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            fmt="o", color=_colour(arm), ms=7 if arm == DEFAULT else 4, lw=1, zorder=3,
        )  # fmt: skip
        if arm in LABELS:
            ax.annotate(
                arm, (x[0], y[0]), xytext=LABELS[arm], textcoords="offset points", fontsize=8, color=_colour(arm)
            )
    if not results.measure.larger:
        low, high = ax.get_ylim()
        least = BAD * interval(results.values(EQUAL, "none", results.main))[0]
        ax.set_ylim(min(high, least) if np.isfinite(least) else high, max(low, 0))
    ax.set_xlabel("worst goal")
    ax.set_ylabel(results.measure.says)
    ax.grid(alpha=0.3)


def faults(sets: Mapping[str, Results], to: Path) -> None:
    """Plot the worst goal of some arms under every fault."""
    columns = min(2, len(sets))
    lines = -(-len(sets) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7 * columns, 3 * lines), squeeze=False)
    for ax in axes.flat[len(sets) :]:
        ax.set_axis_off()
    for ax, (data, results) in zip(axes.flat, sets.items(), strict=False):
        names = PROBLEMS[data].faults
        shown = [arm for arm in FAULTY if arm in results.arms]
        for i, arm in enumerate(shown):
            for j, fault in enumerate(names):
                mean, low, high = interval(results.values(arm, fault, worst))
                if not np.isfinite(mean):
                    continue
                ax.bar(
                    j + (i - len(shown) / 2 + 0.5) * 0.14, mean, 0.13, yerr=[[mean - low], [high - mean]],
                    color=_colour(arm), alpha=1 if arm == DEFAULT else 1 - 0.2 * (i % 3),
                    hatch="//" if arm == TUNED else None, edgecolor="white",
                    label=arm if j == 0 else None, error_kw={"lw": 1},
                )  # fmt: skip
        ax.set_xticks(range(len(names)), names)
        ax.set_ylabel("worst goal: less is better")
        ax.set_title(NAMES[data], fontsize=10)
        ax.legend(fontsize=7, ncols=len(shown))
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)
