"""Time trainers that share this machine's cores, for several spin counts of OpenMP's waiting threads.

``python -m bench.together [--runs 3] [--steps 60] [--rounds 3] [--spins 300000 1000 0]`` prints steps per second of one
run alone, the median of alternating rounds, and the sum over several runs at once. 300000 is the default of GNU's
OpenMP; `bomkern train` sets the value in bomkern_command.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, "-m", "bomkern", "train", "--overwrite"]


def rates(runs: int, steps: int, spin: int) -> list[float]:
    """Return the steps per second of runs that start together, each with its own seed."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(run)) for run in range(runs)]
        started = [
            subprocess.Popen(
                [*COMMAND, "--steps", str(steps), "--seed", str(run), "--out", str(place)],
                env={**os.environ, "GOMP_SPINCOUNT": str(spin)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for run, place in enumerate(places)
        ]
        said = [process.communicate()[1] for process in started]
        if wrong := [text for process, text in zip(started, said, strict=True) if process.returncode]:
            raise SystemExit(f"together: a run failed:\n{wrong[0][-2000:]}")
        return [json.loads((place / "summary.json").read_text())["steps_per_second"] for place in places]


def table(alone: dict[int, list[float]], together: dict[int, list[float]]) -> str:
    """Return the rates as Markdown, with a row for each spin count."""
    runs = len(next(iter(together.values())))
    lines = [f"| GOMP_SPINCOUNT | one alone, steps/s | {runs} at once, steps/s together |", "|---|---|---|"]
    for spin, rates_alone in alone.items():
        lines.append(f"| {spin:,} | {statistics.median(rates_alone):.2f} | {sum(together[spin]):.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time trainers that share this machine's cores.")
    parser.add_argument("--runs", type=int, default=3, help="number of runs at once (3)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a run alone (3)")
    parser.add_argument(
        "--spins", type=int, nargs="+", default=[300_000, 1_000, 0], help="values of GOMP_SPINCOUNT (300000 1000 0)"
    )
    args = parser.parse_args()
    alone: dict[int, list[float]] = {spin: [] for spin in args.spins}
    for turn in range(args.rounds):
        for spin in args.spins[:: -1 if turn % 2 else 1]:
            alone[spin] += rates(1, args.steps, spin)
    together = {spin: rates(args.runs, args.steps, spin) for spin in args.spins}
    print(table(alone, together))
    return 0


if __name__ == "__main__":
    sys.exit(main())
