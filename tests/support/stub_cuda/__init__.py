"""A GPU that runs nothing: Triton's JIT, compiler and launcher work as on sm_90, and every launch is recorded.

`build` compiles libcuda.c against the cuda.h in Triton's package. A process with the variables of `environment` can
`install` it. Ops then take CPU tensors without touching their memory, and their results are uninitialised.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "BOMKERN_STUB_CUDA"  # set in a process that runs on the stub
RING = 256  # as in libcuda.c
SOURCE = Path(__file__).parent / "libcuda.c"


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    cluster: int


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
    )


def triton_folder() -> Path | None:
    spec = importlib.util.find_spec("triton")
    return Path(spec.origin).parent if spec and spec.origin else None


def compiler() -> str | None:
    """Return the C compiler, which Triton needs too."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def command(folder: Path) -> list[str]:
    include = f"{triton_folder()}/backends/nvidia/include"
    options = [str(compiler()), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    return [*options, str(SOURCE), "-o", f"{folder}/libcuda.so.1"]


def build(folder: Path) -> None:
    subprocess.run(command(folder), check=True)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that runs on the stub in ``folder``, which also holds Triton's cache."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **inherited,
        FOLDER: str(folder),
        "LD_PRELOAD": f"{folder}/libcuda.so.1",  # any search for that name finds the stub before a real library
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": f"{folder}/cache",
        "CUDA_VISIBLE_DEVICES": "",  # tensors are on the CPU
        "OMP_NUM_THREADS": "1",
    }


def install() -> Stub:
    """Make this process see one device of compute capability 9.0, and bomkern serve CPU tensors on it."""
    import torch

    from bomkern.dispatch import triton
    from bomkern.dispatch.triton import launcher

    device: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    for name, answer in device.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    triton.why_not = launcher.why_not = lambda device_type: None
    return Stub()


class Stub:
    """The launches and loads that the stub has recorded."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._ring = (_Launch * RING).in_dll(library, "stub_launches")
        self._launched = ctypes.c_ulonglong.in_dll(library, "stub_launched")
        self._loaded = ctypes.c_ulonglong.in_dll(library, "stub_loaded")
        self._seen = self._launched.value

    def forget(self) -> None:
        """Forget the recorded launches and all kernels in memory; Triton's cache on disk stays."""
        from triton.runtime.jit import JITFunction

        for name, module in list(sys.modules.items()):
            for kernel in vars(module).values() if name.startswith("bomkern.kernels.") else ():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
        self._seen = self._launched.value

    def launches(self) -> list[Launch]:
        """Return the launches since the last call."""
        first, self._seen = self._seen, self._launched.value
        assert self._seen - first <= RING, "some were overwritten"
        return [
            Launch(x.name.decode(), tuple(x.grid), x.threads, x.shared, x.cluster)
            for x in (self._ring[n % RING] for n in range(first, self._seen))
        ]

    @property
    def loaded(self) -> int:
        """Return the number of compiled kernels loaded so far; each variant of a kernel counts once."""
        return self._loaded.value
