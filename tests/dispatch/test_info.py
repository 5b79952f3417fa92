"""Test bomkern.info, and report each implementation that is not tested here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bomkern
from bomkern.dispatch import schemas, select
from tests.support.servers import PAIRS, why_skipped

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", schemas.OPS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_is_tested_here(op: str, pair: tuple[str, str]) -> None:
    if reason := why_skipped(op, *pair):
        pytest.skip(reason)
    assert callable(select.resolve(op, pair[1], pair[0]))


def test_info_reads_well() -> None:
    text = str(bomkern.info())
    assert f"torch {torch.__version__}" in text and "min_goal on cpu" in text
    build = bomkern.info()["build"]
    if build:
        assert {"compiler", "torch", "cuda", "cuda_architectures", "simd", "simd_here"} <= build.keys()
        assert build["simd_here"] in build["simd"].split()


def test_impl_that_cannot_serve_says_why() -> None:
    with pytest.raises(RuntimeError, match="input is on cpu"):
        bomkern.min_goal_loss(torch.rand(3, 2), impl="cuda")


def test_without_compiled_kernels_it_says_so_once_and_works() -> None:
    code = (
        "import sys; sys.modules['bomkern._C'] = None\n"
        "import warnings; warnings.simplefilter('always')\n"
        "import torch, bomkern\n"
        "print(bomkern.min_goal_loss(torch.tensor([[0.5, 0.25]])).item(), bomkern.info()['ops']['min_goal']['cpu'])\n"
        "import bomkern.ops.min_goal\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.count("RuntimeWarning") == 1 and "compiler" in done.stderr
    assert done.stdout.startswith("1.386") and "'reference': None" in done.stdout


def test_kernels_import_from_anywhere(tmp_path: Path) -> None:
    code = "import bomkern, bomkern.kernels.min_goal; print(bomkern.min_goal_loss)"
    for folder in (tmp_path, ROOT):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
