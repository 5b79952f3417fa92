"""The CUDA kernels without a GPU: run under an emulator, compiled by nvcc, and read as machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
KERNELS = ROOT / "kernels" / "min_goal"

spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tools" / "cuda_check.py")
assert spec and spec.loader
cuda_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_check)


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_min_goal_agrees_with_the_cpu_under_the_emulator(tmp_path: Path) -> None:
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    compile_it = [gxx, "-std=c++20", "-O1", "-w", f"-I{EMULATOR}"]
    jobs = [
        subprocess.Popen([*compile_it, "-x", "c++", "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")])
        for source in (KERNELS / "cuda.cu", KERNELS / "cpu_baseline.cpp", EMULATOR / "check_min_goal.cpp")
    ]
    assert [job.wait(timeout=600) for job in jobs] == [0] * len(jobs)
    run(gxx, *sorted(tmp_path.glob("*.o")), "-o", tmp_path / "check")
    assert "agree" in run(tmp_path / "check")


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_120"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    arch = request.param
    out = tmp_path_factory.mktemp(arch) / "min_goal.cubin"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin", f"-arch={arch}"]
    return arch, out, run(nvcc, *flags, "-o", out, KERNELS / "cuda.cu")


@pytest.mark.slow
def test_no_kernel_spills(compiled: tuple[str, Path, str]) -> None:
    _, _, log = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= 14
    assert set(frames) == {("0", "0", "0")}


@pytest.fixture
def cuobjdump() -> str:
    found = cuda_check.find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump, neither the CUDA toolkit's nor Triton's")
    return found


@pytest.mark.slow
def test_machine_code_moves_16_bytes_and_touches_no_local_memory(
    compiled: tuple[str, Path, str], cuobjdump: str
) -> None:
    _, cubin, _ = compiled
    sass = run(cuobjdump, "-sass", cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    for name, wanted in (("forward_kernel", r"LDGSTS\.E\.BYPASS\.128"), ("forward_kernel", r"STG\.E\.128"),
                         ("backward_kernel", r"LDG\.E\.128"), ("backward_kernel", r"STG\.E\.128")):  # fmt: skip
        bodies = [part for part in sass.split("Function :")[1:] if name in part.splitlines()[0]]
        assert bodies and all(re.search(wanted, body) for body in bodies), f"{name} has no {wanted}"


@pytest.mark.slow
def test_cuda_check_reads_the_resources_of_a_kernel(compiled: tuple[str, Path, str], cuobjdump: str) -> None:
    arch, cubin, _ = compiled
    kernels = cuda_check.resource_usage(cuobjdump, cubin, arch)
    assert len(kernels) == 14
    assert all(k.stack == k.local == 0 and 0 < k.registers <= 128 for k in kernels)


def test_cuda_check_sees_a_spill() -> None:
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7bomkern4cuda4goodEv:
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:1632 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7bomkern4cuda3badEv:
  REG:64 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:1632 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN2at6othersEv:
  REG:64 STACK:99 SHARED:0 LOCAL:0 CONSTANT[0]:1632 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    good, bad = cuda_check.parse_usage(text)
    assert good == ("_ZN7bomkern4cuda4goodEv", 40, 16, 0, 0)
    assert bad.stack == 24
