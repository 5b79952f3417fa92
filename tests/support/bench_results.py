"""Bench results as a run leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.report import page
from bench.results import Results

MACHINE = {
    "device": "cpu", "name": "Some CPU", "threads": 2, "simd": "avx2", "bomkern": "0.1.0", "torch": "2.13.0",
    "python": "3.11", "system": "Linux", "ceilings": {"bytes": 2e10, "exponentials": 1e10, "flops": 4e11},
}  # fmt: skip


def row(case: str, peer: str, seconds: float, direction: str = "forward+backward", **size: int) -> dict[str, Any]:
    return {
        "op": case.split()[0], "case": case, "direction": direction, "peer": peer, "size": size, "seconds": seconds,
        "iqr": 0.0, "rounds": 5, "first_seconds": 1.0, "work": 1e6, "unit": "bytes", "rate": 1e9,
        "share": 0.5, "peak_bytes": int(2e6 * size["B"]), "launches": 3, "syncs": 1,
    }  # fmt: skip


def results(machine: dict[str, Any] = MACHINE, **times: float) -> Results:
    """Return every case at three sizes, with a step and a loss section; ``times`` changes a peer's time."""
    rows = [
        row(case, peer, times.get(peer, usual) * batch, B=batch, **({} if "goal" in case else {"D": 128}))
        for case in page.CASES
        for batch in (64, 512, 65536)
        for peer, usual in (("bomkern", 1e-6), ("torch.compile", 3e-6), ("eager", 9e-6))
    ]
    parts = {"networks": 0.2, "statistics": 0.05, "loss": 0.001, "updates": 0.01}
    compiled = (("bomkern default", 0.2), ("bomkern default compiled", 0.125))
    for name, seconds in (("bomkern lazy", 0.1), ("bomkern", 0.2), *compiled, ("plain", 0.3)):
        rows.append(
            {
                **row("nine-goal step", name, seconds, "whole", B=64),
                **({"parts": parts} if name != "bomkern lazy" else {}),
            }
        )
    rows += [row("loss section", name, 1e-4, B=64) for name in ("bomkern", "eager")]
    return Results(machine, "2026-01-02T03:04:05", "pytest bench/ --benchmark-only", rows)


def made(path: Path, found: Results, machine: dict[str, Any] = MACHINE) -> Path:
    """Write the results to ``path`` as pytest-benchmark does."""
    benches = []
    for one in found.rows:
        if "wrong" in one:
            continue
        stats = {"median": one["seconds"], "iqr": one["iqr"], "rounds": one["rounds"], "mean": 0.0}
        benches.append({"name": "x", "extra_info": {**one, "noise": 1}, "stats": stats})
    wrong = [one for one in found.rows if "wrong" in one]
    head = {"machine_info": machine, "datetime": found.date, "commit_info": {}}
    path.write_text(json.dumps({**head, "benchmarks": benches, "wrong": wrong}))
    return path
