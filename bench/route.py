"""What routed backward saves on the trainer's nine-goal step, on this machine's CPU, in one run.

python -m bench.route            # about 20 minutes on 2 cores; writes bench/results/route.json, route.md, route.png
python -m bench.route --report   # the page and the picture again, from route.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.routing import measure, picture, report
from bench.routing.variants import VARIANTS, build
from bomkern.train.goals import GOALS
from bomkern.train.record import versions

RESULTS = Path(__file__).parent / "results"
BATCHES, REDUCTIONS = (32, 128), ("mean", "min")
ROUNDS = {32: 16, 128: 6}
REPEATS = 5


def run() -> dict[str, Any]:
    """Everything, as one goes into route.json."""
    combinations = [(batch, reduction) for batch in BATCHES for reduction in REDUCTIONS]
    total = measure.WARM + len(REDUCTIONS) * measure.STEPS + len(GOALS) * 2 * REPEATS + 60
    total += sum((ROUNDS[batch] + 2) * len(VARIANTS) for batch, _ in combinations) + len(combinations) * len(VARIANTS)
    found: dict[str, Any] = {
        "command": "python -m bench.route", "versions": versions(), "threads": torch.get_num_threads(),
        "gradients": [], "times": [], "memory": [],
    }  # fmt: skip
    with tqdm(total=total, dynamic_ncols=True) as bar:
        start = build("rows", 32, "mean")
        for _ in range(measure.WARM):
            start.advance()
            bar.update()
        for reduction in REDUCTIONS:
            found["gradients"].append(measure.compare(32, reduction, bar))
        for batch, reduction in combinations:
            found["times"].append(measure.times(batch, reduction, ROUNDS[batch], start, bar))
        for batch, reduction in combinations:
            for variant in VARIANTS:
                held = measure.memory(variant, batch, reduction)
                found["memory"].append({"batch": batch, "reduction": reduction, "variant": variant, **held})
                bar.update()
        found["by_goal"] = measure.by_goal(32, REPEATS, start, bar)
        found["for_nothing"] = measure.for_nothing(32, start, bar)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the page and the picture from route.json alone")
    parser.add_argument("--memory", nargs=3, metavar=("VARIANT", "BATCH", "REDUCTION"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        variant, batch, reduction = asked.memory
        print(json.dumps(measure.memory_here(variant, int(batch), reduction)))
        return
    path = RESULTS / "route.json"
    if not asked.report:
        path.write_text(json.dumps(run(), indent=1) + "\n")
    found = json.loads(path.read_text())
    (RESULTS / "route.md").write_text(report.page(found))
    picture.draw(found, RESULTS / "route.png")
    print(report.page(found), file=sys.stdout)


if __name__ == "__main__":
    main()
