"""Configure pytest-benchmark, and print each peer's median over bomkern's after its tables."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from bench import harness, machine
from bench.keep import Keeper

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def pytest_addoption(parser: Any) -> None:
    parser.getgroup("benchmark").addoption(
        "--keep", type=Path, metavar="FILE", help="write each bench to FILE as it ends; skip those already in FILE"
    )
    parser.getgroup("benchmark").addoption(
        "--trial", action="store_true", help="take one round of a whole step: to see that the bench runs"
    )


def pytest_configure(config: Any) -> None:
    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # importing torch may have set the variable
        # torch.compile caches on disk: with the default folder a first call would reuse an earlier run's code.
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ[CACHE] = folder.name
    # glibc keeps freed memory up to twice the largest freed block below 32 MB, and returns the rest to the system.
    # Freeing one such block here makes the cost of fresh pages independent of the benches that ran before.
    torch.empty(31 << 20, dtype=torch.uint8)
    config.option.benchmark_group_by = config.option.benchmark_group_by or "group"
    config.option.benchmark_disable_gc = True
    config.option.benchmark_timer = "bench.machine.timer"
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    if config.option.keep and not config.option.collectonly and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Keeper(config.option.keep), "bench-keep")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep what the figures depend on, and nothing that identifies the owner of the machine."""
    machine_info.clear()
    machine_info.update(machine.described(), ceilings={u: machine.ceiling(u) for u in machine.UNITS})


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add the peers that were not timed because their results were wrong."""
    output_json["wrong"] = harness.WRONG


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Exit with 0 where no bench was left to run: all are in the file, or a package they need is not installed."""
    plugins = session.config.pluginmanager
    keeper, reporter = plugins.get_plugin("bench-keep"), plugins.get_plugin("terminalreporter")
    nothing = (keeper and keeper.left_out) or (reporter and reporter.stats.get("skipped"))
    if nothing and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


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
    described = machine.described()
    write(f"{described['name']}, torch {described['torch']}, {described['threads']} threads")
    for group, peers in groups.items():
        name, ours = next(iter(peers.items()))
        others = [f"{peer} {time / ours:.2f}x" for peer, time in peers.items() if peer != name]
        write(f"{group:<52} {name} {ours * 1e6:10.1f} us   " + "   ".join(others))
