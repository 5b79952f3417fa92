"""Counts total_correlation's inner loops in machine code: instructions per exponential by pipe, and what they allow.

`python tools/sass_count.py [--arch sm_90]` compiles the kernels (nvcc, a few seconds) and prints the table; no GPU is
needed. These are counts, not times. A multiprocessor of sm_90 has four schedulers that issue one warp instruction a
clock each; a warp instruction takes the MUFU pipe (16 lanes a multiprocessor) 2 clocks, the FMA pipe (128) 1/4, the ALU
(64) 1/2, and shared memory (128 bytes a clock) 1 clock for each 4 bytes a lane.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cuda_check

SOURCE = Path(__file__).resolve().parents[1] / "kernels" / "total_correlation" / "cuda.cu"
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin"]
CODE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", re.MULTILINE)
FMA = ("FADD", "FMUL", "FFMA", "IMAD")
MEMORY = ("LDS", "STS", "LDG", "STG", "LDC", "LDGSTS")


class Loop(NamedTuple):
    exponentials: int  # in one turn, those by polynomial included
    polynomials: int
    pipes: Counter[str]
    shared_clocks: int  # at 128 bytes a clock

    @property
    def issued(self) -> float:
        """Warp instructions per exponential."""
        return self.pipes.total() / self.exponentials

    @property
    def bound(self) -> float:
        """Exponentials a clock and multiprocessor, the tightest of the pipes."""
        p = self.pipes
        clocks = max(p.total() / 4, p["MUFU"] * 2, p["FMA"] / 4, p["ALU"] / 2, self.shared_clocks)
        return 32 * self.exponentials / clocks


def pipe_of(opcode: str) -> str:
    name = opcode.split(".")[0]
    if name == "MUFU":
        return "MUFU"
    if name in FMA:
        return "FMA"
    if name in MEMORY:
        return "memory"
    return "control" if name in ("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC") else "ALU"


def executed(turn: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """A turn without what a branch jumps over: the weights, which few tiles of a stratified mixture need."""
    out, until = [], 0
    for address, opcode, rest in turn:
        if address < until:
            continue
        out.append((address, opcode, rest))
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        if target and address < int(target[1], 16) <= turn[-1][0]:
            until = int(target[1], 16)
    return out


def inner_loop(body: str) -> Loop:
    """Of a kernel's innermost loops the one with the most hardware exponentials; the shortest of those."""
    code = [(int(m[1], 16), m[2], m[3]) for m in CODE.finditer(body)]
    ends = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            ends.append((int(target[1], 16), address))
    innermost = [a for a in ends if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ends)]
    turns = [executed([c for c in code if start <= c[0] <= end]) for start, end in innermost]
    counts = [(-sum(c[1].startswith("MUFU.EX2") for c in turn), len(turn), turn) for turn in turns]
    if not counts or min(counts)[0] == 0:
        raise RuntimeError("no loop with exponentials in this kernel")
    hardware, turn = -min(counts)[0], min(counts)[2]
    # Each polynomial has its own clamp at -126, the one maximum of the loop that keeps NaN.
    polynomials = sum(c[1].startswith("FMNMX.NAN") for c in turn)
    shared = 0
    for _, opcode, _ in turn:
        if opcode.startswith(("LDS", "STS")) and not opcode.startswith("LDSM"):
            shared += 4 if "128" in opcode else 2 if "64" in opcode else 1
    return Loop(hardware + polynomials, polynomials, Counter(pipe_of(c[1]) for c in turn), shared)


def short_name(mangled: str) -> str:
    """forward_kernel<2>, gradient_kernel<rows>, ..."""
    found = re.search(r"\d([a-z]+_kernel)If(?:Li(\d+)|LNS\d_4SideE(\d))E", mangled)
    if not found:
        raise RuntimeError(f"{mangled} is not a kernel that this tool knows")
    name, chunks, side = found.groups()
    return f"{name}<{chunks or ('rows', 'components')[int(side)]}>"


def loops(sass: str, kernels: str = "(forward|gradient)_kernelIf") -> dict[str, Loop]:
    """The inner loop of each float kernel whose mangled name matches."""
    out = {}
    for part in sass.split("Function :")[1:]:
        name = part.splitlines()[0].strip()
        if re.search(kernels, name):
            out[short_name(name)] = inner_loop(part)
    return out


def compile_and_count(arch: str) -> dict[str, Loop]:
    nvcc, cuobjdump = shutil.which("nvcc"), cuda_check.find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        raise RuntimeError("nvcc and cuobjdump are needed (the latter comes with the CUDA toolkit or triton)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "total_correlation.cubin"
        subprocess.run([nvcc, *NVCC_FLAGS, f"-arch={arch}", "-o", cubin, SOURCE], check=True)
        return loops(subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="the architecture to compile for (default: sm_90)")
    try:
        counted = compile_and_count(parser.parse_args().arch)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"sass_count: {error}", file=sys.stderr)
        return 1
    print("warp instructions per exponential in the inner loop; bound: exponentials a clock and multiprocessor")
    print(f"{'kernel':28} {'MUFU':>6} {'FMA':>6} {'ALU':>6} {'memory':>6} {'control':>7} {'issued':>6} {'bound':>6}")
    for name, loop in sorted(counted.items()):
        each = [loop.pipes[pipe] / loop.exponentials for pipe in ("MUFU", "FMA", "ALU", "memory", "control")]
        row = " ".join(f"{v:{w}.3f}" for v, w in zip([*each, loop.issued], (6, 6, 6, 6, 7, 6), strict=True))
        print(f"{name:28} {row} {loop.bound:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
