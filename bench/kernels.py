"""Each op once, forward and backward, large, for a profiler; and what the profiler found, as a table.

ncu --profile-from-start off --clock-control none --csv --metrics METRICS python -m bench.kernels > ncu.csv
python -m bench.kernels --metrics       # prints METRICS
python -m bench.kernels --read ncu.csv  # a JSON list: kernel, microseconds, shares of the peaks, occupancy
python -m bench.kernels --device cpu    # a dry run: the same path, small, by what serves a CPU, and no profiler

``--only`` chooses ops and implementations (``--only min_goal,gaussian_kl,cuda``), ``--small`` small sizes. An op that
fails does not take the others with it: its traceback goes to stderr, and the exit status is 1 at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import OPS, find

METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
TO_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}


IMPLS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}


def cases() -> list[tuple[Any, dict[str, int], dict[str, int]]]:
    """Return a case of each op, in the order of `OPS`, its size for a profiler, and a small one."""
    return [(find(op, benches.panel), *benches.profiled) for op, benches in OPS.items()]


def run(device: str, ops: Sequence[str], impls: Sequence[str], small: bool) -> tuple[int, int]:
    """Every op by every implementation, on a GPU between the profiler's start and stop after a warm-up outside of it.

    Returns:
        How many were done, and how many failed.
    """
    from bomkern.dispatch import select

    done = failed = 0
    for case, size, few in cases():
        for impl in impls if case.op in ops else ():
            if reason := select.why_not(case.op, impl, device):
                print(f"bench.kernels: {case.op} by {impl} left out: {reason}", file=sys.stderr)
                continue
            try:
                once(case, impl, few if small else size, device)
                done += 1
            except Exception:  # of one op: the others are profiled all the same
                failed += 1
                print(
                    f"bench.kernels: {case.op} by {impl} FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True
                )
    return done, failed


def once(case: Any, impl: str, size: dict[str, int], device: str) -> None:
    """A warm-up, and one call forward and backward that the profiler sees."""
    import torch

    from bench import harness
    from bench.machine import synchronize

    x = harness.inputs(case, tuple(size.items()))
    step = harness.once(case, lambda *given: case.ours(*given, impl=impl), x, True)
    step()
    synchronize()
    if device == "cpu":
        step()
        return
    torch.cuda.profiler.start()
    try:
        step()
        synchronize()
    finally:
        torch.cuda.profiler.stop()


def read(path: Path) -> list[dict[str, Any]]:
    """Read the output of ncu into one dict for each launch, in order. No entry names the machine."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        launch = found.setdefault(row["ID"], {"kernel": _short(row["Kernel Name"])})
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except ValueError:  # "n/a", of what this GPU does not count
            continue
        name = METRICS[row["Metric Name"]]
        launch[name] = round(value * TO_US[row["Metric Unit"]] if name == "us" else value, 2)
    return list(found.values())


def _short(name: str) -> str:
    """Without the type it returns, template arguments and parameters."""
    return re.split(r"[<(]", name.removeprefix("void "))[0].strip()


def chosen(only: str, device: str) -> tuple[list[str], list[str]]:
    """Ops and implementations out of names with commas between; of what none is named, all.

    Raises:
        ValueError: a name is neither.
    """
    names = [name for name in only.split(",") if name]
    known = [*OPS, *IMPLS[device]]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"--only {wrong[0]} is neither an op nor what serves a {device}: {', '.join(known)}")
    return [op for op in OPS if op in names] or list(OPS), [i for i in IMPLS[device] if i in names] or [*IMPLS[device]]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", action="store_true", help="print what ncu is to measure")
    parser.add_argument("--read", type=Path, help="a file that ncu wrote with --csv")
    parser.add_argument("--device", choices=tuple(IMPLS), default="cuda", help="cpu: a dry run, at small sizes")
    parser.add_argument("--only", default="", metavar="NAME,...", help="ops, implementations or both; default: all")
    parser.add_argument("--small", action="store_true", help="at small sizes")
    asked = parser.parse_args(given)
    if asked.metrics:
        print(",".join(METRICS))
        return 0
    if asked.read:
        print(json.dumps(read(asked.read)))
        return 0
    try:
        ops, impls = chosen(asked.only, asked.device)
    except ValueError as why:
        parser.error(str(why))
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the benches use a GPU where there is one
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("bench.kernels needs a GPU that torch can use, or --device cpu", file=sys.stderr)
        return 1
    done, failed = run(asked.device, ops, impls, asked.small or asked.device == "cpu")
    print(f"bench.kernels: {done} done, {failed} failed", file=sys.stderr)
    return int(failed > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main())
