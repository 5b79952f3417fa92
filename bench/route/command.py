"""Measure how much routed backward saves on the trainer's nine-goal step, on this machine's CPU or GPU, in one run.

python -m bench.route                  # about 20 minutes on 2 cores; writes route.json, route.md, route.png
python -m bench.route --device cuda    # the same on the GPU, with its waits for the shares; NAME_route.json, ...
python -m bench.route --report         # writes the pages and the pictures again, from every such .json
python -m bench.route --quick --results FOLDER    # few rounds of a small batch: a dry run

The files are written to bench/results, or to the folder of ``--results``.
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

WAITS = (64, 512, 8192, 65536)  # batches at which a GPU's wait for the shares is measured


class Plan(NamedTuple):
    """The amount of work of a run.

    Attributes:
        rounds: rounds of whole steps, by batch. warm: steps before anything is timed.
        compared: steps whose gradients are compared. repeats: of each goal's own backward.
        alone: rounds in which loss and backward are timed alone.
    """

    rounds: Mapping[int, int] = MappingProxyType({32: 16, 128: 6})
    reductions: tuple[str, ...] = ("mean", "min")
    warm: int = 40
    compared: int = 50
    repeats: int = 5
    alone: int = 60


QUICK = Plan({9: 1}, ("mean",), 1, 1, 1, 1)  # a batch with one sample for each goal


def run(plan: Plan, device: str) -> dict[str, Any]:
    """Measure everything, and return the contents of route.json."""
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
    results: dict[str, Any] = {
        "command": "python -m bench.route" + (f" --device {device}" if waits else ""), "versions": versions(),
        "threads": torch.get_num_threads(), "gradients": [], "times": [], "memory": [],
    }  # fmt: skip
    if waits:
        results["gpu"] = torch.cuda.get_device_name()
    with tqdm(total=total, dynamic_ncols=True) as bar:
        start = build("rows", small, "mean", device)
        for _ in range(plan.warm):
            start.advance()
            bar.update()
        for reduction in plan.reductions:
            results["gradients"].append(measure.compare(small, reduction, plan.compared, device, bar))
        for batch, reduction in combinations:
            results["times"].append(measure.times(batch, reduction, plan.rounds[batch], start, bar))
        for batch, reduction in combinations:
            for variant in VARIANTS:
                memory = measure.memory(variant, batch, reduction, device)
                results["memory"].append({"batch": batch, "reduction": reduction, "variant": variant, **memory})
                bar.update()
        results["by_goal"] = measure.by_goal(small, plan.repeats, start, bar)
        results["for_nothing"] = measure.overhead(small, plan.alone, start, bar)
        if waits:
            results["waits"] = {batch: measure.added(batch, device, plan.alone, bar) for batch in waits}
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds of the smallest batch")
    parser.add_argument("--results", type=Path, default=HERE, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--report", action="store_true", help="write the pages and the pictures from the saved results")
    parser.add_argument("--memory", nargs=3, metavar=("VARIANT", "BATCH", "REDUCTION"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick and args.results.resolve() == HERE:
        parser.error("--quick is a dry run, not a result: give it --results FOLDER")
    try:
        from bench.route import measure, report
    except ModuleNotFoundError as why:
        print(f"bench.route trains, which needs {why.name}: pip install 'bomkern[train]'", file=sys.stderr)
        return 2
    if args.memory:
        variant, batch, reduction = args.memory
        print(json.dumps(measure.memory_here(variant, int(batch), reduction)))
        return 0
    if args.report:
        paths = sorted(args.results.glob("*route.json"))
    elif args.device == "cuda" and not torch.cuda.is_available():
        print("bench.route --device cuda needs a GPU that torch can use", file=sys.stderr)
        return 2
    else:
        stem = "route" if args.device == "cpu" else f"{stem_of(torch.cuda.get_device_name())}_route"
        results = run(QUICK if args.quick else Plan(), args.device)
        args.results.mkdir(parents=True, exist_ok=True)
        paths = [args.results / f"{stem}.json"]
        paths[0].write_text(json.dumps(results, indent=1) + "\n")
    for path in paths:
        results = json.loads(path.read_text())
        text = report.page(results, f"{path.stem}.png")
        path.with_suffix(".md").write_text(text)
        print(text)
        draw(results, path.with_suffix(".png"))
    return 0


def draw(results: dict[str, Any], to: Path) -> None:
    """Draw the picture, if matplotlib is installed."""
    try:
        from bench.route import picture
    except ModuleNotFoundError as why:
        print(f"bench.route: no picture: {why.name} is not installed", file=sys.stderr)
    else:
        picture.draw(results, to)
