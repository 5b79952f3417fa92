"""Prints, after pytest-benchmark's own tables, each peer's median over bomkern's: the figures that pages quote."""

from __future__ import annotations

import platform
from collections import defaultdict
from typing import Any

import torch


def pytest_configure(config: Any) -> None:
    config.option.benchmark_group_by = config.option.benchmark_group_by or "group"
    config.option.benchmark_disable_gc = True
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds", "iterations"]


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for bench in getattr(session, "benchmarks", []):
        if bench.stats and "peer" in bench.extra_info:
            groups[bench.group][bench.extra_info["peer"]] = bench.stats.median
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("each peer's median time over bomkern's")
    write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    for group, peers in groups.items():
        ours = next((time for name, time in peers.items() if name.startswith("bomkern")), None)
        if ours is None:
            continue
        others = [f"{name} {time / ours:.1f}x" for name, time in peers.items() if not name.startswith("bomkern")]
        write(f"{group:<48} bomkern {ours * 1e6:10.1f} us   " + "   ".join(others))
