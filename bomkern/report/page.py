"""`write_report`: write a self-contained HTML file that shows a run and its findings."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnosis.diagnose import NOTHING as NOTHING
from ..diagnosis.diagnose import Diagnosis
from ..diagnosis.registry import KINDS
from ..diagnosis.registry import is_information as is_information
from ..diagnosis.run_view import Column, columns_of, payoff_of
from ..diagnosis.trends import smooth
from ..goals.history import History
from .charts import Chart, colour, dash, extent, lanes, short, swatch, thin, thin_extremes, ticks
from .figures_as_data import disclosure
from .style import style

OWN = ' class="own"'
MARKED = 8  # findings that are marked on the charts; all are in the table
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


def write_report(
    path: str | os.PathLike[str],
    history: History,
    diagnosis: Diagnosis,
    *,
    payoff: Any = None,
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-contained HTML page of a run.

    The page shows the findings, water levels and shares with the findings marked, raw values, and optional parts.

    Args:
        path: path of the HTML file; an existing file is replaced.
        history: history of the run.
        diagnosis: result of `bomkern.diagnose` for the history.
        payoff: result of `bomkern.probe`, or ``{"goals": K names, "table": K x K raw values}``.
        pictures: PNG, JPEG or SVG files by caption, which are embedded.
        config: settings of the run, shown as they are.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        OSError: a picture cannot be read, or the file cannot be written.
    """
    if not isinstance(history, History):
        raise TypeError(f"history must be a History, got {type(history).__name__}")
    if not isinstance(diagnosis, Diagnosis):
        raise TypeError(f"diagnosis must be a Diagnosis, got {type(diagnosis).__name__}")
    parts = [_head(history, diagnosis), _findings(diagnosis)]
    if len(history):
        parts += [_goals(history), _levels(history, diagnosis), _shares(history, diagnosis), _raw(history, diagnosis)]
    if payoff is not None:
        parts.append(_payoff(payoff))
    if pictures:
        parts.append(_pictures(pictures))
    if config:
        parts.append(_config(config))
    titles = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', "".join(parts))
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in titles)
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' * bool(links)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>bomkern: which bucket has a hole?</title><style>{style()}</style></head><body><main>"
        f"{parts[0]}{contents}{''.join(parts[1:])}</main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _section(title: str, body: str, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{title.lower().replace(" ", "-")}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def _head(history: History, diagnosis: Diagnosis) -> str:
    first, last = diagnosis.steps
    count, idle = len(diagnosis.faults), len(diagnosis) - len(diagnosis.faults)
    verdict = diagnosis.note or (f"{count} finding{'s' * (count != 1)}" if count else NOTHING)
    verdict += f", and {idle} for information" * bool(count and idle)
    over = f"steps {first} to {last}" if last >= first else "no step yet"
    held = f"<p>{escape(diagnosis.held[0].upper() + diagnosis.held[1:])}.</p>" if diagnosis.held else ""
    return (
        f"<header><h1>Which bucket has a hole?</h1><p><strong>{escape(verdict[0].upper() + verdict[1:])}.</strong> "
        f"{len(history.layout.goals)} goals, {over}.</p>{held}{_pull(diagnosis)}</header>"
    )


def _pull(diagnosis: Diagnosis) -> str:
    """Return a paragraph if a goal's estimated part of the gradient's norm far exceeds its share of the samples."""
    name = max(diagnosis.pull, key=lambda goal: diagnosis.pull[goal] - diagnosis.share[goal], default=None)
    if name is None or diagnosis.pull[name] - diagnosis.share[name] < 0.3:
        return ""
    return (
        f"<p>By the range of its values, {escape(name)} has about {diagnosis.pull[name]:.0%} of the gradient's norm "
        f"with {diagnosis.share[name]:.0%} of the samples (an estimate: a history holds no gradients).</p>"
    )


def _table(name: str, heads: Sequence[str], bodies: str) -> str:
    row = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return f'<table class="{name}"><thead><tr>{row}</tr></thead>{bodies}</table>'


def _breakable(name: str) -> str:
    """Return a name in HTML that may break after its underscores, for phones."""
    return escape(name).replace("_", "_<wbr>")


def _prose(text: str) -> str:
    """Return a sentence in HTML whose arrows do not break."""
    return escape(text).replace("-&gt;", '<span class="whole">-&gt;</span>')


def _findings(diagnosis: Diagnosis) -> str:
    if not len(diagnosis):
        return ""
    bodies = []
    for n, f in enumerate(diagnosis, 1):
        calm = ' class="calm"' if is_information(f.kind) else ""
        meaning = KINDS[f.kind].meaning if f.kind in KINDS else ""
        bodies.append(
            f'<tbody{calm}><tr><th scope="row">{n}</th><td><strong>{escape(f.kind)}</strong><br>'
            f'<small>{escape(meaning)}</small></td><td class="name">{_breakable(f.goal)}</td>'
            f"<td>{f.first}\u2013{f.last}</td><td>{f.confidence:.0%}</td></tr>"
            f'<tr class="more"><td></td><td colspan="4">{_prose(f.evidence)}.<br><strong>Change:</strong> '
            f"{_prose(f.suggestion)}.</td></tr></tbody>"
        )
    lead = (
        "Worst first. \u201cSure\u201d comes from the evidence alone: the trend beyond the noise, the length of the "
        "window, the share held. It can be wrong."
    )
    heads = ("#", "Finding", "Goal", "Steps", "Sure")
    return _section("Findings", _table("findings", heads, "".join(bodies)), lead)


def _goals(history: History) -> str:
    """Return the legend of all charts, with each goal's constraint."""
    layout, items = history.layout, []
    for g, name in enumerate(layout.goals):
        own = [str(c) for c, o in zip(layout.constraints, layout.owner, strict=True) if o == g]
        items.append(f"<li>{swatch(g)}<span><b>{escape(name)}</b> <small>{escape('; '.join(own))}</small></span></li>")
    return _section("Goals", f'<ul class="legend">{"".join(items)}</ul>')


def _marks(history: History, diagnosis: Diagnosis) -> list[tuple[int, int, str, int]]:
    goals = history.layout.goals
    return [
        (f.first, f.last, f"{n} {f.kind}: {f.goal}", goals.index(f.goals[0]) if f.goals else 7)
        for n, f in enumerate(diagnosis, 1)
        if not is_information(f.kind)
    ][:MARKED]


def _x(history: History) -> tuple[float, float]:
    return float(history.first + 1), float(max(int(history.steps[-1]), history.first + 2))


def _steps(history: History) -> list[float]:
    middles = history.steps.double() - (history.stride - 1) / 2
    return [float(x) for x in thin(middles).tolist()]


def _chart(history: History, diagnosis: Diagnosis, chart: Chart, y_ticks: list[float], percent: bool = False) -> str:
    x = _x(history)
    return (
        f"<figure>{lanes(_marks(history, diagnosis), x)}{chart.html(ticks(*x, 5), y_ticks, percent)}"
        '<figcaption class="axis">step</figcaption></figure>'
    )


def _levels(history: History, diagnosis: Diagnosis) -> str:
    level = smooth(history["level"].double(), max(1, len(history) // 60))
    top = max(1.05, min(extent(level)[1], 2.0))
    ends = ", ".join(f"{n} {_end(values):.2f}" for n, values in zip(history.layout.goals, level.T, strict=True))
    label = f"Water level of each goal over the steps. At the end: {ends}"
    chart = Chart(label, _x(history), (0, top), 260, "mean score")
    for first, last, _, _ in _marks(history, diagnosis)[:3]:
        if last - first < 0.9 * (chart.x[1] - chart.x[0]):  # a shade over the whole chart would say nothing
            chart.span(first, last)
    curves = dict(zip(history.layout.goals, thin(level).T.tolist(), strict=True))
    for g, (name, values) in enumerate(curves.items()):
        chart.line(_steps(history), values, colour(g), dash(g))
        chart.end(_end(level[:, g]), name, g)
    body = _chart(history, diagnosis, chart, ticks(0, top)) + disclosure("levels", {"step": _steps(history), **curves})
    return _section("Water levels", body, "Mean score of each goal; 1 is its ideal, 0.37 its nadir.")


def _shares(history: History, diagnosis: Diagnosis) -> str:
    share = smooth(history["share"].double(), max(1, len(history) // 60)).nan_to_num()
    total = ", ".join(f"{n} {v:.0%}" for n, v in zip(history.layout.goals, share.mean(0).tolist(), strict=True))
    label = f"Share of the gradient of each goal over the steps. On average: {total}"
    chart = Chart(label, _x(history), (0, 1), 260, "share")
    tops = thin(share.cumsum(1))
    below = torch.cat([torch.zeros_like(tops[:, :1]), tops[:, :-1]], dim=1)
    parts = dict(zip(history.layout.goals, (tops - below).T.tolist(), strict=True))
    for g, name in enumerate(history.layout.goals):
        chart.area(_steps(history), below[:, g].tolist(), tops[:, g].tolist(), colour(g), name)
        chart.end(float(below[-1, g] + tops[-1, g]) / 2, name, g)
    body = _chart(history, diagnosis, chart, [0, 0.25, 0.5, 0.75, 1], percent=True)
    body += disclosure("shares", {"step": _steps(history), **parts})
    lead = "Who got the gradient: each goal's part of the samples, or its weight. First goal at the bottom."
    return _section("Shares of the gradient", body, lead)


def _raw(history: History, diagnosis: Diagnosis) -> str:
    figures = "".join(_panel(history, diagnosis, k, column) for k, column in enumerate(columns_of(history.layout)))
    lead = (
        "Mean over the batch: the band spans single rows, the line is their moving mean. Dashed: ideal; dotted: nadir, "
        "or the limits of a box. Shaded: findings about the goal."
    )
    return _section("Raw values", f'<div class="grid">{figures}</div>{_raw_data(history)}', lead)


def _raw_data(history: History) -> str:
    """Return the numbers behind the charts of raw values: of each goal the mean, and the least and the largest row."""
    columns: dict[str, Sequence[float]] = {"step": _steps(history)}
    for k, column in enumerate(columns_of(history.layout)):
        raw = history["raw"][:, k].double()
        raw = torch.where(raw.isfinite(), raw, torch.nan)
        columns[column.name] = thin(raw).tolist()
        columns[f"{column.name} least"], columns[f"{column.name} largest"] = thin_extremes(raw)
    return disclosure("raw_values", columns)


def _end(values: Tensor) -> float:
    """Return the last value that is not NaN, or NaN if there is none."""
    known = values[~values.isnan()]
    return float(known[-1]) if len(known) else math.nan


def _guides(history: History, k: int, column: Column) -> list[tuple[str, Tensor]]:
    """Return the guide lines of a chart of raw values: a name and values [T] each."""
    ideal, scale = history["ideal"][:, k].double(), history["scale"][:, k].double()
    if column.box:
        edges = zip(("lower", "upper"), column.box, strict=True)
        return [(name, torch.full_like(ideal, edge)) for name, edge in edges]
    if column.has_limit:
        return [("limit", ideal)]
    return [("ideal", ideal), ("nadir", column.nadir(ideal, scale))]


def _panel(history: History, diagnosis: Diagnosis, k: int, column: Column) -> str:
    raw = history["raw"][:, k].double()
    raw = torch.where(raw.isfinite(), raw, torch.nan)
    calm = smooth(raw, max(1, len(raw) // 40))
    low, high = extent(raw)
    guides, room = _guides(history, k, column), high - low
    near = [(n, v) for n, v in guides if low - room <= _end(v) <= high + room]
    low, high = extent(raw, *(torch.tensor([_end(values)], device="cpu") for _, values in near))
    end = short(_end(calm)) if calm.isfinite().any() else "none"
    summary = ", ".join(f"{n} {short(_end(v))}" + " (off the scale)" * (n not in dict(near)) for n, v in guides)
    chart = Chart(f"Raw value of {column.name}, at the end {end}; {summary}", _x(history), (low, high), 110)
    name = history.layout.goals[column.goal]
    for finding in diagnosis.faults:
        if name in finding.goals:
            chart.span(finding.first, finding.last)
    xs = _steps(history)
    chart.area(xs, *thin_extremes(raw), colour(column.goal))
    chart.line(xs, thin(calm).tolist(), colour(column.goal))
    for guide, values in near:
        chart.line(xs, thin(values).tolist(), "var(--ink)", "5 4" if guide == "ideal" else "1.5 3", 1.2)
        chart.note(_end(values), guide)
    return (
        f"<figure><figcaption>{swatch(column.goal)} <b>{escape(column.name)}</b> {end}<br>"
        f"<small>{escape(summary)}</small></figcaption>"
        f"{chart.html(ticks(*chart.x, 3), ticks(low, high, 2), x_name='step')}</figure>"
    )


def _payoff(payoff: Any) -> str:
    values = payoff_of(payoff)
    names = list(dict.fromkeys(trained for trained, _ in values))
    rows = ""
    for trained in names:
        cells = "".join(f"<td{OWN * (seen == trained)}>{escape(short(values[trained, seen]))}</td>" for seen in names)
        rows += f'<tr><th scope="row">{escape(trained)}</th>{cells}</tr>'
    told = payoff.to_dict() if hasattr(payoff, "to_dict") else payoff
    for anchor in ("ideal", "nadir"):
        cells = "".join(f"<td>{escape(short(float(value)))}</td>" for value in told.get(f"{anchor}s", ()))
        rows += f'<tr><th scope="row">{anchor}</th>{cells}</tr>' if cells else ""
    table = _table("numbers", ("trained on", *names), f"<tbody>{rows}</tbody>")
    own = "on the diagonal its ideal, worst in its column its nadir."
    lead = f"Raw values after training on each goal alone: {'below them the anchors.' if told.get('ideals') else own}"
    return _section(
        "Payoff table", f'<div class="scroll" tabindex="0" role="region" aria-label="Payoff table">{table}</div>', lead
    )


def _pictures(pictures: Mapping[str, str | os.PathLike[str]]) -> str:
    figures = ""
    for caption, file in pictures.items():
        path = Path(file)
        if path.suffix.lower() not in MIME:
            raise ValueError(f"pictures: {path.name} must be one of {', '.join(MIME)}")
        data = base64.b64encode(path.read_bytes()).decode()
        text = escape(caption)
        figures += (
            f'<figure><img alt="{text}" src="data:{MIME[path.suffix.lower()]};base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return _section("Pictures", figures)


def _config(config: Mapping[str, Any]) -> str:
    rows = ""
    for name, value in config.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        rows += f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(text)}</td></tr>'
    return _section("Configuration", _table("config", ("Setting", "Value"), f"<tbody>{rows}</tbody>"))
