"""Times trainers that share this machine's cores, by how long OpenMP's waiting threads keep their core busy.

``python -m bench.together [--runs 3] [--steps 60] [--rounds 3] [--spins 300000 1000 0]`` prints steps per second of one
run alone, a median over rounds that take turns, and of several at once, added up. 300000 is what GNU's OpenMP does when
nothing is set; `bomkern train` sets what bomkern_command.py says.
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
    """Steps per second of each of some runs that start together, with another seed each."""
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
    """The rates as Markdown, a row for each spin."""
    runs = len(next(iter(together.values())))
    lines = [f"| GOMP_SPINCOUNT | one alone, steps/s | {runs} at once, steps/s together |", "|---|---|---|"]
    for spin, found in alone.items():
        lines.append(f"| {spin:,} | {statistics.median(found):.2f} | {sum(together[spin]):.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time trainers that share this machine's cores.")
    parser.add_argument("--runs", type=int, default=3, help="at once (3)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (60)")
    parser.add_argument("--rounds", type=int, default=3, help="of a run alone (3)")
    parser.add_argument("--spins", type=int, nargs="+", default=[300_000, 1_000, 0], help="(300000 1000 0)")
    given = parser.parse_args()
    alone: dict[int, list[float]] = {spin: [] for spin in given.spins}
    for turn in range(given.rounds):
        for spin in given.spins[:: -1 if turn % 2 else 1]:
            alone[spin] += rates(1, given.steps, spin)
    together = {spin: rates(given.runs, given.steps, spin) for spin in given.spins}
    print(table(alone, together))
    return 0


if __name__ == "__main__":
    sys.exit(main())
