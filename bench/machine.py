"""What a bench asks the machine: what it is, what it can do at most, memory at its peak, launches and host syncs."""

from __future__ import annotations

import ctypes
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bomkern
from bomkern.common.torch_internals import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent
COPY_BYTES = 2**30 if DEVICE == "cuda" else 2**28
UNITS = ("bytes", "exponentials", "flops")
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")  # each makes the host wait for a GPU
NO_WORK = ("empty", "empty_strided", "empty_like", "detach", "_local_scalar_dense", "alias", "promote_types")
Step = Callable[[], object]
CEILINGS: dict[str, float | None] = {}  # by unit, those that this run has measured


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timer() -> float:
    """Seconds, when all work that was given to the device is done."""
    synchronize()
    return time.perf_counter()


def seconds(step: Step) -> float:
    start = timer()
    step()
    return timer() - start


def name() -> str:
    """Of the GPU, or else of the CPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def described() -> dict[str, Any]:
    """All that decides what a bench measures."""
    build = bomkern.info()["build"]
    found = {
        "device": DEVICE,
        "name": name(),
        "threads": torch.get_num_threads(),
        "simd": build.get("simd_here", "not compiled"),
        "bomkern": bomkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if DEVICE == "cuda":
        found["cuda"] = torch.version.cuda
        found["driver"] = _nvidia_smi("driver_version")
    return found


def _nvidia_smi(field: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def ceiling(unit: str) -> float | None:
    """The most of it that this machine does in a second, measured once a run; None where there is no way to.

    A measurement that fails is a warning: what was timed before it is worth keeping without its share of a ceiling.
    """
    measure = {"bytes": _copy, "exponentials": _exponentials, "flops": _products}[unit]
    if unit not in CEILINGS:
        try:
            CEILINGS[unit] = measure()
        except Exception as why:  # of a compiler, or of whatever a GPU's driver says
            warnings.warn(f"the ceiling of {unit} could not be measured: {why}", stacklevel=2)
            CEILINGS[unit] = None
    return CEILINGS[unit]


def _copy() -> float:
    """Bytes read and written by ``y.copy_(x)``, both far larger than any cache; the best of many."""
    x = torch.zeros(COPY_BYTES // 4, device=DEVICE)
    y = torch.ones_like(x)
    y.copy_(x)
    return 2 * COPY_BYTES / min(seconds(lambda: y.copy_(x)) for _ in range(20))


def _products(side: int = 2048) -> float:
    """Operations of a float32 matrix product of the library's, in full precision; the best of many."""
    x = torch.rand(side, side, device=DEVICE)
    x @ x
    return 2 * side**3 / min(seconds(lambda: x @ x) for _ in range(10))


def _exponentials() -> float | None:
    if DEVICE == "cuda":
        return _exponentials_of_a_gpu()
    compiler = shutil.which("g++") or shutil.which("c++")
    return None if compiler is None else _exponentials_of_a_cpu(compiler)


def _exponentials_of_a_cpu(compiler: str) -> float:
    """The kernels' own exp2 in a loop that does nothing else (bench/exp2_ceiling.cpp), on all threads at once."""
    simd = bomkern.info()["build"].get("simd_here", "baseline")
    target = [] if simd == "baseline" else [f'-DTARGET="target_{simd}.h"']
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi", "-std=c++20"]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/exp2_ceiling"
        source = str(ROOT / "bench/exp2_ceiling.cpp")
        subprocess.run([compiler, *flags, f"-I{ROOT}/kernels/common", *target, source, "-o", program], check=True)
        rates = []
        for _ in range(3):
            running = [
                subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(torch.get_num_threads())
            ]
            rates.append(sum(1e9 / float(one.communicate()[0]) for one in running))
        return max(rates)


def _exponentials_of_a_gpu(turns: int = 512) -> float | None:
    """ex2 by the special-function unit in registers, eight streams a thread, nothing else."""
    try:
        from bench.exp2_ceiling import fill
    except ImportError:
        return None
    out = torch.empty(2**22, device=DEVICE)
    fill(out, turns)
    return out.numel() * turns / min(seconds(lambda: fill(out, turns)) for _ in range(10))


def peak_bytes(step: Step, repeats: int = 3) -> int | None:
    """By how much memory in use peaks during a step above what it was before; None where the system cannot tell.

    On a CPU the resident memory of the process, by Linux; what the heap holds for reuse is given back first. It is
    counted to about 0.3 MB.
    """
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    found = []
    for _ in range(repeats):
        before = live_bytes()
        clear.write_text("5")  # the high-water mark starts again from here
        step()
        found.append(resident("VmHWM") - before)
    return max(0, int(statistics.median(found)))


def live_bytes() -> int:
    """Resident memory, by Linux, once the heap has given back what it holds for reuse."""
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of resident memory of this process, by Linux: "VmRSS" now, "VmHWM" at its peak."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class _Operators(TorchDispatchMode):
    """Counts operators that do work, each of which is a launch or more on a GPU, and those that wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = func.overloadpacket.__name__
        self.syncs += called in SYNCS
        self.launches += not (func.is_view or called in NO_WORK)
        return func(*args, **(kwargs or {}))


def counted(step: Step) -> dict[str, int]:
    """``launches`` and ``syncs`` of one step: of a GPU as its driver saw them, of a CPU the operators that would be."""
    if DEVICE == "cpu":
        with _Operators() as seen:
            step()
        return {"launches": seen.launches, "syncs": seen.syncs}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    events = found.events() or []
    return {
        "launches": sum(e.device_type == DeviceType.CUDA and not e.name.startswith("Mem") for e in events),
        "syncs": sum(e.name == "cudaStreamSynchronize" for e in events),
    }
