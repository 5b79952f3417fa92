"""Write the study's page and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.budget import owners_report
from bench.budget.arms import ARMS, EXACT
from bench.budget.results import PSNR, WORST, Read, Record, Results, at_steps, at_time, milliseconds, speed
from bench.budget.variance_report import section
from bench.policies.faults import FAULTS
from bench.policies.report import NAMES, interval

ADVISED = "budget 2"
JUDGED = (ADVISED, "budget 3")  # the arms that are compared with what was asked
WITHIN, WITHIN_WORST = 0.1, 0.02  # at equal steps the budget may lose so many dB, and so much of the worst goal
AHEAD = 0.3  # dB that the budget should be ahead at equal time, on the photographs

HOW = """\
`python -m bench.budget` makes this page. `Spill(0.5, budget=b)` puts about `b * B` goal rows into graphs in place of
`K * B`, and lazy goals are computed for their rows alone. Problems, faults and figures are those of
[rules and scales](policies.md): two small VAEs, on digits (6 goals, B = 64) and photographs (9 goals, B = 16), with
other seeds. All arms of a seed start from the same weights, get the same images, and are trained in turn in one process
on one thread. Each is trained until it has the steps of a run, and the processor's seconds in which the exact rule made
these. *Equal steps* compares after the former, *equal time* after the latter. Evaluations do not count as time.
The networks of the digits are so small that lazy goals may cost more than their rows; *tensors* have the same loss.
Differences are from `exact` with the same seed, and brackets hold bootstrap 95% intervals of the mean. A higher PSNR is
better, and a lower worst goal (0 ideal, 1 no better than nothing).
"""


def cell(values: np.ndarray, digits: int, sign: bool = False) -> str:
    """Return the mean and its interval."""
    mean, low, high = interval(values)
    plus = "+" if sign else ""
    return "" if math.isnan(mean) else f"{mean:{plus}.{digits}f} ({low:{plus}.{digits}f}, {high:{plus}.{digits}f})"


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


def quality_table(results: Results) -> str:
    """Return the table of the runs without a fault."""
    heads = ["rule", "PSNR, dB, equal steps", "worst goal, equal steps", "PSNR, equal time", "worst goal, equal time"]
    heads += ["ms a step", "steps in the time of an exact one", "lazy goals' backward that runs"]
    lines = []
    for arm in results.arms:
        if not results.runs(arm):
            continue
        cells = []
        for at in (at_steps, at_time):
            for column, digits in ((PSNR, 2), (WORST, 3)):
                mean = f"{results.values(arm, at(column)).mean():.{digits}f}"
                gain = "" if arm == EXACT else f", {cell(results.gains(arm, at(column)), digits, sign=True)}"
                cells.append(mean + gain)
        cells += [f"{np.median(results.values(arm, milliseconds)):.1f}", f"{np.median(results.values(arm, speed)):.2f}"]
        cells.append(f"{np.mean(results.values(arm, lambda r: r['walked'])):.0%}" if ARMS[arm].lazy else "")
        lines.append([f"**{arm}**" if arm == ADVISED else arm, *cells])
    return rows(heads, lines)


def fault_table(results: Results, psnr: Read, worst: Read) -> str:
    """Return PSNR / worst goal of the exact rule under every fault, and the others' differences from it."""
    lines = []
    for arm in results.arms:
        cells = []
        for fault in FAULTS:
            own = arm == EXACT
            a, b = (
                results.values(arm, read, fault) if own else results.gains(arm, read, fault) for read in (psnr, worst)
            )
            sign = "" if own else "+"
            cells.append(f"{a.mean():{sign}.2f} / {b.mean():{sign}.3f}" if len(a) else "")
        if any(cells[1:]):
            lines.append([f"**{arm}**" if arm == ADVISED else arm, *cells])
    return rows(["rule", *FAULTS], lines)


def verdicts(results: Results, data: str, arm: str) -> list[str]:
    """Return sentences that compare an arm with what was asked of a budget."""
    found = {fault: results.gains(arm, at_steps(PSNR), fault) for fault in FAULTS}
    faults = [fault for fault, gains in found.items() if len(gains)]
    if not faults:
        return []
    psnr, worst = (
        {fault: results.gains(arm, at_steps(column), fault).mean() for fault in faults} for column in (PSNR, WORST)
    )
    low, high = min(psnr, key=psnr.__getitem__), max(worst, key=worst.__getitem__)
    met = psnr[low] >= -WITHIN and worst[high] <= WITHIN_WORST
    lines = [
        f"{arm} at equal steps, over {', '.join(faults)}: PSNR at least {psnr[low]:+.2f} dB from exact ({low}), "
        f"worst goal at most {worst[high]:+.3f} ({high}). At most {WITHIN} dB and {WITHIN_WORST} are asked for: "
        f"{'met' if met else 'missed'}."
    ]
    gain, worse = (results.gains(arm, at_time(column)).mean() for column in (PSNR, WORST))
    ask = ""
    if data == "photographs":
        met = gain >= AHEAD and worse <= 0
        ask = f" At least {AHEAD:+} dB and a worst goal no worse are asked for: {'met' if met else 'missed'}."
    lines.append(f"{arm} at equal time: PSNR {gain:+.2f} dB from exact, worst goal {worse:+.3f}.{ask}")
    return lines


def write(
    records: Sequence[Record], measured: Mapping[str, Any], to: Path, owned: Mapping[str, Any] | None = None
) -> str:
    """Write ``to``.md and the pictures beside it, and return the page.

    Args:
        records: the runs. measured: the variance, by data set. to: the page's path without its suffix.
        owned: the results about owners, by data set.
    """
    sets = {data: Results(r for r in records if r["data"] == data) for data in NAMES}
    sets = {data: results for data, results in sets.items() if results.runs(EXACT)}
    page = ["# A budget of rows", HOW]
    if sets:
        page += [f"![PSNR and worst goal against seconds of training]({to.name}.png)"]
        page += [f"![The same of the plain sum, a tuned one, and others' balancers]({to.name}_peers.png)"]
    for data, results in sets.items():
        steps = " or ".join(map(str, results.steps))
        counts = {arm: len(results.runs(arm)) for arm in results.arms}
        few = ", ".join(f"{arm} {n}" for arm, n in counts.items() if 0 < n < len(results.seeds))
        page += [f"## {NAMES[data]}", f"{len(results.seeds)} seeds{f' (but {few})' if few else ''}, {steps} steps."]
        page += [line for arm in JUDGED for line in verdicts(results, data, arm)]
        page += [quality_table(results), "### Faults", "PSNR / worst goal; below `exact`, differences from it."]
        page += ["At equal steps:", fault_table(results, at_steps(PSNR), at_steps(WORST))]
        page += ["At equal time:", fault_table(results, at_time(PSNR), at_time(WORST))]
    if measured:
        page += section(measured, f"{to.name}_variance.png")
    if owned:
        page += owners_report.section(owned)
    page += ["## The arms", "\n".join(f"- {name}: {arm.says}" for name, arm in ARMS.items())]
    text = "\n\n".join(page) + "\n"
    to.with_suffix(".md").write_text(text)
    if sets or measured:
        from bench.budget import pictures

        if sets:
            pictures.curves(sets, to.with_name(f"{to.name}.png"))
            pictures.curves(sets, to.with_name(f"{to.name}_peers.png"), pictures.PEERS)
        if measured:
            pictures.variance(measured, to.with_name(f"{to.name}_variance.png"))
    return text
