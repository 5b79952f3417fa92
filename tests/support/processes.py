"""Test runs in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist

import bomkern

ROOT = Path(__file__).resolve().parents[2]


def outside_xdist() -> dict[str, str]:
    """Return an environment without xdist's variables, because pytest-benchmark is disabled in a worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run_tests(files: str, selection: str, **environment: str) -> None:
    """Run selected tests of some files in a separate process, with additional environment variables."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split(), "-k", selection]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def run_on_instruction_set(simd: str, files: str, selection: str) -> None:
    """Run selected tests of some files on the vectors of another CPU; skip if this build lacks them."""
    if simd not in bomkern.info()["build"].get("simd", "").split():
        pytest.skip(f"{simd} is not built for this processor")
    run_tests(files, selection, BOMKERN_SIMD=simd)


def on_two_ranks(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(group, rank, *arguments)`` in two processes of a group, and return what each of them returned.

    An exception of either comes out, with its traceback.
    """
    mp.spawn(_on_a_rank, (str(folder), work, arguments), nprocs=2)
    return [torch.load(path) for path in sorted(folder.glob("returned*"))]


def _on_a_rank(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        torch.save(work(dist.group.WORLD, rank, *arguments), Path(folder, f"returned{rank}"))
    finally:
        dist.destroy_process_group()
