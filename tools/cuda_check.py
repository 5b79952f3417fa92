"""Checks an installed bomkern that was built with CUDA, without a GPU: `python tools/cuda_check.py`.

Every op with a CPU kernel must have a CUDA kernel, and no kernel may use local memory (a register spilled, or an array
indexed at run time). Run it in an environment whose torch is a CUDA build.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# The namespaces that hold kernels, as they are mangled; a torch header's kernels would not be ours to judge.
OURS = re.compile(r"^_Z.*7bomkern")
TUNER = Path(__file__).resolve().parents[1] / "bench" / "tune.py"
USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


class Kernel(NamedTuple):
    name: str
    registers: int
    shared: int
    stack: int
    local: int


def find_cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one inside Triton's package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    for path in (Path("/usr/local/cuda/bin/cuobjdump"), *_in_triton()):
        if path.is_file():
            return str(path)
    return None


def _in_triton() -> list[Path]:
    spec = importlib.util.find_spec("triton")
    roots = spec.submodule_search_locations if spec else None
    return [Path(root) / "backends/nvidia/bin/cuobjdump" for root in roots or []]


def parse_usage(text: str) -> list[Kernel]:
    """The kernels of bomkern in what ``cuobjdump --dump-resource-usage`` prints, names still mangled."""
    kernels, name = [], None
    for line in text.splitlines():
        function = re.match(r"\s*Function (\S+?):\s*$", line)
        if function:
            name = function[1]
        elif name and "REG:" in line:
            use = {key: int(value) for key, value in USAGE.findall(line)}
            if OURS.match(name):
                kernels.append(Kernel(name, use["REG"], use["SHARED"], use["STACK"], use["LOCAL"]))
            name = None
    return kernels


def resource_usage(cuobjdump: str, binary: Path, arch: str) -> list[Kernel]:
    command = [cuobjdump, "--dump-resource-usage", "-arch", arch, str(binary)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {run.stderr.strip() or run.stdout.strip()}")
    return parse_usage(run.stdout)


def demangle(names: list[str]) -> list[str]:
    filt = shutil.which("c++filt")
    if not filt or not names:
        return names
    run = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
    short = [re.sub(r"bomkern::(\w+::)*|^void ", "", line) for line in run.stdout.splitlines()]
    return [re.sub(r"^([^(<]*(?:<.*>)?)\(.*", r"\1", line) for line in short]


def print_table(kernels: list[Kernel]) -> None:
    names = demangle([k.name for k in kernels])
    width = max(map(len, names), default=6)
    print(f"{'kernel':{width}}  registers  shared  stack  local")
    for name, k in sorted(zip(names, kernels, strict=True)):
        print(f"{name:{width}}  {k.registers:9}  {k.shared:6}  {k.stack:5}  {k.local:5}")


def ops_without_cuda() -> tuple[int, list[str]]:
    """Return the number of ops with a CPU kernel, and those of them without a CUDA kernel."""
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("bomkern::") and has(n, "CPU")]
    return len(names), sorted(n for n in names if not has(n, "CUDA"))


def thresholds_without_setter(package: Path) -> list[str]:
    """Return the thresholds that bench/tune.py sets and the built library lacks."""
    library = ctypes.CDLL(str(next(package.glob("_C*.so"))))
    missing = []
    for op, threshold in re.findall(r'Knob\("", "(\w+)\.(\w+)"', TUNER.read_text()):
        setter = getattr(library, f"bomkern_tune_{op}", None)
        if setter is None or setter(threshold.encode(), ctypes.c_int64(0)) < 1:
            missing.append(f"{op}.{threshold}")
    return missing


def check(arch: str) -> str | None:
    """Return the fault in one sentence, or None."""
    import torch

    import bomkern

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build: run this where one is installed"
    package = Path(bomkern.__file__).parent
    binaries = sorted(package.glob("_C*.so"))
    if not binaries:
        return f"no compiled extension (_C*.so) in {package}: build bomkern first"
    count, missing = ops_without_cuda()
    if count == 0:
        return "no op in namespace bomkern has a CPU kernel: the extension was not loaded"
    if missing:
        return f"{len(missing)} of {count} ops have a CPU kernel but none for CUDA: {', '.join(missing)}"
    print(f"{count} ops have a kernel for CPU and one for CUDA")
    if missing := thresholds_without_setter(package):
        return f"bench/tune.py turns what the library does not have: {', '.join(missing)}"
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        return "no cuobjdump: install the CUDA toolkit, or the triton package, which carries one"
    kernels = [k for binary in binaries for k in resource_usage(cuobjdump, binary, arch)]
    if not kernels:
        return f"no kernel of bomkern for {arch} in {', '.join(map(str, binaries))}: was it built with CUDA for {arch}?"
    print_table(kernels)
    spilled = [k.name for k in kernels if k.stack or k.local]
    if spilled:
        return f"{len(spilled)} kernels use local memory on {arch}: {', '.join(demangle(spilled))}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="the architecture whose machine code is read (default: sm_90)")
    try:
        problem = check(parser.parse_args().arch)
    except (ImportError, RuntimeError) as error:
        problem = str(error)
    if problem:
        print(f"cuda_check: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
