"""Measure how well `bomkern.diagnose` finds planted faults, and how often it raises false alarms.

    python -m bench.faults --runs 48 --clean 48 --seed 0

trains small random problems for 300 to 600 short steps, each with one fault planted by script or none. It diagnoses
every history, and prints recall by kind, false alarms, and the part of right findings by confidence. `Truth` holds what
was planted, and `is_right` decides whether a finding is right. The figures are written to bench/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.faults.runs import Truth, train
from bomkern import Diagnosis, Finding, History, diagnose

ALARM = 0.5  # a finding of at least this confidence is an alarm
RESULTS = Path(__file__).parents[1] / "results" / "faults.json"
# The right kinds of finding for each planted fault.
KINDS = {
    "floor": ("locked",),
    "drift": ("moving target",),
    "conflict": ("conflict",),
    "scale": ("miscalibrated",),
    "box": ("infeasible box",),
    "collapse": ("collapse",),
    "adversary": ("miscalibrated", "moving target"),
}


def is_right(finding: Finding, truth: Truth, history: History) -> bool:
    """Return whether a finding about a run with a fault is true: it names the fault, or the exact values confirm it."""
    if names_fault(finding, truth):
        return True
    if finding.kind in ("starved", "moving target", "locked"):
        values = truth.exact[finding.first - 1 : finding.last, history.layout.goals.index(finding.goals[0])]
        part = max(1, len(values) // 5)
        start, end = values[:part].mean(), values[-part:].mean()
        return bool(end > 0.95 * start if finding.kind == "locked" else end > start)
    if truth.fault != "collapse":
        return False
    # The code collapses because the KL's scale is too small, and the goal that needs the code cannot improve.
    return finding[:2] == ("miscalibrated", ("kl_divergence",)) or set(finding.goals) == {"kl_divergence", "decoding"}


def names_fault(finding: Finding, truth: Truth) -> bool:
    """Return whether a finding names the planted fault and its goals."""
    if finding.kind not in KINDS.get(truth.fault, ()):
        return False
    both = truth.fault == "conflict"
    return set(finding.goals) == set(truth.goals) if both else finding.goals[0] in truth.goals


class Case(NamedTuple):
    """One diagnosed run."""

    truth: Truth
    history: History
    diagnosis: Diagnosis

    @property
    def position(self) -> int | None:
        """The position, from 1, of the first alarm that names the fault among all findings; None without one."""
        for position, finding in enumerate(self.diagnosis.faults, 1):
            if names_fault(finding, self.truth) and finding.confidence >= ALARM:
                return position
        return None

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.diagnosis.faults if finding.confidence >= ALARM]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def by_kind(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """Return the figures of each fault.

    Recall counts findings of the right kind and goal with the confidence of an alarm. Further figures say how often the
    right finding came first, and how often it had any confidence. The delay is the median, from the onset, of its first
    step. The last figure counts the first alarms of the runs that missed the fault.
    """
    table: dict[str, dict[str, Any]] = {}
    for fault in KINDS:
        runs = [case for case in cases if case.truth.fault == fault]
        hits = [case for case in runs if case.position]
        faint = [c for c in runs if any(names_fault(f, c.truth) for f in c.diagnosis.faults)]
        goal_named = [
            c for c in runs if any(set(f.goals) & set(c.truth.goals) and f.kind != "starved" for f in c.alarms)
        ]
        late = sorted(c.diagnosis.faults[(c.position or 1) - 1].first - c.truth.onset for c in hits)
        missed = [c.alarms[0].kind if c.alarms else "nothing" for c in runs if not c.position]
        table[fault] = {
            "runs": len(runs),
            "recall": len(hits) / len(runs) if runs else math.nan,
            "first": mean([case.position == 1 for case in hits]),
            "mean position": mean([case.position or 0 for case in hits]),
            "at any confidence": len(faint) / len(runs) if runs else math.nan,
            "goal named, any cause": len(goal_named) / len(runs) if runs else math.nan,
            "median steps after onset": late[len(late) // 2] if late else None,
            "said instead": {kind: missed.count(kind) for kind in sorted(set(missed))},
        }
    return table


def judge(cases: list[Case]) -> dict[str, Any]:
    """Return all figures of a set of runs."""
    faulty = [case for case in cases if case.truth.fault != "clean"]
    clean = [case for case in cases if case.truth.fault == "clean"]
    verdicts = [
        (f, c.truth.fault != "clean" and is_right(f, c.truth, c.history)) for c in cases for f in c.diagnosis.faults
    ]
    edges = (0.25, 0.5, 0.75, 0.9, 1.01)
    bins = []
    for low, high in pairwise(edges):
        inside = [right for f, right in verdicts if low <= f.confidence < high]
        bins.append({"from": low, "to": min(high, 1.0), "findings": len(inside), "right": mean(inside)})
    wrong = [f.kind for f, right in verdicts if not right and f.confidence >= ALARM]
    return {
        "faults": by_kind(faulty),
        "recall": mean([bool(case.position) for case in faulty]),
        "clean runs with an alarm": mean([bool(case.alarms) for case in clean]),
        "alarms in clean runs": dict(_count([f.kind for case in clean for f in case.alarms])),
        "findings at any confidence in clean runs": mean([len(case.diagnosis.faults) for case in clean]),
        "wrong alarms": dict(_count(wrong)),
        "precision of alarms": mean([right for f, right in verdicts if f.confidence >= ALARM]),
        "mean confidence of right findings": mean([f.confidence for f, right in verdicts if right]),
        "mean confidence of wrong findings": mean([f.confidence for f, right in verdicts if not right]),
        "by confidence": bins,
    }


def _count(kinds: list[str]) -> list[tuple[str, int]]:
    return sorted(((kind, kinds.count(kind)) for kind in set(kinds)), key=lambda pair: -pair[1])


HEADS = (("runs", 5), ("recall", 8), ("first", 8), ("pos.", 6), ("any conf.", 11), ("goal named", 12), ("late by", 9))


def show(figures: dict[str, Any]) -> str:
    lines = [f"{'fault':<11}{''.join(f'{name:>{width}}' for name, width in HEADS)}  said instead"]
    for fault, row in figures["faults"].items():
        instead = ", ".join(f"{kind} {n}" for kind, n in row["said instead"].items())
        late = row["median steps after onset"]
        lines.append(
            f"{fault:<11}{row['runs']:>5}{row['recall']:>8.0%}{row['first']:>8.0%}{row['mean position']:>6.1f}"
            f"{row['at any confidence']:>11.0%}{row['goal named, any cause']:>12.0%}{'' if late is None else late:>9}"
            f"  {instead}"
        )
    rest = {name: value for name, value in figures.items() if name not in ("faults", "by confidence")}
    lines += ["", *(f"{name}: {_text(value)}" for name, value in rest.items())]
    for part in figures["by confidence"]:
        low, high = part["from"], part["to"]
        lines.append(f"confidence {low:.2f} to {high:.2f}: {part['findings']} findings, {part['right']:.0%} right")
    return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def run(job: tuple[str, int]) -> Case:
    """Train and diagnose one run."""
    torch.set_num_threads(1)
    history, truth = train(*job)
    return Case(truth, history, diagnose(history))


def jobs(runs: int, clean: int, seed: int) -> list[tuple[str, int]]:
    faults = list(KINDS)
    return [(faults[i % len(faults)], 1000 * seed + i) for i in range(runs)] + [
        ("clean", 1000 * seed + i) for i in range(clean)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=48, help="runs with a fault, kinds in turn (48)")
    parser.add_argument("--clean", type=int, default=48, help="runs without a fault (48)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds; their runs are pooled (0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the figures (bench/results/faults.json)")
    args = parser.parse_args()
    todo = [job for seed in args.seed for job in jobs(args.runs, args.clean, seed)]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        cases = pool.map(run, todo, chunksize=1)
    figures = judge(cases)
    print(show(figures))
    args.out.parent.mkdir(exist_ok=True)
    command = f"python -m bench.faults --runs {args.runs} --clean {args.clean} --seed {' '.join(map(str, args.seed))}"
    args.out.write_text(json.dumps(_plain({"command": command, **figures}), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Prepare a value for JSON: NaN becomes None, and floats get three digits, enough for so few runs."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 3)
    return value
