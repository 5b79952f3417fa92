"""Compare bomkern's rules, scales and ideals with the alternatives, on eight problems, with and without faults.

    python -m bench.policies             # everything: some three hours on 2 cores; continues an interrupted study
    python -m bench.policies --report    # the tables and plots of the runs so far
    python -m bench.policies --toy       # the picture of the toy of two goals: some 3 minutes

`problems.py` lists the problems, `arms.py` the rules. Seeds are paired, and every rule has the time of equal weights
(`costs.py`). Runs go to bench/results/policies.jsonl, one line each, the costs of a step to policies_costs.json. The
page bench/results/policies.md, the plots beside it and a table of the main README show the results.
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

from bench.policies import costs, readme, report, toy
from bench.policies.arms import ARMS, BRIGHT, TUNED, Entry, everywhere, where_quick
from bench.policies.peers import SUMS
from bench.policies.problems import LONG, PROBLEMS
from bench.policies.run import Job, run
from bench.readme import README, put

J = TypeVar("J")
RUNS = Path(__file__).parents[1] / "results" / "policies.jsonl"
SEEDS = (30, 31, 32, 33, 34)  # not used while the rules were developed
WHOLE = ("photographs",)  # problems without faults: a run takes a minute, and bench.budget has each fault on them
TUNING = 9  # the seed on which the weightings of the tuned sums are chosen


def under(data: str, fault: str, arm: Entry) -> bool:
    """Return whether an arm is run on a problem under a fault."""
    if not arm.fits(PROBLEMS[data]) or fault not in PROBLEMS[data].faults:
        return False
    return fault == "none" or (arm.faults > (data in LONG) and data not in WHOLE)


def jobs(data: str, seeds: tuple[int, ...], picks: dict[str, str]) -> Iterator[Job]:
    """Yield all runs of a problem: the random sums first, then by seed, so that an interrupted study is balanced."""
    yield from (Job(data, "none", f"sum {n}", TUNING) for n in range(SUMS))
    for seed in seeds:
        for fault in PROBLEMS[data].faults:
            yield from (Job(data, fault, name, seed) for name, arm in ARMS.items() if under(data, fault, arm))
            tuned = [a for name, a in picks.items() if fault == "none" or (name == TUNED and data not in LONG)]
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
    """Return the tuned sums: the best random sums on the validation split, by the worst goal and by the measure."""
    sums = {job.arm: r["validation"] for job, r in runs.items() if job.data == data and job.seed == TUNING}
    if len(sums) < SUMS:
        return {}
    measure = PROBLEMS[data].measure
    fair = [arm for arm, v in sums.items() if v["worst"] < 1] or list(sums)  # no goal worse than doing nothing
    return {
        TUNED: min(sums, key=lambda arm: sums[arm]["worst"]),
        BRIGHT: max(fair, key=lambda arm: measure.of(sums[arm]) * (1 if measure.larger else -1)),
    }


def _run(arguments: tuple[Job, int | None, float]) -> dict[str, Any]:
    return run(*arguments)


def _measure(arguments: tuple[str, list[str]]) -> tuple[str, dict[str, float]]:
    return arguments[0], costs.measure(*arguments)


def study(
    path: Path, datas: list[str], seeds: tuple[int, ...], arms: list[str] | None, steps: int | None, workers: int
) -> None:
    """Run the jobs that have not been run, and append their records to the file.

    The costs of steps that are not known are measured first. A quick look of few ``steps`` does without them.
    """
    from tqdm import tqdm

    path.parent.mkdir(exist_ok=True)
    file_of_costs = path.with_name(f"{path.stem}_costs.json")
    known = costs.read(file_of_costs)
    wanted = {
        data: [
            name
            for name, arm in ARMS.items()
            if arm.fits(PROBLEMS[data]) and name not in known.get(data, {}) and (not arms or name in arms)
        ]
        for data in datas
    }
    missing = [(data, names) for data, names in wanted.items() if names and steps is None]
    unfinished = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        file.write("\n" if unfinished else "")
        for data, found in tqdm(
            pool.imap_unordered(_measure, missing), total=len(missing), desc="costs", unit="problem"
        ):
            costs.complete(file_of_costs, data, found)
        known = costs.read(file_of_costs)
        for part in ("sums", "arms"):  # the tuned sums are chosen among the random ones
            done = read(path)
            todo = [job for data in datas for job in jobs(data, seeds, picks(done, data)) if job not in done]
            todo = [job for job in todo if (job.arm.startswith("sum ") and job.seed == TUNING) == (part == "sums")]
            if arms:
                todo = [job for job in todo if job.arm in arms]
            todo.sort(key=lambda job: (job.seed, job.data in LONG))
            work = [(job, steps, known.get(job.data, {}).get(job.arm, 1.0)) for job in todo]
            bar = tqdm(total=len(todo), desc=part, unit="run")
            for record in pool.imap_unordered(_run, work):
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
            bar.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing, and report the runs so far")
    parser.add_argument("--toy", action="store_true", help="run the toy of two goals alone, and draw it")
    parser.add_argument("--data", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="problems (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of the runs (30 to 34)")
    parser.add_argument("--arms", nargs="+", help="names of the arms to run (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes (one per core)")
    parser.add_argument("--steps", type=int, help="steps of a run, for a quick look (those of the problem)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file for the runs (bench/results/policies.jsonl)")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    unknown = [arm for arm in args.arms or [] if arm not in ARMS and not arm.startswith("sum ")]
    if unknown:
        parser.error(f"--arms {unknown[0]!r}: there are {', '.join(ARMS)}")
    if args.steps is not None and args.runs == RUNS and not args.report:
        parser.error(f"--steps {args.steps}: such runs do not go where results are: give them --runs FILE")
    if args.toy:
        arms = [name for name in args.arms or ARMS if name in ARMS and ARMS[name].fits in (everywhere, where_quick)]
        toy.study(args.runs.with_name(f"{args.runs.stem}_toy"), arms, args.workers, args.steps)
    elif not args.report:
        study(args.runs, args.data, tuple(args.seeds), args.arms, args.steps, args.workers)
    runs = read(args.runs)
    tuned = {data: picks(runs, data) for data in args.data}
    sys.stdout.write(report.write(runs, tuned, tuple(args.seeds), TUNING, args.runs.with_suffix("")))
    if args.runs == RUNS and len(args.data) == len(PROBLEMS):
        part = readme.table(report.sets_of(runs, tuned, tuple(args.seeds), TUNING))
        README.write_text(put(README.read_text(), readme.COMMAND, part))
    return 0
