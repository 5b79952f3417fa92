"""Test runs in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
