"""Plot the study: quality against the worst goal, and quality under faults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.policies.arms import BRIGHT, DEFAULT, TUNED
from bench.policies.faults import FAULTS
from bench.policies.peers import SUMS
from bench.policies.report import NAMES, Results, interval, psnr, worst

OURS, PEER, LEAD = "#2a6fbb", "#8a8f98", "#c8401e"
PEERS = ("sum", "STCH", "FAMO", "UPGrad", "balancer", "VQGAN", TUNED, BRIGHT)
# Labelled arms, and the offset of each label from its point.
LABELS = {
    DEFAULT: (-7, 9),
    "spill 1/3": (-50, 4),
    "anchored": (-7, -16),
    "sum": (6, 4),
    "UPGrad": (6, 4),
    "VQGAN": (6, -9),
    "best ideals": (6, -9),
    "anchored, global": (6, 4),
    TUNED: (9, -4),
    BRIGHT: (6, 6),
}
FAR = 1.0  # arms no better than nothing are in the table alone
FAULTY = ("auto", "anchored", DEFAULT, "sum", TUNED)


def _colour(arm: str) -> str:
    return LEAD if arm == DEFAULT else PEER if arm in PEERS else OURS


def front(sets: Mapping[str, Results], to: Path) -> None:
    """Plot PSNR against the worst goal, with intervals for each arm, and every random sum."""
    figure, axes = plt.subplots(1, len(sets), figsize=(6.5 * len(sets), 5.2), squeeze=False)
    for ax, (data, results) in zip(axes[0], sets.items(), strict=True):
        points = [(worst(r), psnr(r)) for r in results.sums]
        if points:
            ax.scatter(
                *zip(*points, strict=True), s=14, color="#c9cdd3", label=f"{SUMS} random weighted sums", zorder=1
            )
        for arm in results.arms:
            x, y = (interval(results.values(arm, "none", read)) for read in (worst, psnr))
            ax.errorbar(
                x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                fmt="o", color=_colour(arm), ms=7 if arm == DEFAULT else 4, lw=1, zorder=3,
            )  # fmt: skip
            if arm in LABELS and x[0] < FAR:
                ax.annotate(
                    arm, (x[0], y[0]), xytext=LABELS[arm], textcoords="offset points", fontsize=8, color=_colour(arm)
                )
        ax.set_xlim(right=FAR)
        ax.set_ylim(bottom=interval(results.values(DEFAULT, "none", psnr))[0] - 4)
        ax.set_xlabel("worst held-out goal (0 ideal, 1 no better than nothing: the rules beyond are in the table)")
        ax.set_ylabel("held-out PSNR, dB")
        ax.set_title(f"{NAMES[data]}: up and to the left is better")
        ax.grid(alpha=0.3)
        ax.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)


def faults(sets: Mapping[str, Results], to: Path) -> None:
    """Plot the PSNR of some arms under every fault."""
    figure, axes = plt.subplots(len(sets), 1, figsize=(9, 3.4 * len(sets)), squeeze=False)
    for ax, (data, results) in zip(axes[:, 0], sets.items(), strict=True):
        shown = [arm for arm in FAULTY if arm in results.arms]
        for i, arm in enumerate(shown):
            for j, fault in enumerate(FAULTS):
                mean, low, high = interval(results.values(arm, fault, psnr))
                ax.bar(
                    j + (i - len(shown) / 2 + 0.5) * 0.16, mean, 0.15, yerr=[[mean - low], [high - mean]],
                    color=_colour(arm), alpha=1 - 0.2 * (i % 3), hatch="//" if arm == TUNED else None,
                    edgecolor="white", label=arm if j == 0 else None, error_kw={"lw": 1},
                )  # fmt: skip
        ax.set_xticks(range(len(FAULTS)), FAULTS)
        ax.set_ylim(bottom=8)
        ax.set_ylabel("held-out PSNR, dB")
        ax.set_xlabel("planted fault")
        ax.set_title(NAMES[data])
        ax.legend(fontsize=8, ncols=len(shown))
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)
