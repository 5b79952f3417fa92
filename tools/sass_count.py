"""Count the instructions of kernels in machine code. No GPU is needed; the results are counts, not times.

`python tools/sass_count.py [--arch sm_90]` compiles total_correlation (nvcc, a few seconds) and prints its inner loops:
instructions per exponential by pipe, and the bound that follows. A multiprocessor of sm_90 has four schedulers that
issue one warp instruction a clock each. A warp instruction takes the MUFU pipe (16 lanes a multiprocessor) 2 clocks,
the FMA pipe (128) 1/4 and the ALU (64) 1/2. It takes shared memory (128 bytes a clock) 1 clock for each 4 bytes a lane.

`--kernel OP ...` or `--all` prints every kernel of these ops instead: registers, instructions, those in loops by pipe,
and the loops. A loop is shown as `all/longest [loops inside]`. The first number counts the loop's own instructions on
all paths, which a warp issues if its lanes diverge everywhere. The second counts those on the longest path alone. Loops
inside are counted separately. `--against REV` compares with a commit, and `--write` writes bench/results/sass.md.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "bench" / "results" / "sass.md"
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin"]
CODE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)(.*?);", re.MULTILINE)
FMA = ("FADD", "FMUL", "FFMA", "IMAD")
FP64 = ("DADD", "DMUL", "DFMA", "DSETP")
MEMORY = ("LDS", "STS", "LDG", "STG", "LDC", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOMS", "ATOMG", "RED", "SHFL")
PIPES = ("MUFU", "FMA", "FP64", "ALU", "memory", "control")


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that it jumps to, or at which a divergence that it opens ends."""
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name in ("BRA", "BSSY", "CALL") else None
        return int(match[1], 16) if match else None

    @property
    def may_fall_through(self) -> bool:
        if self.name == "BRA":
            return bool(self.predicate) or ".DIV" in self.opcode or not self.operands.strip().startswith("0x")
        return self.name not in ("EXIT", "RET") or bool(self.predicate)


def instructions_of(body: str) -> list[Instruction]:
    return [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in CODE.finditer(body)]


class Loop(NamedTuple):
    exponentials: int  # in one turn, including those by polynomial
    polynomials: int
    pipes: Counter[str]
    shared_clocks: int  # at 128 bytes a clock

    @property
    def issued(self) -> float:
        """Warp instructions per exponential."""
        return self.pipes.total() / self.exponentials

    @property
    def bound(self) -> float:
        """Exponentials per clock and multiprocessor, by the tightest pipe."""
        p = self.pipes
        clocks = max(p.total() / 4, p["MUFU"] * 2, p["FMA"] / 4, p["ALU"] / 2, self.shared_clocks)
        return 32 * self.exponentials / clocks


def pipe_of(opcode: str) -> str:
    name = opcode.split(".")[0]
    if name == "MUFU":
        return "MUFU"
    if name in FMA:
        return "FMA"
    if name in FP64:
        return "FP64"
    if name in MEMORY:
        return "memory"
    return "control" if name in ("BRA", "BSSY", "BSYNC", "NOP", "WARPSYNC") else "ALU"


def executed(turn: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Return a turn without the code that branches skip: the weights, which few tiles of a stratified mixture need."""
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
    """Return the innermost loop of a kernel with the most hardware exponentials, the shortest where several tie."""
    code = [(i.address, i.opcode, i.operands) for i in instructions_of(body)]
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
    # Each polynomial has its own clamp at -126, which compiles to the loop's only maximum that keeps NaN.
    polynomials = sum(c[1].startswith("FMNMX.NAN") for c in turn)
    shared = 0
    for _, opcode, _ in turn:
        if opcode.startswith(("LDS", "STS")) and not opcode.startswith("LDSM"):
            shared += 4 if "128" in opcode else 2 if "64" in opcode else 1
    return Loop(hardware + polynomials, polynomials, Counter(pipe_of(c[1]) for c in turn), shared)


def short_name(mangled: str) -> str:
    """Return the short name of a kernel, such as forward_kernel<2> or gradient_kernel<rows>."""
    match = re.search(r"\d([a-z]+_kernel)If(?:Li(\d+)|LNS\d_4SideE(\d))E", mangled)
    if not match:
        raise RuntimeError(f"{mangled} is not a kernel that this tool knows")
    name, chunks, side = match.groups()
    return f"{name}<{chunks or ('rows', 'components')[int(side)]}>"


def loops(sass: str, kernels: str = "(forward|gradient)_kernelIf") -> dict[str, Loop]:
    """Return the inner loop of each float kernel whose mangled name matches."""
    out = {}
    for part in sass.split("Function :")[1:]:
        name = part.splitlines()[0].strip()
        if re.search(kernels, name):
            out[short_name(name)] = inner_loop(part)
    return out


class Nest:
    """The nested loops of a kernel, found from its jumps."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        self._next = self._edges()
        self._order, back = self._walk()
        self.loops: dict[int, set[int]] = {}  # first instruction -> all instructions, including those of inner loops
        before: dict[int, list[int]] = {}
        for at in self._order:
            for to in self._next[at]:
                before.setdefault(to, []).append(at)
        for end, start in back:
            body = self.loops.setdefault(start, {start})
            pending = [end]
            while pending:
                at = pending.pop()
                if at not in body:
                    body.add(at)
                    pending += before.get(at, [])
        self._back = set(back)

    def _edges(self) -> list[list[int]]:
        """Return the successors of each instruction; a call is followed by the instruction behind it."""
        place = {i.address: at for at, i in enumerate(self.code)}
        edges: list[list[int]] = []
        joins: dict[str, list[int]] = {}
        for i in self.code:
            if i.name == "BSSY" and i.target is not None:
                joins.setdefault(i.operands.split(",")[0].strip(), []).append(i.target)
        for at, i in enumerate(self.code):
            after = [at + 1] if at + 1 < len(self.code) and i.may_fall_through else []
            if i.name == "BRA" and i.target in place:
                after.append(place[i.target])
            if i.name == "BSYNC":
                # Execution continues where the divergence ends: at the next instruction, unless the block was moved.
                ends = joins.get(i.operands.strip(), [])
                if after and self.code[at + 1].address not in ends:
                    earlier = [end for end in ends if end <= i.address]
                    after = [place[max(earlier)]] if earlier else after
            edges.append(after)
        return edges

    def _walk(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the reachable instructions, each before its successors, and the backward jumps."""
        place = {i.address: at for at, i in enumerate(self.code)}
        called = {place[i.target] for i in self.code if i.name == "CALL" and i.target in place}
        state = [0] * len(self.code)
        finished: list[int] = []
        back: list[tuple[int, int]] = []
        for root in sorted({0, *called}, reverse=True):
            if state[root]:
                continue
            state[root] = 1
            stack: list[tuple[int, Iterator[int]]] = [(root, iter(self._next[root]))]
            while stack:
                at, following = stack[-1]
                to = next(following, None)
                if to is None:
                    stack.pop()
                    state[at] = 2
                    finished.append(at)
                elif state[to] == 1:
                    back.append((at, to))
                elif state[to] == 0:
                    state[to] = 1
                    stack.append((to, iter(self._next[to])))
        return finished[::-1], back

    @property
    def reached(self) -> list[Instruction]:
        return [self.code[at] for at in sorted(self._order)]

    @property
    def looped(self) -> list[Instruction]:
        return [self.code[at] for at in sorted(set().union(*self.loops.values()))]

    def inside(self, start: int | None) -> list[int]:
        """Return the loops directly inside the one that begins at ``start``, or the outermost ones for None."""
        body = self.loops[start] if start is not None else set(range(len(self.code)))
        within = [s for s in self.loops if s != start and s in body]
        return sorted(s for s in within if not any(t not in (s, start) and s in self.loops[t] for t in within))

    def own(self, start: int) -> set[int]:
        return self.loops[start].difference(*(self.loops[s] for s in self.inside(start)))

    def longest(self, start: int) -> int:
        """Return the number of instructions on the longest path of one turn, without those of inner loops."""
        own, length = self.own(start), {start: 1}
        for at in self._order:
            if at not in length:
                continue
            for to in self._next[at]:
                if (at, to) not in self._back and to in self.loops[start]:
                    length[to] = max(length.get(to, 0), length[at] + (to in own))
        return max(length.values())

    def show(self, start: int | None = None) -> str:
        parts = []
        for s in self.inside(start):
            within = self.show(s)
            parts.append(f"{len(self.own(s))}/{self.longest(s)}" + (f" [{within}]" if within else ""))
        return ", ".join(parts)


class Kernel(NamedTuple):
    registers: int
    stack: int  # bytes of local memory per thread, which hold spilled registers
    instructions: int
    looped: Counter[str]  # by pipe
    loops: str


def compiled_kernels(op: str, arch: str, root: Path = ROOT) -> dict[str, Kernel]:
    """Return the kernels of one op, by name."""
    usage, sass = compile_op(op, arch, root)
    used = {kernel.name: kernel for kernel in usage}
    parts = {part.splitlines()[0].strip(): part for part in sass.split("Function :")[1:]}
    names = [name for name in parts if name in used]
    out = {}
    for name, short in zip(names, cuda_check.demangle(names), strict=True):
        nest = Nest(instructions_of(parts[name]))
        looped = Counter(pipe_of(i.opcode) for i in nest.looped)
        use = used[name]
        out[f"{op} {short}"] = Kernel(use.registers, use.stack + use.local, len(nest.reached), looped, nest.show())
    return dict(sorted(out.items()))


def compile_op(op: str, arch: str, root: Path = ROOT) -> tuple[list[cuda_check.Kernel], str]:
    """Compile an op's kernels, and return their resource usage and machine code."""
    nvcc, cuobjdump = shutil.which("nvcc"), cuda_check.find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        raise RuntimeError("nvcc and cuobjdump are needed (the latter comes with the CUDA toolkit or triton)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{op}.cubin"
        source = root / "kernels" / op / "cuda.cu"
        subprocess.run([nvcc, *NVCC_FLAGS, f"-arch={arch}", "-o", cubin, source], check=True)
        sass = subprocess.run([cuobjdump, "-sass", cubin], check=True, capture_output=True, text=True).stdout
        return cuda_check.resource_usage(cuobjdump, cubin, arch), sass


def kernels_of_commit(ops: list[str], arch: str, rev: str) -> dict[str, Kernel]:
    """Return the kernels of another commit; an op that it lacks has none."""
    archive = subprocess.run(["git", "archive", rev, "kernels"], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        root = Path(folder)
        there = [op for op in ops if (root / "kernels" / op / "cuda.cu").is_file()]
        return {name: kernel for op in there for name, kernel in compiled_kernels(op, arch, root).items()}


def print_kernels(kernels: dict[str, Kernel]) -> None:
    width = max(map(len, kernels), default=6)
    print(f"{'':{width}} {'':>9} {'':>5} {'instruc-':>8}  in loops, by pipe")
    print(f"{'kernel':{width}} registers spill {'tions':>8}  " + " ".join(f"{p:>7}" for p in PIPES) + "  loops")
    for name, k in kernels.items():
        pipes = " ".join(f"{k.looped[p]:7}" for p in PIPES)
        print(f"{name:{width}} {k.registers:9} {k.stack:5} {k.instructions:8}  {pipes}  {k.loops}")


def page(before: dict[str, Kernel], after: dict[str, Kernel], command: str, arch: str) -> str:
    """Return a page of Markdown with the kernels that differ."""
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    lines = [
        "# Kernels in machine code, before and after",
        "",
        f"Written by `{command}`, for {arch}.",
        "Counts of instructions, not times. A loop is `all/longest [loops inside]`: its own instructions on all its",
        "paths together, and those on the longest path alone. Loops inside count by themselves.",
        "",
        "| kernel | registers | instructions | in loops | loops before | loops after |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        pair = [before.get(name), after.get(name)]
        cells = [
            " to ".join("none" if k is None else str(value(k)) for k in pair)
            for value in (lambda k: k.registers, lambda k: k.instructions, lambda k: k.looped.total())
        ]
        nests = ["none" if k is None else f"`{k.loops}`" if k.loops else "" for k in pair]
        lines.append(f"| `{name}` | {' | '.join([*cells, *nests])} |")
    spilled = [n for n, k in after.items() if k.stack]
    same = len(after.keys() & before.keys()) - sum(n in before and n in after for n in names)
    lines += ["", f"{same} other kernels are unchanged. Kernels that spill: {', '.join(spilled) or 'none'}.", ""]
    return "\n".join(lines)


def print_exponentials(arch: str) -> None:
    counted = loops(compile_op("total_correlation", arch)[1])
    print("warp instructions per exponential in the inner loop; bound: exponentials per clock and multiprocessor")
    print(f"{'kernel':28} {'MUFU':>6} {'FMA':>6} {'ALU':>6} {'memory':>6} {'control':>7} {'issued':>6} {'bound':>6}")
    for name, loop in sorted(counted.items()):
        each = [loop.pipes[pipe] / loop.exponentials for pipe in ("MUFU", "FMA", "ALU", "memory", "control")]
        row = " ".join(f"{v:{w}.3f}" for v, w in zip([*each, loop.issued], (6, 6, 6, 6, 7, 6), strict=True))
        print(f"{name:28} {row} {loop.bound:6.2f}")


def run(args: argparse.Namespace) -> None:
    ops = sorted(p.parent.name for p in ROOT.glob("kernels/*/cuda.cu"))
    chosen = ops if args.all else args.kernel
    if not chosen:
        return print_exponentials(args.arch)
    unknown = sorted(set(chosen) - set(ops))
    if unknown:
        raise RuntimeError(f"no CUDA kernels of {', '.join(unknown)}; there are {', '.join(ops)}")
    kernels = {name: k for op in chosen for name, k in compiled_kernels(op, args.arch).items()}
    if not args.against:
        return print_kernels(kernels)
    before = kernels_of_commit(chosen, args.arch, args.against)
    which = "--all" if args.all else f"--kernel {' '.join(chosen)}"
    command = f"python tools/sass_count.py {which} --against {args.against} --write"
    text = page(before, kernels, command, args.arch)
    if args.write:
        PAGE.write_text(text)
    else:
        print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="the architecture to compile for (default: sm_90)")
    parser.add_argument("--kernel", nargs="+", metavar="OP", default=[], help="print the kernels of these ops")
    parser.add_argument("--all", action="store_true", help="print the kernels of all ops")
    parser.add_argument("--against", metavar="REV", help="a commit to compare with; requires --kernel or --all")
    parser.add_argument("--write", action="store_true", help="write the comparison into bench/results/sass.md")
    try:
        run(parser.parse_args())
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"sass_count: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
