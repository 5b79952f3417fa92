"""What routed backward saves on the trainer's nine-goal step, on this machine's CPU or its GPU, in one run.

python -m bench.route                  # about 20 minutes on 2 cores; writes route.json, route.md, route.png
python -m bench.route --device cuda    # the same on the GPU, and what it waits for the shares; NAME_route.json, ...
python -m bench.route --report         # the pages and the pictures again, from every .json of these
python -m bench.route --quick --results FOLDER    # few rounds of a small batch: a dry run

They are written to bench/results, or to the folder of ``--results``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from bench.results import HERE, stem_of

WAITS = (64, 512, 8192, 65536)  # batches at which a GPU is asked what it waits for the shares


class Plan(NamedTuple):
    """How much is measured. ``rounds``: of whole steps, by batch. ``warm``: steps before anything is timed."""

    rounds: Mapping[int, int] = MappingProxyType({32: 16, 128: 6})
    reductions: tuple[str, ...] = ("mean", "min")
    warm: int = 40
    compared: int = 50
    repeats: int = 5
    alone: int = 60


QUICK = Plan({9: 1}, ("mean",), 1, 1, 1, 1)  # a sample for each goal


def run(plan: Plan, device: str) -> dict[str, Any]:
    """Everything, as one goes into route.json."""
    from tqdm import tqdm

    from bench.route import measure
    from bench.route.variants import VARIANTS, build
    from bomkern.train.nine_goals import GOALS
    from bomkern.train.recorder import versions

    batches, small = list(plan.rounds), min(plan.rounds)
    combinations = [(batch, reduction) for batch in batches for reduction in plan.reductions]
    waits = WAITS if device != "cpu" else ()
    total = plan.warm + len(plan.reductions) * plan.compared + len(GOALS) * 2 * plan.repeats
    total += plan.alone * (1 + len(waits)) + len(combinations) * len(VARIANTS)
    total += sum((plan.rounds[batch] + 2) * len(VARIANTS) for batch, _ in combinations)
    found: dict[str, Any] = {
        "command": "python -m bench.route" + (f" --device {device}" if waits else ""), "versions": versions(),
        "threads": torch.get_num_threads(), "gradients": [], "times": [], "memory": [],
    }  # fmt: skip
    if waits:
        found["gpu"] = torch.cuda.get_device_name()
    with tqdm(total=total, dynamic_ncols=True) as bar:
        start = build("rows", small, "mean", device)
        for _ in range(plan.warm):
            start.advance()
            bar.update()
        for reduction in plan.reductions:
            found["gradients"].append(measure.compare(small, reduction, plan.compared, device, bar))
        for batch, reduction in combinations:
            found["times"].append(measure.times(batch, reduction, plan.rounds[batch], start, bar))
        for batch, reduction in combinations:
            for variant in VARIANTS:
                held = measure.memory(variant, batch, reduction, device)
                found["memory"].append({"batch": batch, "reduction": reduction, "variant": variant, **held})
                bar.update()
        found["by_goal"] = measure.by_goal(small, plan.repeats, start, bar)
        found["for_nothing"] = measure.for_nothing(small, plan.alone, start, bar)
        if waits:
            found["waits"] = {batch: measure.added(batch, device, plan.alone, bar) for batch in waits}
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds of the smallest batch")
    parser.add_argument("--results", type=Path, default=HERE, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--report", action="store_true", help="write the pages and the pictures from what is kept")
    parser.add_argument("--memory", nargs=3, metavar=("VARIANT", "BATCH", "REDUCTION"), help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    if asked.quick and asked.results.resolve() == HERE:
        parser.error("--quick is a dry run, and no result: give it --results FOLDER")
    try:
        from bench.route import measure, report
    except ModuleNotFoundError as why:
        print(f"bench.route trains, which needs {why.name}: pip install 'bomkern[train]'", file=sys.stderr)
        return 2
    if asked.memory:
        variant, batch, reduction = asked.memory
        print(json.dumps(measure.memory_here(variant, int(batch), reduction)))
        return 0
    if asked.report:
        paths = sorted(asked.results.glob("*route.json"))
    elif asked.device == "cuda" and not torch.cuda.is_available():
        print("bench.route --device cuda needs a GPU that torch can use", file=sys.stderr)
        return 2
    else:
        stem = "route" if asked.device == "cpu" else f"{stem_of(torch.cuda.get_device_name())}_route"
        found = run(QUICK if asked.quick else Plan(), asked.device)
        asked.results.mkdir(parents=True, exist_ok=True)
        paths = [asked.results / f"{stem}.json"]
        paths[0].write_text(json.dumps(found, indent=1) + "\n")
    for path in paths:
        found = json.loads(path.read_text())
        text = report.page(found, f"{path.stem}.png")
        path.with_suffix(".md").write_text(text)
        print(text)
        draw(found, path.with_suffix(".png"))
    return 0


def draw(found: dict[str, Any], to: Path) -> None:
    """The picture, where there is matplotlib."""
    try:
        from bench.route import picture
    except ModuleNotFoundError as why:
        print(f"bench.route: no picture, for there is no {why.name}", file=sys.stderr)
    else:
        picture.draw(found, to)
