"""Write the study's page and plots, with bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.policies import overview, toy
from bench.policies.arms import ARMS, DEFAULT, TUNED
from bench.policies.faults import FAULTS
from bench.policies.problems import NAMES, PROBLEMS
from bench.policies.results import Read, Record, Results, cell, interval, mean, rows, worst

__all__ = ["NAMES", "interval", "write"]
DARK = 0.05  # part of the steps beyond which a goal's starvation is marked


def _name(arm: str) -> str:
    return f"**{arm}**" if arm == DEFAULT else arm


def main_table(results: Results) -> str:
    problem = PROBLEMS[results.data]
    measure, extras = results.measure, problem.extras
    heads = ["rule", measure.says, "worst goal", f"{measure.says.split(',')[0]} against the tuned sum"]
    heads += ["entropy of shares", "starved", *(extra.says for extra in extras), "backward, ms", "step, ms", "steps"]
    lines = []
    for arm in results.arms:

        def at(read: Read, arm: str = arm) -> np.ndarray:
            return results.values(arm, "none", read)

        tuned = TUNED in results.arms and arm != TUNED
        against = results.gain(arm, TUNED, "none", results.main) if tuned else np.array([])
        steps = at(lambda r: r.get("steps", problem.steps))
        lines.append(
            [
                _name(arm),
                cell(at(results.main), measure.digits),
                cell(at(worst), 3),
                cell(against, measure.digits, sign=True),
                mean(at(lambda r: r["entropy"]), 2),
                f"{100 * at(lambda r: r['starvation']).max():.0f}%",
                *(mean(at(lambda r, extra=extra: extra.of(r["test"])), extra.digits) for extra in extras),
                mean(at(lambda r: r["backward_ms"]), 1),
                mean(at(lambda r: r["step_ms"]), 1),
                f"{steps.mean():.0f}",
            ]
        )
    return rows(heads, lines)


def fault_table(results: Results) -> str:
    """Return a table of the main figure / worst goal under every fault."""
    faults, lines = PROBLEMS[results.data].faults, []
    for arm in results.arms:
        cells = []
        for fault in faults:
            good, bad = results.values(arm, fault, results.main), results.values(arm, fault, worst)
            dark = results.values(arm, fault, lambda r: r["starvation"])
            mark = "*" if len(dark) and dark.max() > DARK else ""
            cells.append(
                f"{mean(good, max(1, results.measure.digits - 1))} / {mean(bad, 2)}{mark}" if len(good) else ""
            )
        if any(cells[1:]):
            lines.append([_name(arm), *cells])
    return rows(["rule", *faults], lines) if lines else ""


def reported_table(results: Results) -> str:
    """Return a table of the runs in which the fault was named, and the steps until then."""
    faults, lines = PROBLEMS[results.data].faults[1:], []
    for arm in results.arms:
        cells = []
        for fault in faults:
            delays = [r["reported"] for r in results.runs(arm, fault) if "reported" in r]
            hits = sorted(steps for steps in delays if steps is not None)
            after = f", {hits[len(hits) // 2]} steps" if hits else ""
            cells.append(f"{len(hits)} of {len(delays)}{after}" if delays else "")
        if any(cells):
            lines.append([arm, *cells])
    return rows(["rule", *faults], lines) if lines else ""


def verdicts(results: Results) -> list[str]:
    """Return sentences that compare the default with the other rules."""
    says, digits = results.measure.says, results.measure.digits
    count = {arm: len(results.runs(arm, "none")) for arm in results.arms}
    few = [f"{arm} {n}" for arm, n in count.items() if n < len(results.seeds)]
    lines = [
        f"{max(count.values())} seeds, from {results.seeds[0]}"
        + (f", but of {', '.join(few)}" if max(count.values()) > min(count.values()) else "")
        + "."
    ]
    if not all("steps" in r for arm in results.arms for r in results.runs(arm, "none")):
        lines.append("Some of these runs are from before there was a time budget: they had equal updates.")
    if TUNED in results.arms and DEFAULT in results.arms:
        lines.append(
            f"Against the tuned sum ({results.tuned[TUNED]} of the random ones): {says} "
            f"{cell(results.gain(DEFAULT, TUNED, 'none', results.main), digits, True)} "
            f"({'more' if results.measure.larger else 'less'} is better), worst goal "
            f"{cell(results.gain(DEFAULT, TUNED, 'none', worst), 3, True)} (less is better)."
        )
    if results.sums and results.runs(DEFAULT, "none"):
        sign = 1 if results.measure.larger else -1
        mine = tuple(results.values(DEFAULT, "none", read).mean() for read in (results.main, worst))
        each = [(sign * (results.main(r) - mine[0]), mine[1] - worst(r)) for r in results.sums]
        better, beaten = sum(min(pair) >= 0 for pair in each), sum(max(pair) <= 0 for pair in each)
        lines.append(f"It dominates {beaten} of the {len(results.sums)} random sums, and {better} dominate it.")
    if "auto" in results.arms:
        gains = {f: results.gain(DEFAULT, "auto", f, results.main) for f in FAULTS if results.runs(DEFAULT, f)}
        above = ", ".join(f"{f} {gain.mean():+.1f}" for f, gain in gains.items() if len(gain))
        lines.append(f"{says} above `auto`: {above}.")
    dark = [r["starvation"] for f in FAULTS for r in results.runs(DEFAULT, f)]
    if dark:
        lines.append(f"Longest starvation of any goal, over all faults and seeds: {max(dark):.1%} of the steps.")
    return lines


HOW = """\
`python -m bench.policies` makes this page. It trains eight problems: two small VAEs, on scikit-learn's digits (six
goals) and on the trainer's photographs (nine goals), each with a live discriminator; three partial differential
equations, solved by networks (Helmholtz and Burgers with two and three goals, Poisson with five); thirteen tasks and
three tasks on the digits, with Adam and with SGD; and VICReg on the digits, with both. The seeds are paired, and were
not used while the rules were developed; brackets hold bootstrap 95% intervals of the mean. Every rule and every peer
gets the same ideals and nadirs, known before training, except *raw sum*, *literature*, and the three peers made for
equations, which weigh raw losses. All rules have the same time: a step of each was timed in turn with one of equal
weights, and a slower rule has so many fewer steps. Updates of a probe count. *Worst goal* is the largest held-out
deficit by these outside ideals and nadirs, 0 ideal and 1 no better than nothing. On the VAEs realism is judged there
by the distribution of fixed features, because every run trains its own judge. *Tuned sum* is the best of 30 random
weightings (log-uniform from 0.1 to 10) on a validation split, by its worst goal, or by the problem's measure among
those that leave no goal worse than nothing; its 30 runs are not counted. *Starved* is the longest part of the worst
run in which a goal at least half as badly off as the worst had under 1% of the gradient and got worse. Times are
processor time on one thread.
"""
FAULTY = """\
*untrained*: the discriminator does not train while scales are calibrated. *hot*: its learning rate is 4 times as high.
*drift*: a script adds up to 1.5 scales to one goal. *floor*: one goal cannot fall below 0.8. Cells are the measure /
worst goal; a star marks a goal that was starved for more than 5% of the steps in some run. An added constant has no
gradient, so drift and floor cannot hurt a sum with fixed weights: they are faults for rules that look at values.
"""


def sets_of(
    records: Mapping[Any, Record], tuned: Mapping[str, Mapping[str, str]], seeds: tuple[int, ...], tuning: int
) -> dict[str, Results]:
    """Return the results of each problem with runs."""
    every = {
        data: Results(data, [r for r in records.values() if r["data"] == data], picks, seeds, tuning)
        for data, picks in tuned.items()
    }
    return {data: results for data, results in every.items() if results.arms}


def write(
    records: Mapping[Any, Record], tuned: Mapping[str, Mapping[str, str]], seeds: tuple[int, ...], tuning: int, to: Path
) -> str:
    """Write ``to``.md and the plots beside it, and return the page."""
    sets = sets_of(records, tuned, seeds, tuning)
    page = ["# Which rule, scales and ideals", HOW]
    if len(sets) > 1:
        page += overview.section(sets)
    if sets:
        page += [f"![each problem's measure against the worst goal]({to.name}_front.png)"]
    faulty = {data: results for data, results in sets.items() if fault_table(results)}
    if faulty:
        page += ["## Faults", FAULTY, f"![faults]({to.name}_faults.png)"]
    page += toy.section(to.with_name(f"{to.name}_toy"))
    for data, results in sets.items():
        page += [f"## {NAMES[data]}", *verdicts(results), main_table(results)]
        if data in faulty:
            page += ["Under faults:", fault_table(results)]
        if reported := reported_table(results):
            page += ["Runs in which `bomkern.diagnose` named the goal at fault, and after how many steps:", reported]
    page += ["## The rules", "\n".join(f"- {name}: {arm.says}" for name, arm in ARMS.items())]
    text = "\n\n".join(page) + "\n"
    to.with_suffix(".md").write_text(text)
    if sets:
        from bench.policies import plots

        plots.front(sets, to.with_name(f"{to.name}_front.png"))
        if faulty:
            plots.faults(faulty, to.with_name(f"{to.name}_faults.png"))
    return text
