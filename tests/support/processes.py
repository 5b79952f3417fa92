"""Tests in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def outside_xdist() -> dict[str, str]:
    """The environment of a pytest that is no worker of this one: in a worker nothing is benched."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run_tests(files: str, selection: str, **environment: str) -> None:
    """Runs a selection of the tests of a file, or more, in a process of its own, with more in its environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split(), "-k", selection]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
