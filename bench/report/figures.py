"""Draw a machine's pictures: time and memory against batch size, shares of the ceilings, the whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import OPS, named
from bench.report.page import BOTH, CASES, largest
from bench.results import Results, Row

COLOURS = {
    "bomkern": "#2a6fbb",
    "bomkern triton": "#5fa8e0",
    "bomkern reference": "#a9c4de",
    "torch.compile": "#e0862b",
    "eager": "#8a8f98",
    "KeOps": "#5b9a68",
    "separate calls": "#9a7fc0",
}
PARTS = {"networks": "#c3c8cf", "statistics": "#2a6fbb", "loss": "#c8401e", "updates": "#e3dccb"}
PANELS = tuple(named(op, benches.panel) for op, benches in OPS.items())
SHORT = {
    "bomkern": "all graphs walked",
    "bomkern routed": "branches routed",
    "bomkern lazy": "owned rows alone",
    "bomkern spill": "spill, all rows",
    "bomkern default": "spill, budget 2",
    "bomkern default, dearest first": "the same, worst order",
    "bomkern default compiled": "spill, compiled",
}
INK, FAINT = "#33373d", "#d9dce1"


def draw(results: Results, folder: Path) -> None:
    """Write the pictures beside the results."""
    with plt.rc_context({"font.size": 9, "axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK}):
        for name, picture in (("time", _time), ("memory", _memory), ("ceilings", _ceilings), ("step", _step)):
            figure = picture(results)
            if figure is not None:
                figure.savefig(folder / f"{results.stem}_{name}.png", dpi=130, metadata={"Software": None})
                plt.close(figure)


def _points(results: Results, case: str, value: Callable[[Row], float | None]) -> dict[str, list[tuple[int, float]]]:
    """Return a line over the batch sizes for each peer, at the D with most of them."""
    dims = _dims(results, case)
    lines: dict[str, list[tuple[int, float]]] = {}
    for size, peers in results.of(case, BOTH).items():
        sized = dict(size)
        for peer, row in peers.items():
            if sized.get("D") == dims and (y := value(row)):
                lines.setdefault(peer, []).append((sized["B"], y))
    return lines


def _dims(results: Results, case: str) -> int | None:
    counts = [dict(size).get("D") for size in results.of(case, BOTH)]
    return max(counts, key=counts.count, default=None)


def _panels(
    results: Results, cases: Sequence[str], label: str, title: str, value: Callable[[Row], float | None]
) -> Figure | None:
    """Plot log-log lines against the batch size, with a panel for each case."""
    shown = [case for case in cases if any(len(line) > 1 for line in _points(results, case, value).values())]
    if not shown:
        return None
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(max(9, 3.1 * columns), 2.7 * rows + 0.8), squeeze=False)
    handles: dict[str, object] = {}
    for ax, case in zip(grid.flat, shown, strict=False):
        for peer, line in sorted(_points(results, case, value).items(), key=lambda item: item[0] == "bomkern"):
            ours = peer == "bomkern"
            (handles[peer],) = ax.plot(
                *zip(*line, strict=True), "o-", color=COLOURS[peer], lw=2.2 if ours else 1.3, ms=4 if ours else 3
            )
        dims = _dims(results, case)
        _log(ax, f"{case}, {f'D = {dims}' if dims else 'K = 9'}")
    for ax in grid.flat[len(shown) :]:
        ax.axis("off")
    for ax in grid[:, 0]:
        ax.set_ylabel(label)
    for ax in grid[-1]:
        ax.set_xlabel("batch size B")
    _head(figure, title, results)
    order = [peer for peer in COLOURS if peer in handles]
    figure.legend([handles[p] for p in order], order, loc="upper right", ncols=len(order), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / figure.get_figheight()))
    return figure


def _log(ax: Axes, title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_title(title, fontsize=9, loc="left")
    ax.grid(True, color=FAINT, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x < 1024 else f"{x / 1024:,.0f}K" if x < 2**20 else "1M")
    ax.minorticks_off()


def _head(figure: Figure, title: str, results: Results) -> None:
    figure.text(0.01, 1 - 0.25 / figure.get_figheight(), title, fontsize=12, fontweight="bold")
    figure.text(0.01, 1 - 0.45 / figure.get_figheight(), results.title, fontsize=8, color="#6b7178")


def _time(results: Results) -> Figure | None:
    return _panels(
        results, PANELS, "milliseconds", "Forward and backward", lambda row: 1e3 * row["seconds"]
    )  # fmt: skip


def _memory(results: Results) -> Figure | None:
    def peak(row: Row) -> float | None:
        return row["peak_bytes"] / 1e6 if row.get("peak_bytes", 0) >= 1e6 else None

    return _panels(results, PANELS, "MB at the peak", "Memory above the inputs", peak)


def _ceilings(results: Results) -> Figure | None:
    cases = [(case, at) for case in CASES if (at := largest(results, case)) and at[1]["bomkern"].get("share")]
    if not cases:
        return None
    peers = ("bomkern", "torch.compile", "eager")
    figure, ax = plt.subplots(figsize=(8, 0.5 * len(cases) + 1.6))
    for k, (_, (_, rows)) in enumerate(cases):
        for j, peer in enumerate(peers):
            share = rows.get(peer, {}).get("share")
            if share:
                at = -k + 0.25 * (1 - j)
                ax.barh(at, share, height=0.23, color=COLOURS[peer], label=peer if k == 0 else None)
                ax.text(share + 0.01, at, f"{share:.0%}", va="center", fontsize=7)
    unit = {"bytes": "copy", "exponentials": "exp2", "flops": "matrix product"}
    labels = [f"{case}\n{unit[rows['bomkern']['unit']]}, B = {dict(size)['B']:,}" for case, (size, rows) in cases]
    ax.set_yticks([-k for k in range(len(cases))], labels, fontsize=8)
    ax.axvline(1, color=INK, lw=1)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.set_xlabel("of what the machine did in the same run with nothing else to do")
    ax.spines[["top", "right"]].set_visible(False)
    _head(figure, "Share of the ceiling, forward and backward", results)
    figure.legend(loc="upper right", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
    return figure


def _step(results: Results) -> Figure | None:
    sizes = results.of("nine-goal step", "whole")
    if not sizes:
        return None
    heights = [len(peers) for peers in sizes.values()]
    figure, axes = plt.subplots(
        len(sizes), 1, figsize=(8, 0.34 * sum(heights) + 0.8 * len(sizes) + 0.8),
        height_ratios=heights, squeeze=False,
    )  # fmt: skip
    for ax, (size, peers) in zip(axes[:, 0], sizes.items(), strict=True):
        for k, row in enumerate(peers.values()):
            _bar(ax, -k, row)
            ax.text(row["seconds"], -k, f" {row['seconds'] * 1e3:,.0f} ms", va="center", fontsize=8)
        ax.set_yticks([-k for k in range(len(peers))], [_step_name(name) for name in peers])
        ax.set_title(f"B = {dict(size)['B']:,}", fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.1)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g} s")
    _head(figure, "A whole training step, nine goals", results)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, fc="white", ec=INK, hatch="////"))
    figure.legend(handles, [*PARTS, "not split"], loc="upper right", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / figure.get_figheight()))
    return figure


def _step_name(name: str) -> str:
    return f"bomkern, {SHORT[name]}" if name in SHORT else name.replace("plain", "plain PyTorch")


def _bar(ax: Axes, at: float, row: Row) -> None:
    """Draw the whole step's time, split in proportion to its separately timed parts."""
    if "parts" not in row:
        ax.barh(at, row["seconds"], height=0.7, fc="white", ec=INK, hatch="////", lw=0.8)
        return
    total, left = sum(row["parts"].values()), 0.0
    for part, seconds in row["parts"].items():
        width = row["seconds"] * seconds / total
        ax.barh(at, width, left=left, height=0.7, color=PARTS[part])
        left += width
