"""Compare spill with a budget of rows with the same rule on all rows: at equal steps, at equal time, by its variance.

    python -m bench.budget               # the quality: some 45 minutes on 2 cores; continues an interrupted study
    python -m bench.budget --variance    # the variance of the gradient: some 2 minutes
    python -m bench.budget --owners      # whether the owners of samples can be predicted: some 4 minutes
    python -m bench.budget --report      # the page and the pictures of the runs so far

The problems, faults and figures are those of `python -m bench.policies`, with other seeds. Runs go to
bench/results/budget.jsonl, one line each, the variance to budget_variance.json, and the owners to budget_owners.json.
The page bench/results/budget.md and the pictures beside it show all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.budget import report
from bench.budget.arms import ARMS
from bench.budget.run import Job, run
from bench.policies.command import read_runs
from bench.policies.faults import FAULTS
from bench.policies.problems import VAES
from bench.results import HERE

RUNS = HERE / "budget.jsonl"
SEEDS = (20, 21, 22, 23, 24)  # not used while the budget was developed
LONG = ("photographs",)  # data sets whose runs take long: faults for some arms only
Records = dict[Job, dict[str, Any]]


def jobs(datas: list[str], seeds: tuple[int, ...], arms: list[str]) -> Iterator[Job]:
    """Yield all runs, by seed, so that an interrupted study is balanced."""
    for seed in seeds:
        for data in datas:
            for fault in FAULTS:
                for arm in arms:
                    if fault == "none" or ARMS[arm].faults or (data not in LONG and not ARMS[arm].peer):
                        yield Job(data, fault, seed, arm)


def read(path: Path) -> Records:
    """Return the runs so far."""
    return read_runs(path, Job, Job._fields)


def _run(arguments: tuple[tuple[str, str, int], list[str], int | None]) -> list[dict[str, Any]]:
    start, arms, steps = arguments
    return run(*start, arms, steps)


def study(
    path: Path, datas: list[str], seeds: tuple[int, ...], arms: list[str], steps: int | None, workers: int
) -> None:
    """Run what has not been run, the arms of a seed in one process, and append the records to the file."""
    from tqdm import tqdm

    done = read(path)
    todo: dict[tuple[str, str, int], list[str]] = {}
    for job in jobs(datas, seeds, arms):
        if job not in done:
            todo.setdefault((job.data, job.fault, job.seed), []).append(job.arm)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        file.write("\n" if unfinished else "")
        work = [(start, names, steps) for start, names in todo.items()]
        bar = tqdm(total=sum(map(len, todo.values())), desc="arms", unit="run")
        for records in pool.imap_unordered(_run, work):
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            bar.update(len(records))
        bar.close()


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _measure(path: Path, datas: list[str], measure: Callable[[str], dict[str, Any]]) -> None:
    """Measure data sets in turn, and write each into the file at once."""
    measured = _load(path)
    for data in datas:
        measured[data] = measure(data)
        path.write_text(json.dumps(measured, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing, and report what was measured so far")
    parser.add_argument("--variance", action="store_true", help="measure the variance of the gradient alone")
    parser.add_argument("--owners", action="store_true", help="measure alone whether owners can be predicted")
    parser.add_argument("--data", nargs="+", choices=list(VAES), default=list(VAES), help="data sets (both)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of the runs (20 to 24)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", default=list(ARMS), help="names of the arms to run (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (one per core)")
    parser.add_argument(
        "--steps", type=int, help="for a quick look: steps of a run, or before the variance is measured"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="file for the runs (bench/results/budget.jsonl)")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms {unknown[0]!r}: there are {', '.join(ARMS)}")
    if args.steps is not None and args.runs == RUNS and not args.report:
        parser.error(f"--steps {args.steps}: such runs do not go where results are: give them --runs FILE")
    spread, owned = (args.runs.with_name(f"{args.runs.stem}_{part}.json") for part in ("variance", "owners"))
    quick = args.steps is not None
    if args.variance:
        from bench.budget import variance

        _measure(spread, args.data, lambda data: variance.measure(data, args.steps or variance.STEPS, quick))
    if args.owners:
        from bench.budget import owners

        _measure(owned, args.data, lambda data: owners.measure(data, args.steps, quick))
    if not (args.variance or args.owners or args.report):
        study(args.runs, args.data, tuple(args.seeds), args.arms, args.steps, args.workers)
    runs = list(read(args.runs).values())
    sys.stdout.write(report.write(runs, _load(spread), args.runs.with_suffix(""), _load(owned)))
    return 0
