"""Test the vector functions of kernels/common/simd.h in a C++ program, for each instruction set of this CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import bomkern

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
HERE = ("baseline", "avx2", "avx512")
BUILD = bomkern.info()["build"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("simd", HERE)
def test_error_in_ulp(simd: str, tmp_path: Path) -> None:
    if not BUILD or HERE.index(simd) > HERE.index(BUILD["simd_here"]):
        pytest.skip(f"this CPU does not run {simd}")
    target = [] if simd == "baseline" else [f'-DTARGET="target_{simd}.h"']
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-std=c++20", f"-I{ROOT}/kernels/common"]
    program = tmp_path / "simd_error"
    subprocess.run([COMPILER, *flags, *target, f"{ROOT}/tests/native/simd_error.cpp", "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    errors = dict(zip(("log", "exp", "log2", "exp2", "exp_all", "exp2_zero"), map(float, printed), strict=True))
    limits = {"log": 1.0, "exp": 1.0, "log2": 1.5, "exp2": 2.2, "exp_all": 1.2, "exp2_zero": 2.2}
    assert all(errors[name] < limit for name, limit in limits.items()), errors


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_total_correlation_on_64_byte_vectors(tmp_path: Path) -> None:
    flags = ["-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-std=c++20"]
    program = tmp_path / "wide"
    sources = [f"{ROOT}/tests/native/total_correlation_wide.cpp", f"{ROOT}/kernels/total_correlation/cpu_baseline.cpp"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(program)], check=True)
    single, double = map(float, subprocess.run([program], capture_output=True, text=True, check=True).stdout.split())
    assert single < 2e-5 and double < 1e-12, (single, double)
