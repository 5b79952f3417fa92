"""Test the CUDA kernels without a GPU: run them in an emulator, compile them by nvcc, and read their machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "native" / "cuda_emulator"
KERNELS = ROOT / "kernels"

sys.path.insert(0, str(ROOT / "tools"))
import cuda_check  # noqa: E402
import sass_count  # noqa: E402

COMPANIONS = {"min_goal": ["kernels/min_goal/cpu_baseline.cpp"]}  # sources compiled with an op's emulated kernels
# For each op: its number of kernels, and the accesses that they must have.
COUNTS = {
    "min_goal": 16,
    "goal_set": 18,
    "total_correlation": 20,
    "gaussian_kl": 20,
    "consistency_variance": 20,
    "active_units": 10,
    "latent_statistics": 10,
    "covariance_penalty": 20,
}
# Thresholds without a knob, for devices on which bench/tune.py does not run.
ONLY_OLD = {("min_goal", "one_block_without_clusters")}
READ, WRITE = r"LDG\.E\.128", r"STG\.E\.128"
# The mangled template arguments of streaming kernels, where 16 bytes are 8 halves, 4 floats or 2 doubles.
PIECES = ("IfLi8E", "IfLi4E", "IdLi2E")


def streaming(reads: str, writes: str, pieces: tuple[str, ...] = PIECES) -> list[tuple[str, str]]:
    """Return the kernels that must have 16-byte loads, and those that must have 16-byte stores."""
    return [
        (name + piece, wanted)
        for names, wanted in ((reads, READ), (writes, WRITE))
        for name in names.split()
        for piece in pieces
    ]


ACCESSES = {
    "min_goal": [
        ("forward_kernel", r"LDGSTS\.E\.BYPASS\.128"),
        ("forward_kernel", WRITE),
        ("backward_kernel", READ),
        ("backward_kernel", WRITE),
    ],
    "goal_set": [
        ("forward_kernel", r"LDGSTS\.E\.BYPASS\.128"),
        ("forward_kernel", WRITE),
        *streaming("backward_kernel", "backward_kernel matrix_kernel", PIECES[1:]),
    ],
    "total_correlation": [
        (name, wanted)
        for name in ("forward_kernel", "responsibility_kernel", "gradient_kernel")
        for wanted in (r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128", WRITE)
    ],
    "covariance_penalty": streaming(
        "center_kernel recenter_kernel gram_kernel parts_kernel finish_kernel",
        "center_kernel recenter_kernel gram_kernel parts_kernel finish_kernel",
        PIECES[1:],
    ),
    **dict.fromkeys(
        ("gaussian_kl", "consistency_variance", "active_units", "latent_statistics"),
        streaming("forward_kernel backward_kernel", "backward_kernel"),
    ),
}


def run(*command: object, **environment: str) -> str:
    given = [str(c) for c in command]
    done = subprocess.run(given, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def kernel_sources(op: str) -> list[Path]:
    """Return the sources of an op's kernels; some include the headers of another op."""
    return [*KERNELS.glob("*/*.h"), *(KERNELS / op).glob("*.cu")]


def emulated(op: str, built_once: Any) -> Path:
    """Return the program that checks an op's emulated kernels."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    # A misaligned access becomes an illegal instruction; a GPU would refuse it.
    alignment = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    # Includes the kernels that only bench/tune.py launches; `make sanitize` runs a library's kernels without them.
    compile_it = [gxx, "-std=c++20", "-O1", "-w", *alignment, f"-I{EMULATOR}", "-DBOMKERN_TUNE"]
    sources = [
        KERNELS / op / "cuda.cu",
        EMULATOR / f"check_{op}.cpp",
        *(ROOT / name for name in COMPANIONS.get(op, ())),
    ]

    def build(folder: Path) -> None:
        objects = [folder / f"{source.stem}.o" for source in sources]
        for source, made in zip(sources, objects, strict=True):
            run(*compile_it, "-x", "c++", "-c", source, "-o", made)
        run(gxx, *objects, "-o", folder / "check")

    read = {*sources, *kernel_sources(op), *EMULATOR.glob("*.h")}
    how = " ".join([*compile_it, run(gxx, "--version")])
    made: Path = built_once(f"emulated-{op}", how, read, build)
    return made / "check"


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", COUNTS)
def test_the_emulated_kernels_agree(op: str, every: int, built_once: Any) -> None:
    """The emulated kernels pass their check on every seventh case, or on every case."""
    assert "agree" in run(emulated(op, built_once), BOMKERN_EMULATE_EVERY=str(every))


class Compiled(NamedTuple):
    op: str
    arch: str
    cubin: Path
    log: str


@pytest.fixture(
    scope="module", params=[(op, arch) for op in COUNTS for arch in ("sm_80", "sm_90", "sm_120")], ids="-".join
)
def compiled(request: pytest.FixtureRequest, built_once: Any) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    op, arch = request.param
    source = KERNELS / op / "cuda.cu"
    command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin", f"-arch={arch}"]

    def build(folder: Path) -> None:
        (folder / "log").write_text(run(*command, "-o", folder / "cubin", source))

    how = " ".join([*command, run(nvcc, "--version")])
    made: Path = built_once(f"nvcc-{op}-{arch}", how, kernel_sources(op), build)
    return Compiled(op, arch, made / "cubin", (made / "log").read_text())


@pytest.mark.slow
def test_no_kernel_spills(compiled: Compiled) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    assert len(frames) >= COUNTS[compiled.op]
    assert set(frames) == {("0", "0", "0")}


@pytest.fixture
def cuobjdump() -> str:
    found = cuda_check.find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump, neither the CUDA toolkit's nor Triton's")
    return found


@pytest.mark.slow
def test_machine_code_moves_16_bytes_and_touches_no_local_memory(compiled: Compiled, cuobjdump: str) -> None:
    sass = run(cuobjdump, "-sass", compiled.cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    for name, wanted in ACCESSES[compiled.op]:
        bodies = [part for part in sass.split("Function :")[1:] if name in part.splitlines()[0]]
        assert bodies and all(re.search(wanted, body) for body in bodies), f"{name} has no {wanted}"


@pytest.mark.slow
def test_cuda_check_reads_the_resources_of_a_kernel(compiled: Compiled, cuobjdump: str) -> None:
    kernels = cuda_check.resource_usage(cuobjdump, compiled.cubin, compiled.arch)
    assert len(kernels) == COUNTS[compiled.op]
    assert all(k.stack == k.local == 0 and 0 < k.registers <= 255 for k in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [("total_correlation", "sm_90")], indirect=True)
def test_total_correlation_is_bound_by_exponentials(compiled: Compiled, cuobjdump: str) -> None:
    loops = sass_count.loops(run(cuobjdump, "-sass", compiled.cubin))
    assert set(loops) == {"forward_kernel<1>", "forward_kernel<2>", "gradient_kernel<rows>",
                          "gradient_kernel<components>"}  # fmt: skip
    for name, loop in loops.items():
        forward = name.startswith("forward")
        assert loop.exponentials == (32 if name == "forward_kernel<2>" else 16)
        assert loop.polynomials * 16 == (loop.exponentials if forward else 0)
        # Exponentials per clock and multiprocessor; the hardware alone gives 16.
        assert loop.bound >= 16 * (0.85 if forward or "rows" in name else 0.75), f"{name}: {loop}"


def test_every_threshold_that_is_tuned_has_a_setter(tmp_path: Path) -> None:
    knobs = set(re.findall(r'Knob\("", "(\w+)\.(\w+)"', cuda_check.TUNER.read_text()))
    sources = [path.read_text() for path in KERNELS.rglob("cuda*") if path.suffix in (".cu", ".h")]
    tail = [match for text in sources for match in re.findall(r"bomkern_tune_(\w+)\((.*?)^}", text, re.M | re.S)]
    assert knobs == {(op, name) for op, body in tail for name in re.findall(r'\{"(\w+)", &', body)} - ONLY_OLD
    if gxx := shutil.which("g++"):
        (tmp_path / "some.cpp").write_text('extern "C" long bomkern_tune_rows(const char*, long) { return 1; }')
        run(gxx, "-shared", "-fPIC", tmp_path / "some.cpp", "-o", tmp_path / "_C.so")
        without = cuda_check.thresholds_without_setter(tmp_path)
        assert sorted(without) == sorted(f"{op}.{name}" for op, name in knobs if op != "rows")


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


# A nested loop. The inner loop has two paths, and the end of the second was moved behind the kernel's end.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R0, R0, R1 ;
        /*0020*/                   BSSY B0, 0x60 ;
        /*0030*/              @!P0 BRA 0x90 ;
        /*0040*/                   LDS R3, [R2] ;
        /*0050*/                   BSYNC B0 ;
        /*0060*/              @P1  BRA 0x20 ;
        /*0070*/                   BRA.U UP0, 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   MUFU.EX2 R2, R0 ;
        /*00a0*/                   FMUL R2, R2, R0 ;
        /*00b0*/                   BSYNC B0 ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""


def test_sass_count_sees_the_loops() -> None:
    nest = sass_count.Nest(sass_count.instructions_of(SASS))
    assert [i.address for i in nest.reached] == list(range(0, 0xC0, 16))
    assert nest.show() == "2/2 [8/6]"
    assert len(nest.looped) == 10


def test_sass_count_compares_two_commits() -> None:
    def kernel(registers: int, loops: str) -> sass_count.Kernel:
        return sass_count.Kernel(registers, 0, 100, sass_count.Counter({"FMA": 40, "ALU": 2}), loops)

    before = {"op old<float>": kernel(30, "42/42"), "op same<float>": kernel(30, ""), "op k<float>": kernel(40, "5/5")}
    after = {"op k<float>": kernel(32, "42/21"), "op same<float>": kernel(30, "")}
    page = sass_count.page(before, after, "python tools/sass_count.py", "sm_90")
    assert "| `op k<float>` | 40 to 32 | 100 to 100 | 42 to 42 | `5/5` | `42/21` |" in page
    assert "| `op old<float>` | 30 to none | 100 to none | 42 to none | `42/42` | none |" in page
    assert "op same" not in page
    assert "1 other kernels are unchanged. Kernels that spill: none." in page
