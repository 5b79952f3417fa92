"""Describe the machine, and measure its ceilings, peak memory, launches and host syncs."""

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
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")  # these make the host wait for a GPU
NO_WORK = ("empty", "empty_strided", "empty_like", "detach", "_local_scalar_dense", "alias", "promote_types")
Step = Callable[[], object]
CEILINGS: dict[str, float | None] = {}  # the ceilings that this run has measured, by unit


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timer() -> float:
    """Wait for all work on the device, and return the time in seconds."""
    synchronize()
    return time.perf_counter()


def seconds(step: Step) -> float:
    start = timer()
    step()
    return timer() - start


def name() -> str:
    """Return the name of the GPU, or of the CPU where there is none."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def described() -> dict[str, Any]:
    """Return every property of the machine and its software that the figures of a bench depend on."""
    build = bomkern.info()["build"]
    properties = {
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
        properties["cuda"] = torch.version.cuda
        properties["driver"] = _nvidia_smi("driver_version")
    return properties


def _nvidia_smi(field: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def ceiling(unit: str) -> float | None:
    """Return this machine's highest rate of a unit per second, measured once a run; None where it cannot be measured.

    A measurement that fails gives a warning, so that the times of the run are kept without their share of a ceiling.
    """
    measure = {"bytes": _copy, "exponentials": _exponentials, "flops": _products}[unit]
    if unit not in CEILINGS:
        try:
            CEILINGS[unit] = measure()
        except Exception as why:  # an error of the compiler or of the GPU's driver
            warnings.warn(f"the ceiling of {unit} could not be measured: {why}", stacklevel=2)
            CEILINGS[unit] = None
    return CEILINGS[unit]


def _copy() -> float:
    """Return bytes per second read and written by ``y.copy_(x)`` on tensors far larger than any cache; best of 20."""
    x = torch.zeros(COPY_BYTES // 4, device=DEVICE)
    y = torch.ones_like(x)
    y.copy_(x)
    return 2 * COPY_BYTES / min(seconds(lambda: y.copy_(x)) for _ in range(20))


def _products(side: int = 2048) -> float:
    """Return operations per second of torch's float32 matrix product in full precision; best of 10."""
    x = torch.rand(side, side, device=DEVICE)
    x @ x
    return 2 * side**3 / min(seconds(lambda: x @ x) for _ in range(10))


def _exponentials() -> float | None:
    if DEVICE == "cuda":
        return _exponentials_of_a_gpu()
    compiler = shutil.which("g++") or shutil.which("c++")
    return None if compiler is None else _exponentials_of_a_cpu(compiler)


def _exponentials_of_a_cpu(compiler: str) -> float:
    """Return exponentials per second of the kernels' exp2 alone (bench/exp2_ceiling.cpp), on all threads at once."""
    simd = bomkern.info()["build"].get("simd_here", "baseline")
    target = [] if simd == "baseline" else [f'-DTARGET="target_{simd}.h"']
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi", "-std=c++20"]
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/exp2_ceiling"
        source = str(ROOT / "bench/exp2_ceiling.cpp")
        subprocess.run([compiler, *flags, f"-I{ROOT}/kernels/common", *target, source, "-o", program], check=True)
        rates = []
        for _ in range(3):
            processes = [
                subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(torch.get_num_threads())
            ]
            rates.append(sum(1e9 / float(process.communicate()[0]) for process in processes))
        return max(rates)


def _exponentials_of_a_gpu(turns: int = 512) -> float | None:
    """Return exponentials per second of the special-function unit alone: ex2 in registers, eight streams a thread."""
    try:
        from bench.exp2_ceiling import fill
    except ImportError:
        return None
    out = torch.empty(2**22, device=DEVICE)
    fill(out, turns)
    return out.numel() * turns / min(seconds(lambda: fill(out, turns)) for _ in range(10))


def peak_bytes(step: Step, repeats: int = 3) -> int | None:
    """Return the peak of memory in use during a step, above its value before; None where it cannot be measured.

    On a CPU this is the resident memory of the process on Linux, accurate to about 0.3 MB; free memory of the heap is
    returned to the system first.
    """
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    peaks = []
    for _ in range(repeats):
        before = live_bytes()
        clear.write_text("5")  # resets the high-water mark
        step()
        peaks.append(resident("VmHWM") - before)
    return max(0, int(statistics.median(peaks)))


def live_bytes() -> int:
    """Return the resident memory in bytes on Linux, after returning the heap's free memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def resident(field: str) -> int:
    """Return this process's resident memory in bytes on Linux: now for "VmRSS", at its peak for "VmHWM"."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class _Operators(TorchDispatchMode):
    """Count operators that do work, each at least one launch on a GPU, and those that make the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = func.overloadpacket.__name__
        self.syncs += called in SYNCS
        self.launches += not (func.is_view or called in NO_WORK)
        return func(*args, **(kwargs or {}))


def counted(step: Step) -> dict[str, int]:
    """Return ``launches`` and ``syncs`` of one step: as profiled on a GPU, or on a CPU the operators that would be."""
    if DEVICE == "cpu":
        with _Operators() as counter:
            step()
        return {"launches": counter.launches, "syncs": counter.syncs}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
    events = profiled.events() or []
    return {
        "launches": sum(e.device_type == DeviceType.CUDA and not e.name.startswith("Mem") for e in events),
        "syncs": sum(e.name == "cudaStreamSynchronize" for e in events),
    }
