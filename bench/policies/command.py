"""Which rule, scales and ideals train many goals best, with and without faults: bomkern's, and what else one would use.

    python -m bench.policies             # everything: some 85 minutes on 2 cores; goes on where it was interrupted
    python -m bench.policies --report    # the table and plots of what has been run so far

Two small VAEs (scikit-learn's digits, six goals; the trainer's photographs, nine), five faults, paired seeds, and equal
updates, in which probes count. Runs go to bench/results/policies.jsonl, one line each; what they say to
bench/results/policies.md and plots beside it.
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

from bench.policies import report
from bench.policies.arms import ARMS, BRIGHT, TUNED
from bench.policies.faults import FAULTS
from bench.policies.peers import SUMS
from bench.policies.run import PROBLEMS, Job, run

RUNS = Path(__file__).parents[1] / "results" / "policies.jsonl"
SEEDS = (10, 11, 12, 13, 14)  # none of them was looked at while rules were tried
TUNING = 9  # the seed that the weightings of the tuned sums are chosen by
LONG = ("photographs",)  # runs that take long: faults for some arms only


def jobs(data: str, seeds: tuple[int, ...], picks: dict[str, str]) -> Iterator[Job]:
    """All runs of a data set: the random sums first, then by seed, so that what is interrupted is balanced."""
    yield from (Job(data, "none", f"sum {n}", TUNING) for n in range(SUMS))
    for seed in seeds:
        for fault in FAULTS:
            for name, arm in ARMS.items():
                if fault == "none" or arm.faults or data not in LONG:
                    yield Job(data, fault, name, seed)
            brief = fault != "none" and data in LONG
            tuned = [arm for name, arm in picks.items() if not (brief and name != TUNED)]
            yield from (Job(data, fault, arm, seed) for arm in dict.fromkeys(tuned))


def read(path: Path) -> dict[Job, dict[str, Any]]:
    """The runs so far; a line cut short by an interruption is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Job(*(record[field] for field in Job._fields))] = record
    return found


def picks(runs: dict[Job, dict[str, Any]], data: str) -> dict[str, str]:
    """The tuned sums: of the random ones the best on the validation split, by the worst goal and by PSNR."""
    sums = {job.arm: r["validation"] for job, r in runs.items() if job.data == data and job.seed == TUNING}
    if len(sums) < SUMS:
        return {}
    fair = [arm for arm, v in sums.items() if v["worst"] < 1] or list(sums)  # no goal worse than doing nothing
    return {
        TUNED: min(sums, key=lambda arm: sums[arm]["worst"]),
        BRIGHT: max(fair, key=lambda arm: sums[arm]["psnr"]),
    }


def _do(given: tuple[Job, int | None]) -> dict[str, Any]:
    return run(*given)


def study(
    path: Path, datas: list[str], seeds: tuple[int, ...], arms: list[str] | None, steps: int | None, workers: int
) -> None:
    """Run what has not been run."""
    from tqdm import tqdm

    path.parent.mkdir(exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        for part in ("sums", "arms"):  # the sums decide on the tuned ones
            done = read(path)
            todo = [job for data in datas for job in jobs(data, seeds, picks(done, data)) if job not in done]
            todo = [job for job in todo if (job.arm.startswith("sum ") and job.seed == TUNING) == (part == "sums")]
            if arms:
                todo = [job for job in todo if job.arm in arms]
            todo.sort(key=lambda job: (job.seed, job.data in LONG))
            bar = tqdm(total=len(todo), desc=part, unit="run")
            for record in pool.imap_unordered(_do, [(job, steps) for job in todo]):
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
            bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing, report what was run")
    parser.add_argument("--data", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="data sets (both)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of the runs (10 to 14)")
    parser.add_argument("--arms", nargs="+", help="only these arms, by name (all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--steps", type=int, help="of a run, for a quick look (1500 digits, 320 photographs)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the runs go (bench/results/policies.jsonl)")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    unknown = [arm for arm in given.arms or [] if arm not in ARMS and not arm.startswith("sum ")]
    if unknown:
        parser.error(f"--arms {unknown[0]!r}: there are {', '.join(ARMS)}")
    if not given.report:
        study(given.runs, given.data, tuple(given.seeds), given.arms, given.steps, given.workers)
    found = read(given.runs)
    tuned = {data: picks(found, data) for data in given.data}
    sys.stdout.write(report.write(found, tuned, tuple(given.seeds), TUNING, given.runs.with_suffix("")))
