"""Each op once, forward and backward, large, for a profiler; and what the profiler found, as a table.

ncu --profile-from-start off --clock-control none --csv --metrics METRICS python -m bench.kernels > ncu.csv
python -m bench.kernels --metrics       # prints METRICS
python -m bench.kernels --read ncu.csv  # a JSON list: kernel, microseconds, shares of the peaks, occupancy
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
TO_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}


def run() -> None:
    """Every op by CUDA and by Triton between the profiler's start and stop, after a warm-up outside of it."""
    import torch

    from bench import (
        bench_active_units,
        bench_consistency_variance,
        bench_covariance_penalty,
        bench_gaussian_kl,
        bench_goal_set,
        bench_latent_statistics,
        bench_min_goal,
        bench_total_correlation,
    )
    from bench.harness import inputs, once
    from bomkern import _impl

    if not torch.cuda.is_available():
        sys.exit("bench.kernels needs a GPU that torch can use")
    goals, codes = {"K": 9, "B": 1_048_576}, {"B": 65536, "D": 128}
    chosen = [
        (bench_min_goal.CASES["all six constraints"], goals),
        (bench_goal_set.CASES["spill"], goals),
        (bench_total_correlation.CASE, {"B": 4096, "D": 128}),
        (bench_gaussian_kl.CASE, codes),
        (bench_consistency_variance.CASE, codes),
        (bench_active_units.CASE, codes),
        (bench_latent_statistics.CASE, codes),
        (bench_covariance_penalty.BY_SAMPLE, codes),
    ]
    for case, size in chosen:
        x = inputs(case, tuple(size.items()))
        for impl in ("cuda", "triton"):
            if _impl.why_not(case.op, impl, "cuda"):
                continue
            step = once(case, lambda *given, case=case, impl=impl: case.ours(*given, impl=impl), x, True)
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def read(path: Path) -> list[dict[str, Any]]:
    """What ncu wrote: one dict for each launch, in order. Nothing of it names the machine."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        launch = found.setdefault(row["ID"], {"kernel": _short(row["Kernel Name"])})
        value = float(row["Metric Value"].replace(",", ""))
        name = METRICS[row["Metric Name"]]
        launch[name] = round(value * TO_US[row["Metric Unit"]] if name == "us" else value, 2)
    return list(found.values())


def _short(name: str) -> str:
    """Without the type it returns, template arguments and parameters."""
    return re.split(r"[<(]", name.removeprefix("void "))[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", action="store_true", help="print what ncu is to measure")
    parser.add_argument("--read", type=Path, help="a file that ncu wrote with --csv")
    asked = parser.parse_args()
    if asked.metrics:
        print(",".join(METRICS))
    elif asked.read:
        print(json.dumps(read(asked.read)))
    else:
        run()


if __name__ == "__main__":
    main()
