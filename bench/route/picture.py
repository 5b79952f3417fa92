"""Draw two graphs: the branches that backward walks without routing, and with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bomkern.train.nine_goals import GOALS

WALKED, IDLE, LEAD = "#2a6fbb", "#d9dce1", "#c8401e"
OWNER = "cross_recon"
X = {"image": 0.0, "encoder": 1.0, "decode": 2.2, "goal": 3.6, "loss": 4.7}
DECODES = ("reconstruction", "swap", "moved structure", "moved appearance")
READS = {
    "reconstruction": (0,),
    "realism": (0,),
    "cross_recon": (1,),
    "behavioral_separation": (0, 2, 3),
}


def _edge(ax: Axes, a: tuple[float, float], b: tuple[float, float], on: bool, zeros: bool) -> None:
    colour = LEAD if on and not zeros else WALKED if on else IDLE
    style = {"color": colour, "lw": 2.2 if on and not zeros else 1.4, "shrinkA": 3, "shrinkB": 3}
    arrow = {"arrowstyle": "<-" if on else "-", "ls": ":" if on and zeros else "-", **style}
    ax.annotate("", xy=b, xytext=a, arrowprops=arrow, zorder=1)


def _node(ax: Axes, at: tuple[float, float], text: str, on: bool, lead: bool) -> None:
    face = LEAD if lead else WALKED if on else "#f2f3f5"
    ax.text(
        *at, text, ha="center", va="center", fontsize=8, color="white" if on else "#8a8f98", zorder=2,
        bbox={"boxstyle": "round,pad=0.35", "fc": face, "ec": face if on else IDLE},
    )  # fmt: skip


def _graph(ax: Axes, routed: bool, title: str) -> None:
    """Draw a graph with backward from right to left: solid edges carry gradient, dotted ones zeros."""
    encoder, loss = (X["encoder"], 4.0), (X["loss"], 4.0)
    decodes = [(X["decode"], 6.6 - 1.5 * k) for k in range(4)]
    goals = {name: (X["goal"], 8.0 - k) for k, name in enumerate(GOALS)}
    used = {d for name in GOALS for d in READS.get(name, ()) if name == OWNER or not routed}
    for name, at in goals.items():
        own, on = name == OWNER, name == OWNER or not routed
        _edge(ax, at, loss, on, not own)
        for d in READS.get(name, ()):
            _edge(ax, decodes[d], at, on, not own)
        if name not in READS:
            _edge(ax, encoder, at, on, not own)
        _node(ax, at, name, on, own)
    for d, at in enumerate(decodes):
        own = d in READS[OWNER]
        _edge(ax, encoder, at, d in used, not own)
        _node(ax, at, f"decode: {DECODES[d]}", d in used, own)
    _node(ax, encoder, "encoder", True, True)
    _node(ax, loss, "loss", True, True)
    ax.set_xlim(0.5, 5.1)
    ax.set_ylim(-0.7, 8.7)
    ax.axis("off")
    ax.set_title(title, fontsize=10)


def draw(results: dict[str, Any], to: Path) -> None:
    """Draw both graphs for a batch whose bottleneck is one goal, with the milliseconds of each backward."""
    spent = results["by_goal"][OWNER]
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.2))
    _graph(axes[0], False, f"autograd walks all graphs, most with zeros (dotted): {spent['never']:.0f} ms")
    _graph(axes[1], True, f"routed: the bottleneck's alone, {spent['always']:.0f} ms; the same gradient to the bit")
    figure.tight_layout()
    figure.savefig(to, dpi=110)
    plt.close(figure)
