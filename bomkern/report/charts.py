"""Charts for `bomkern.report`: stretchable SVG for shapes, and HTML for text, which stays legible at any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

import torch
from torch import Tensor

from ..diagnosis.trends import blocks

POINTS = 240  # largest number of points of a curve; a phone cannot show more
UNIT = 1000  # the size of the SVG on both axes; the browser stretches it
# Okabe & Ito's palette, which colour-blind readers can tell apart, with its light colours darkened until their contrast
# with the page is 3 (WCAG 1.4.11); the second row is for dark pages.
LIGHT = ("#0072B2", "#C08500", "#009E73", "#CC79A7", "#3C9BD6", "#D55E00", "#A39500", "#000000", "#7F3C8D")
DARK = ("#4FA3E0", "#F5B83D", "#2CC79B", "#E7A3CB", "#9AD8FF", "#FF8A3D", "#DCCB2A", "#C5CCD3", "#C08FD6")
DASHES = ("", "6 4", "8 3 2 3", "2 3", "10 2", "14 4 2 4", "4 8", "8 3 2 3 2 3")
LINE = 13  # height of a line of text in CSS pixels
WIDTH_OF_A_LETTER = 1.9  # in percent of a phone's width, for labels that must not overlap


def thin(series: Tensor) -> Tensor:
    """Return at most `POINTS` means of runs of rows of a series [T, ...]."""
    return blocks(series, POINTS) if len(series) > POINTS else series


def thin_extremes(series: Tensor) -> tuple[list[float], list[float]]:
    """Return the smallest and the largest value behind each point of `thin` for a series [T]; NaN if all are NaN."""
    count = min(POINTS, len(series))
    edges = torch.linspace(0, len(series), count + 1, device="cpu").round().long().tolist()
    runs = [series[a:b][series[a:b].isfinite()] for a, b in pairwise(edges)]
    least = [run.min().item() if len(run) else math.nan for run in runs]
    return least, [run.max().item() if len(run) else math.nan for run in runs]


def short(value: float) -> str:
    """Format a number for a tick or a table."""
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")


def colour(index: int) -> str:
    """Return the colour of a goal. Colours repeat; goals of the same colour differ in their `dash`."""
    return f"var(--c{index % len(LIGHT)})"


def dash(index: int) -> str:
    """Return the dashes of a goal's line.

    Neighbours among the first nine goals differ in their dashes, and 72 goals differ in colour or dashes.
    """
    turn, place = divmod(index, len(LIGHT))
    return DASHES[(place % 5 + turn) % len(DASHES)]


def swatch(index: int) -> str:
    """Return a short line in a goal's colour and dashes, for legends."""
    return (
        f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true"><line x1="0" y1="5" x2="28" y2="5" '
        f'stroke="{colour(index)}" stroke-dasharray="{dash(index)}"/></svg>'
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers within a range."""
    rough = (high - low) / count
    if not rough > 0 or not math.isfinite(rough):
        return [low]
    power = 10 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


class Chart:
    """Axes onto which curves are drawn.

    Args:
        label: description of the chart for screen readers.
        x, y: the ranges of the axes.
        height: in CSS pixels.
        y_name: the name of the y axis.
    """

    def __init__(
        self, label: str, x: tuple[float, float], y: tuple[float, float], height: int, y_name: str = ""
    ) -> None:
        self.label, self.x, self.y, self.height, self.y_name = label, x, y, height, y_name
        self._shapes: list[str] = []
        self._notes: list[tuple[float, str]] = []
        self._ends: list[tuple[float, str, int]] = []

    def _across(self, value: float) -> float:
        return UNIT * (value - self.x[0]) / max(self.x[1] - self.x[0], 1e-12)

    def _down(self, value: float) -> float:
        share = (value - self.y[0]) / max(self.y[1] - self.y[0], 1e-300)
        return UNIT * (1 - min(max(share, -1.0), 2.0))

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return an SVG path, with gaps at missing values."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if not math.isfinite(y):
                pen = "M"
                continue
            path.append(f"{pen}{self._across(x):.0f} {self._down(y):.0f}")
            pen = "L"
        return "".join(path)

    def line(self, xs: Sequence[float], ys: Sequence[float], stroke: str, dash: str = "", width: float = 2) -> None:
        self._shapes.append(
            f'<path class="line" d="{self._points(xs, ys)}" stroke="{stroke}" stroke-width="{width:g}" '
            f'stroke-dasharray="{dash}"/>'
        )

    def area(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], fill: str, name: str = "") -> None:
        both = [(x, a, b) for x, a, b in zip(xs, low, high, strict=True) if math.isfinite(a) and math.isfinite(b)]
        if not both:
            return
        top = self._points([x for x, _, _ in both], [b for _, _, b in both])
        bottom = self._points([x for x, _, _ in reversed(both)], [a for _, a, _ in reversed(both)])
        title = f"<title>{escape(name)}</title>" * bool(name)
        self._shapes.append(f'<path class="area" d="{top}L{bottom[1:]}Z" fill="{fill}">{title}</path>')

    def span(self, first: float, last: float) -> None:
        """Shade a range of x lightly."""
        left, right = self._across(first), self._across(last)
        self._shapes.append(f'<rect class="span" x="{left:.0f}" y="0" width="{right - left:.0f}" height="{UNIT}"/>')

    def note(self, y: float, text: str) -> None:
        """Write text at the right edge at height y. Texts that would overlap share a line."""
        top = min(max(100 * self._down(y) / UNIT, 0.0), 100.0)
        for i, (other, written) in enumerate(self._notes):
            if abs(other - top) * self.height < 100 * LINE:
                self._notes[i] = other, f"{written}, {text}"
                return
        self._notes.append((top, text))

    def end(self, y: float, text: str, index: int) -> None:
        """Write text beside the chart, where a curve of a goal's colour ends at height y."""
        if math.isfinite(y):
            self._ends.append((self.height * self._down(y) / UNIT, text, index))

    def _fits(self) -> bool:
        return (LINE + 1) * (len(self._ends) - 1) <= self.height

    def _beside(self) -> str:
        """Return the texts beside the chart in HTML, moved apart where they would overlap; none if they do not fit."""
        ends = sorted(self._ends) if self._fits() else []
        tops = spread([top for top, _, _ in ends], LINE + 1, self.height)
        return "".join(
            f'<span class="end" style="top:{top:.0f}px">{swatch(index)}<span>{escape(text)}</span></span>'
            for top, (_, text, index) in zip(tops, ends, strict=True)
        )

    def _step(self, x: float, x_name: str) -> str:
        """Return a label of the x axis, aligned to the right edge if it is near that."""
        across = self._across(x) / UNIT
        side = "right:0;transform:none" if across > 0.97 else f"left:{across:.2%}"
        return f'<span class="x" style="{side}">{x_name}{short(x) if x >= 1e5 else f"{x:.0f}"}</span>'

    def html(
        self, x_ticks: Sequence[float] = (), y_ticks: Sequence[float] = (), percent: bool = False, x_name: str = ""
    ) -> str:
        """Return the chart in HTML. ``x_name`` is put before the first label of the x axis."""
        grid = "".join(
            f'<line class="grid" x1="0" x2="{UNIT}" y1="{self._down(y):.0f}" y2="{self._down(y):.0f}"/>'
            for y in y_ticks
        )
        heights = "".join(
            f'<span class="y" style="top:{self._down(y) / UNIT:.2%}">{f"{y:.0%}" if percent else short(y)}</span>'
            for y in y_ticks
        )
        steps = "".join(self._step(x, f"{x_name} " * bool(x_name and not i)) for i, x in enumerate(x_ticks))
        notes = "".join(f'<span class="note" style="top:{y:.1f}%">{escape(text)}</span>' for y, text in self._notes)
        name = f'<span class="y-name">{escape(self.y_name)}</span>' * bool(self.y_name)
        labelled = " labelled" * bool(self._ends and self._fits())
        return (
            f'<div class="plot{labelled}" style="height:{self.height}px">'
            f'<svg viewBox="0 0 {UNIT} {UNIT}" preserveAspectRatio="none" role="img" aria-label="{escape(self.label)}">'
            f"{grid}{''.join(self._shapes)}</svg>"
            f'<div aria-hidden="true">{heights}{steps}{notes}{name}{self._beside()}</div></div>'
        )


def spread(places: Sequence[float], apart: float, most: float) -> list[float]:
    """Return sorted places, moved until they are ``apart``, and within 0 and ``most`` where there is room."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + apart)
    if moved and moved[-1] > most:
        moved[-1] = max(most, apart * (len(moved) - 1))
        for i in reversed(range(len(moved) - 1)):
            moved[i] = min(moved[i], moved[i + 1] - apart)
    return moved


def lanes(marks: Sequence[tuple[float, float, str, int]], x: tuple[float, float]) -> str:
    """Return labelled bars over a chart's x axis in HTML; bars that would touch are put into further rows.

    Args:
        marks: (first, last, label, index of the colour) of each bar.
        x: the range of the axis.
    """
    rows: list[list[tuple[float, float]]] = []
    parts = []
    for first, last, label, index in marks:
        left, right = (100 * (v - x[0]) / max(x[1] - x[0], 1e-12) for v in (first, last))
        right = max(right, left + 1)
        need = WIDTH_OF_A_LETTER * len(label)
        from_right = left + need > 100  # the label ends with the bar, or at the edge
        taken = (min(left, right - need), right) if from_right else (left, max(right, left + need))
        row = next((r for r, busy in enumerate(rows) if all(taken[1] < a or taken[0] > b for a, b in busy)), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(taken)
        side = f"right:{100 - right:.1f}%" if from_right else f"left:{left:.1f}%"
        parts.append(
            f'<span class="bar" style="top:{22 * row + 17}px;left:{left:.1f}%;width:{right - left:.1f}%;'
            f'background:{colour(index)}"></span>'
            f'<span class="tag" style="top:{22 * row}px;{side}">{escape(label)}</span>'
        )
    return f'<div class="lanes" style="height:{22 * len(rows) + 4}px" aria-hidden="true">{"".join(parts)}</div>'


def extent(*series: Tensor) -> tuple[float, float]:
    """Return the range of all finite values with a small margin; (0, 1) if there are none."""
    values = torch.cat([s.reshape(-1) for s in series])
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 1.0
    low, high = values.min().item(), values.max().item()
    margin = 0.05 * (high - low) or max(abs(high), 1e-6) * 0.1
    return low - margin, high + margin
