"""The numbers behind a chart of `bomkern.report`, as CSV that can be selected or saved without a script."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape


def csv_of(columns: Mapping[str, Sequence[float]]) -> str:
    """Return CSV with a line of names and a line for each value; what is not finite is empty, others have 5 digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow(f"{value:.5g}" if math.isfinite(value) else "" for value in row)
    return out.getvalue()


def disclosure(name: str, columns: Mapping[str, Sequence[float]]) -> str:
    """Return a closed part of the page with the numbers of a chart, and a link that saves them as ``name``.csv."""
    text = csv_of(columns)
    link = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
    return (
        f'<details class="data"><summary>Data</summary><p><a download="{escape(name)}.csv" '
        f'href="{link}">Save {escape(name)}.csv</a></p>'
        f'<pre tabindex="0" role="region" aria-label="Data of {escape(name)}">{escape(text)}</pre></details>'
    )
