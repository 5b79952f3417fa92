"""The device of Triton's kernels: a GPU, or the CPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(file: str, passed: str, timeout: float) -> None:
    """Run ``TestKernels`` of a file on Triton's interpreter, in its own process, and check the count of passed tests.

    Args:
        file: the path of the file. passed: a pattern of the count and the word after it. timeout: in seconds.
    """
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"{file}::TestKernels"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(passed, done.stdout), done.stdout[-2000:]
