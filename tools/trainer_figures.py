"""Train the settings that docs/trainer.md compares, and write bench/results/trainer.json from their summaries.

`python tools/trainer_figures.py FOLDER` keeps the runs in FOLDER, and leaves out those that are there already. It takes
some minutes a run. The page shows what is in the file by a marker.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for bench
FIGURES = ROOT / "bench" / "results" / "trainer.json"
# Options of `bomkern train`, and what they mean; the first is the default.
SETTINGS = {
    "": "ideals and nadirs known before training, spill 1/2, a budget of 2 batches of rows",
    "--spill auto": "the same with an even part, and weights that change slowly",
    "--spill 0": "each sample's worst goal alone",
    "--scales auto": "scale = largest value of the first steps, ideal 0",
    "--budget 0": "the default, but every goal takes all rows",
}


def place(folder: Path, options: str) -> Path:
    """Return the run folder of a setting."""
    return folder / (options.replace("--", "").replace(" ", "_") or "default")


def train(folder: Path, options: str, steps: int) -> dict[str, Any]:
    """Return the summary of a run, which is trained first if it is not there in full."""
    run = place(folder, options)
    done = run / "summary.json"
    if not done.exists() or json.loads(done.read_text())["steps"] != steps:
        command = [sys.executable, "-m", "bomkern", "train", "--out", str(run), "--steps", str(steps), *options.split()]
        subprocess.run([*command, *(["--overwrite"] if run.exists() else [])], cwd=ROOT, check=True)
    summary: dict[str, Any] = json.loads(done.read_text())
    return summary


def kept(summary: dict[str, Any], is_information: Any) -> dict[str, Any]:
    """Return the part of a summary that the page shows."""
    diagnosis = summary["diagnosis"] or {"findings": []}
    faults = [finding for finding in diagnosis["findings"] if not is_information(finding["kind"])]
    share = {name: round(x, 4) for name, x in summary["share"].items()}
    figures = {name: round(summary[name], 4) for name in ("psnr", "ssim")}
    return figures | {"share": share, "finding": faults[0] if faults else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (1000, those of the page)")
    parser.add_argument("--to", type=Path, default=FIGURES, help="the file to write (bench/results/trainer.json)")
    args = parser.parse_args()
    from bench.machine import name as machine
    from bomkern.diagnosis.registry import is_information

    summaries = {options: train(args.folder, options, args.steps) for options in SETTINGS}
    first = summaries[""]
    figures = {
        "command": "python tools/trainer_figures.py FOLDER",
        "steps": args.steps,
        "seed": first["seed"],
        "threads": first["threads"],
        "machine": machine(),
        "torch": first["versions"]["torch"],
        "date": datetime.date.today().isoformat(),
        "baseline_psnr": round(first["baseline_psnr"], 4),
        "baseline_ssim": round(first["baseline_ssim"], 4),
        "runs": {
            options: {"says": SETTINGS[options], **kept(found, is_information)} for options, found in summaries.items()
        },
    }
    args.to.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
