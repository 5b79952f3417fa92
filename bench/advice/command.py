"""Judge the advice of `bomkern.diagnose` by what it does: do runs that follow it end better?

    python -m bench.advice           # everything: some 40 minutes on 2 cores; continues an interrupted study
    python -m bench.advice --report  # the table of the trials so far

Each trial trains a problem of `bench.policies` with one rule, with a planted fault or none, and diagnoses the history.
Then it trains again from the same seed with the change that the first finding suggests, if a `GoalSet` can make it.
Trials go to bench/results/advice.jsonl, and the page bench/results/advice.md shows the score.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.advice import report
from bench.advice.trials import RULES, Job, run
from bench.policies.command import read_runs
from bench.policies.problems import PROBLEMS

TRIALS = Path(__file__).parents[1] / "results" / "advice.jsonl"
SEEDS = (40, 41)  # not used while the diagnosis was developed
FEW = {"photographs": ("minimum",)}  # rules of problems with long runs


def jobs(datas: list[str], seeds: tuple[int, ...], rules: list[str] | None) -> Iterator[Job]:
    """Yield all trials, seed by seed."""
    for seed in seeds:
        for data in datas:
            for fault in PROBLEMS[data].faults:
                for rule in FEW.get(data, tuple(RULES)):
                    if not rules or rule in rules:
                        yield Job(data, fault, rule, seed)


def _run(arguments: tuple[Job, int | None]) -> dict[str, Any]:
    return run(*arguments)


def main(argv: list[str] | None = None) -> int:
    problems = [name for name, kind in PROBLEMS.items() if not kind.momentum]  # with SGD they are variants
    parser = argparse.ArgumentParser(prog="python -m bench.advice", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="train nothing, and report the trials so far")
    parser.add_argument("--data", nargs="+", choices=problems, default=problems, help="problems (all)")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="rules of the first run (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds (40 and 41)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (one per core)")
    parser.add_argument("--steps", type=int, help="steps of a run, for a quick look (those of the problem)")
    parser.add_argument("--trials", type=Path, default=TRIALS, help="file for trials (bench/results/advice.jsonl)")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.steps is not None and args.trials == TRIALS and not args.report:
        parser.error(f"--steps {args.steps}: such trials do not go where results are: give them --trials FILE")
    if not args.report:
        from tqdm import tqdm

        done = read_runs(args.trials, Job, Job._fields)
        todo = [(job, args.steps) for job in jobs(args.data, tuple(args.seeds), args.rules) if job not in done]
        args.trials.parent.mkdir(exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool, args.trials.open("a") as file:
            for record in tqdm(pool.imap_unordered(_run, todo), total=len(todo), unit="trial"):
                file.write(json.dumps(record) + "\n")
                file.flush()
    sys.stdout.write(report.write(list(read_runs(args.trials, Job, Job._fields).values()), args.trials.with_suffix("")))
    return 0
