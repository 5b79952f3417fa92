"""Write the study's page and plots, with bootstrap intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.policies.arms import ARMS, DEFAULT, TUNED
from bench.policies.faults import FAULTS

Record = dict[str, Any]
DRAWS = 10_000
DARK = 0.05  # part of the steps beyond which a goal's starvation is marked


class Results:
    """The runs of one data set, by arm and fault, in the order of the seeds.

    Args:
        records: all runs. tuned: the random sum behind each tuned sum, by name. seeds: seeds of the arms.
        tuning: seed of the random sums.
    """

    def __init__(self, records: list[Record], tuned: Mapping[str, str], seeds: tuple[int, ...], tuning: int) -> None:
        self.by = {(r["arm"], r["fault"], r["seed"]): r for r in records}
        self.tuned, self.seeds = tuned, seeds
        self.sums = [r for r in records if r["seed"] == tuning and r["arm"].startswith("sum ")]
        self.arms = [arm for arm in (*ARMS, *tuned) if self.runs(arm, "none")]

    def runs(self, arm: str, fault: str) -> list[Record]:
        """Return the runs of an arm under a fault, of the seeds that have been run so far."""
        name = self.tuned.get(arm, arm)
        return [self.by[name, fault, seed] for seed in self.seeds if (name, fault, seed) in self.by]

    def values(self, arm: str, fault: str, read: Callable[[Record], float]) -> np.ndarray:
        return np.array([read(r) for r in self.runs(arm, fault)], float)

    def gain(self, arm: str, other: str, fault: str, read: Callable[[Record], float]) -> np.ndarray:
        """Return paired differences over the seeds that both arms have."""
        a, b = ({r["seed"]: read(r) for r in self.runs(name, fault)} for name in (arm, other))
        return np.array([a[seed] - b[seed] for seed in self.seeds if seed in a and seed in b], float)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and its bootstrap 95% interval."""
    if not len(values):
        return math.nan, math.nan, math.nan
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    return float(values.mean()), *(float(q) for q in np.quantile(draws, (0.025, 0.975)))


def psnr(r: Record) -> float:
    return r["test"]["psnr"]


def worst(r: Record) -> float:
    return r["test"]["worst"]


def _cell(values: np.ndarray, digits: int, sign: bool = False) -> str:
    mean, low, high = interval(values)
    if math.isnan(mean):
        return ""
    plus = "+" if sign else ""
    return f"{mean:{plus}.{digits}f} ({low:{plus}.{digits}f}, {high:{plus}.{digits}f})"


def _mean(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():.{digits}f}" if len(values) else ""


def _rows(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(results: Results) -> str:
    heads = ["rule", "PSNR, dB", "worst goal", "PSNR against the tuned sum", "SSIM", "entropy of shares", "starved"]
    heads += ["KL, nats", "active units", "backward, ms", "step, ms"]
    rows = []
    for arm in results.arms:

        def at(read: Callable[[Record], float], arm: str = arm) -> np.ndarray:
            return results.values(arm, "none", read)

        against = results.gain(arm, TUNED, "none", psnr) if arm != TUNED and TUNED in results.arms else np.array([])
        rows.append(
            [
                f"**{arm}**" if arm == DEFAULT else arm,
                _cell(at(psnr), 2),
                _cell(at(worst), 3),
                _cell(against, 2, sign=True),
                _mean(at(lambda r: r["test"]["ssim"]), 3),
                _mean(at(lambda r: r["entropy"]), 2),
                f"{100 * at(lambda r: r['starvation']).max():.0f}%",
                _mean(at(lambda r: r["test"]["kl"]), 1),
                _mean(at(lambda r: r["test"]["active"]), 2),
                _mean(at(lambda r: r["backward_ms"]), 1),
                _mean(at(lambda r: r["step_ms"]), 1),
            ]
        )
    return _rows(heads, rows)


def fault_table(results: Results) -> str:
    """Return a table of PSNR / worst goal under every fault."""
    rows = []
    for arm in results.arms:
        cells = []
        for fault in FAULTS:
            good, bad = results.values(arm, fault, psnr), results.values(arm, fault, worst)
            dark = results.values(arm, fault, lambda r: r["starvation"])
            mark = "*" if len(dark) and dark.max() > DARK else ""
            cells.append(f"{good.mean():.1f} / {bad.mean():.2f}{mark}" if len(good) else "")
        if any(cells[1:]):
            rows.append([f"**{arm}**" if arm == DEFAULT else arm, *cells])
    return _rows(["rule", *FAULTS], rows)


def reported_table(results: Results) -> str:
    """Return a table of the runs in which the fault was named, and the steps until then."""
    rows = []
    for arm in results.arms:
        cells = []
        for fault in list(FAULTS)[1:]:
            delays = [r["reported"] for r in results.runs(arm, fault) if "reported" in r]
            hits = sorted(steps for steps in delays if steps is not None)
            after = f", {hits[len(hits) // 2]} steps" if hits else ""
            cells.append(f"{len(hits)} of {len(delays)}{after}" if delays else "")
        if any(cells):
            rows.append([arm, *cells])
    return _rows(["rule", *list(FAULTS)[1:]], rows)


def verdicts(results: Results) -> list[str]:
    """Return sentences that compare the default with the other rules."""
    count = {arm: len(results.runs(arm, "none")) for arm in results.arms}
    few = [f"{arm} {n}" for arm, n in count.items() if n < len(results.seeds)]
    lines = [
        f"{max(count.values())} seeds"
        + (f", but of {', '.join(few)}" if max(count.values()) > min(count.values()) else "")
        + "."
    ]
    if TUNED in results.arms:
        lines.append(
            f"Against the tuned sum ({results.tuned[TUNED]} of the random ones): PSNR "
            f"{_cell(results.gain(DEFAULT, TUNED, 'none', psnr), 2, True)} dB, worst goal "
            f"{_cell(results.gain(DEFAULT, TUNED, 'none', worst), 3, True)} (less is better)."
        )
    if results.sums and results.runs(DEFAULT, "none"):
        mine = (results.values(DEFAULT, "none", psnr).mean(), results.values(DEFAULT, "none", worst).mean())
        better = sum(psnr(r) >= mine[0] and worst(r) <= mine[1] for r in results.sums)
        beaten = sum(psnr(r) <= mine[0] and worst(r) >= mine[1] for r in results.sums)
        lines.append(f"It dominates {beaten} of the {len(results.sums)} random sums, and {better} dominate it.")
    gains = {f: interval(results.gain(DEFAULT, "auto", f, psnr))[0] for f in FAULTS if results.runs(DEFAULT, f)}
    lines.append("PSNR above `auto`, dB: " + ", ".join(f"{f} {g:+.1f}" for f, g in gains.items()) + ".")
    dark = [r["starvation"] for f in FAULTS for r in results.runs(DEFAULT, f)]
    if dark:
        lines.append(f"Longest starvation of any goal, over all faults and seeds: {max(dark):.1%} of the steps.")
    return lines


NAMES = {"digits": "Digits", "photographs": "Photographs"}
HOW = """\
`python -m bench.policies` makes this page. It trains two small VAEs, on scikit-learn's digits (six goals, 1,500 steps)
and on the trainer's photographs (nine goals, 320 steps), each with a live discriminator. The seeds are paired, and were
not used while the rules were developed; brackets hold bootstrap 95% intervals of the mean. Every rule that can use them
gets the same ideals and nadirs, known before training. All rules have the same number of updates: those of a probe
count. *Worst goal* is the largest held-out deficit by these outside ideals and nadirs, 0 ideal and 1 no better than
nothing. There realism is judged by the distribution of fixed features, because every run trains its own judge. *Tuned
sum* is the best of 30 random weightings (log-uniform from 0.1 to 10) on a validation split, by its worst goal, or by
PSNR among those that leave no goal worse than nothing; its 30 runs are not counted. *Starved* is the longest part of
the worst run in which a goal at least half as badly off as the worst had under 1% of the gradient and got worse. Times
are processor time on one thread.
"""
FAULTY = """\
*untrained*: the discriminator does not train while scales are calibrated. *hot*: its learning rate is 4 times as high.
*drift*: a script adds up to 1.5 scales to consistency. *floor*: one goal cannot fall below 0.8. Cells are PSNR / worst
goal; a star marks a goal that was starved for more than 5% of the steps in some run. An added constant has no gradient,
so drift and floor cannot hurt a sum with fixed weights: they are faults for rules that look at values.
"""


def write(
    records: Mapping[Any, Record], tuned: Mapping[str, Mapping[str, str]], seeds: tuple[int, ...], tuning: int, to: Path
) -> str:
    """Write ``to``.md and the plots beside it, and return the page."""
    sets = {}
    for data, picks in tuned.items():
        results = Results([r for r in records.values() if r["data"] == data], picks, seeds, tuning)
        if results.arms:
            sets[data] = results
    page = ["# Which rule, scales and ideals", HOW]
    for data, results in sets.items():
        page += [f"## {NAMES[data]}", *verdicts(results), main_table(results)]
        page += ["### Faults", FAULTY, fault_table(results)]
        page += ["Runs in which `bomkern.diagnose` named the goal at fault, and after how many steps:"]
        page += [reported_table(results)]
    page += [f"![PSNR against the worst goal]({to.name}_front.png)", f"![faults]({to.name}_faults.png)"]
    page += ["## The rules", "\n".join(f"- {name}: {arm.says}" for name, arm in ARMS.items())]
    text = "\n\n".join(page) + "\n"
    to.with_suffix(".md").write_text(text)
    if sets:
        from bench.policies import plots

        plots.front(sets, to.with_name(f"{to.name}_front.png"))
        plots.faults(sets, to.with_name(f"{to.name}_faults.png"))
    return text
