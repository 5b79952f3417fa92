"""Compare bomkern's rules, scales and ideals with the alternatives, on many goals, with and without faults.

    python -m bench.policies             # everything: some 85 minutes on 2 cores; continues an interrupted study
    python -m bench.policies --report    # the table and plots of the runs so far

The study has two small VAEs (scikit-learn's digits, six goals; the trainer's photographs, nine), five faults, paired
seeds, and equal updates, in which probes count. Runs go to bench/results/policies.jsonl, one line each. The page
bench/results/policies.md and the plots beside it show the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bench.policies import report
from bench.policies.arms import ARMS, BRIGHT, TUNED
from bench.policies.faults import FAULTS
from bench.policies.peers import SUMS
from bench.policies.run import PROBLEMS, Job, run

J = TypeVar("J")
RUNS = Path(__file__).parents[1] / "results" / "policies.jsonl"
SEEDS = (10, 11, 12, 13, 14)  # not used while the rules were developed
TUNING = 9  # the seed on which the weightings of the tuned sums are chosen
LONG = ("photographs",)  # data sets whose runs take long: faults for some arms only


def jobs(data: str, seeds: tuple[int, ...], picks: dict[str, str]) -> Iterator[Job]:
    """Yield all runs of a data set: the random sums first, then by seed, so that an interrupted study is balanced."""
    yield from (Job(data, "none", f"sum {n}", TUNING) for n in range(SUMS))
    for seed in seeds:
        for fault in FAULTS:
            for name, arm in ARMS.items():
                if fault == "none" or arm.faults or data not in LONG:
                    yield Job(data, fault, name, seed)
            brief = fault != "none" and data in LONG
            tuned = [arm for name, arm in picks.items() if not (brief and name != TUNED)]
            yield from (Job(data, fault, arm, seed) for arm in dict.fromkeys(tuned))


def read_runs(path: Path, job: Callable[..., J], fields: Sequence[str]) -> dict[J, dict[str, Any]]:
    """Return the records of a file of runs by job, without a line that an interruption left unfinished."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[job(*(record[field] for field in fields))] = record
    return runs


def read(path: Path) -> dict[Job, dict[str, Any]]:
    """Return the runs so far."""
    return read_runs(path, Job, Job._fields)


def picks(runs: dict[Job, dict[str, Any]], data: str) -> dict[str, str]:
    """Return the tuned sums: the best random sums on the validation split, by the worst goal and by PSNR."""
    sums = {job.arm: r["validation"] for job, r in runs.items() if job.data == data and job.seed == TUNING}
    if len(sums) < SUMS:
        return {}
    fair = [arm for arm, v in sums.items() if v["worst"] < 1] or list(sums)  # no goal worse than doing nothing
    return {
        TUNED: min(sums, key=lambda arm: sums[arm]["worst"]),
        BRIGHT: max(fair, key=lambda arm: sums[arm]["psnr"]),
    }


def _run(arguments: tuple[Job, int | None]) -> dict[str, Any]:
    return run(*arguments)


def study(
    path: Path, datas: list[str], seeds: tuple[int, ...], arms: list[str] | None, steps: int | None, workers: int
) -> None:
    """Run the jobs that have not been run, and append their records to the file."""
    from tqdm import tqdm

    path.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        for part in ("sums", "arms"):  # the tuned sums are chosen among the random ones
            done = read(path)
            todo = [job for data in datas for job in jobs(data, seeds, picks(done, data)) if job not in done]
            todo = [job for job in todo if (job.arm.startswith("sum ") and job.seed == TUNING) == (part == "sums")]
            if arms:
                todo = [job for job in todo if job.arm in arms]
            todo.sort(key=lambda job: (job.seed, job.data in LONG))
            bar = tqdm(total=len(todo), desc=part, unit="run")
            for record in pool.imap_unordered(_run, [(job, steps) for job in todo]):
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
            bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing, and report the runs so far")
    parser.add_argument("--data", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="data sets (both)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of the runs (10 to 14)")
    parser.add_argument("--arms", nargs="+", help="names of the arms to run (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (one per core)")
    parser.add_argument("--steps", type=int, help="steps of a run, for a quick look (1500 digits, 320 photographs)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file for the runs (bench/results/policies.jsonl)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    unknown = [arm for arm in args.arms or [] if arm not in ARMS and not arm.startswith("sum ")]
    if unknown:
        parser.error(f"--arms {unknown[0]!r}: there are {', '.join(ARMS)}")
    if not args.report:
        study(args.runs, args.data, tuple(args.seeds), args.arms, args.steps, args.workers)
    runs = read(args.runs)
    tuned = {data: picks(runs, data) for data in args.data}
    sys.stdout.write(report.write(runs, tuned, tuple(args.seeds), TUNING, args.runs.with_suffix("")))
