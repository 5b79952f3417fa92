"""How far this machine can build bomkern, and why not further: in Python alone, with C++ kernels, with CUDA kernels.

Asked before anything is compiled (build_extension.py): each rung is tried on one tiny file, with the compilers, flags
and libraries of the real build. A rung that fails is left out, with the reason and the fix in one sentence; an error in
bomkern's own code comes later, and stays an error.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Compiled for where no GPU is visible: what people train on since Ampere, and PTX of the newest for what comes later.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
COMPILER_FIX = "install g++ 11 or later, or set CXX to one"
CPP = """
#include <Python.h>
#include <c10/util/Exception.h>
#include <concepts>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef BOMKERN_CUDA
#include <cuda_runtime_api.h>
#endif
extern "C" void* PyInit__C() {
#ifdef _OPENMP
  TORCH_CHECK(omp_get_max_threads() > 0);
#endif
  return nullptr;
}
"""
CU = "__global__ void one(float* x) { *x = 1.0f; }\nvoid start_one(float* x) { one<<<1, 1>>>(x); }\n"
# Makes the extension of some files: with CUDA or without, with OpenMP or without, for these nvcc flags.
Make = Callable[[list[str], bool, bool, list[str]], Any]


class Ladder(NamedTuple):
    """Why each rung is left out, in one sentence with the fix; empty where it is built."""

    cpp: str
    openmp: str = ""
    cuda: str = ""
    architectures: str = ""  # what nvcc compiles for, as TORCH_CUDA_ARCH_LIST has it
    remark: str = ""  # on how the CUDA kernels are built

    def __str__(self) -> str:
        if self.cpp:
            return f"without compiled kernels: {self.cpp}"
        said = [f"without CUDA kernels: {self.cuda}"] if self.cuda else [f"with CUDA kernels for {self.architectures}"]
        return "; ".join(
            said + [f"on one thread: {self.openmp}"] * bool(self.openmp) + [self.remark] * bool(self.remark)
        )


def compiler() -> str | None:
    """The C++ compiler: CXX, c++, g++ or clang++, the first that is there."""
    wanted = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    return next((name for name in wanted if name and shutil.which(shlex.split(name)[0])), None)


def why_no_compiler() -> str:
    """What can be said of the C++ rung before there is a torch; empty where nothing stands against it."""
    if platform.system() == "Windows":
        return "bomkern has no compiled kernels on Windows yet; use WSL 2 or Linux for them."
    if compiler() is None:
        return f"no C++ compiler was found; {COMPILER_FIX}."
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"Python's headers are missing ({headers}/Python.h is not there); install them, as in "
            f"'apt install python{version}-dev' or 'dnf install python{version}-devel'."
        )
    return ""


def find_cuda_home() -> None:
    """Set CUDA_HOME to the toolkit that nvcc itself says it belongs to: a wrapper script may stand on the PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    if found := re.search(r"^#\$ _?TOP=(.+)$", done.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(found[1])


def _nvcc(home: str, flag: str) -> str:
    try:
        return subprocess.run([f"{home}/bin/nvcc", flag], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def why_no_toolkit() -> str:
    """What stands against the CUDA rung before anything is compiled; empty where nothing does."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch first."
    version = re.search(r"release (\d+)\.(\d+)", _nvcc(CUDA_HOME, "--version")) if CUDA_HOME else None
    if version is None:
        return f"no nvcc was found; install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it."
    if version[1] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is {version[1]}.{version[2]} but torch {torch.__version__} is built with CUDA {torch.version.cuda}; "
            f"set CUDA_HOME to a CUDA {torch.version.cuda.split('.')[0]} toolkit."
        )
    return ""


def _number(architecture: str) -> tuple[int, int]:
    major, minor = architecture.split(".")
    return int(major), int(minor)


def choose_architectures(visible: Sequence[str], known: Sequence[str]) -> tuple[str, str, str]:
    """What to compile for, as TORCH_CUDA_ARCH_LIST has it; why nothing; and a remark.

    ``visible``: the capabilities of the GPUs that are there, as in '9.0'. ``known``: what this nvcc compiles for. For a
    GPU that it does not know, code of the newest before it, which the driver compiles anew when it is first used.
    """
    if not visible:
        both = [a for a in ARCHITECTURES if a in known]
        return ";".join([*both[:-1], f"{both[-1]}+PTX"]) if both else "", "", ""
    chosen, remarks = set(), []
    for gpu in visible:
        older = [a for a in known if _number(a) <= _number(gpu)]
        if not older:
            return "", f"this nvcc does not compile for the GPU that is there ({gpu}); install an older toolkit.", ""
        newest = max(older, key=_number)
        chosen.add(newest if newest == gpu else f"{newest}+PTX")
        if newest != gpu:
            remarks.append(
                f"this nvcc does not know the GPU that is there ({gpu}), whose driver compiles the kernels for "
                f"{newest} when they are first used: install a newer toolkit"
            )
    # Both of '9.0' and '9.0+PTX' are the latter.
    kept = {a for a in chosen if f"{a}+PTX" not in chosen}
    return ";".join(sorted(kept, key=lambda a: _number(a.removesuffix("+PTX")))), "", "; ".join(remarks)


def architectures() -> tuple[str, str, str]:
    """`choose_architectures` of this machine; TORCH_CUDA_ARCH_LIST holds where it is set."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given, "", ""
    visible = set()
    if torch.cuda.is_available():
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    digits = re.findall(r"compute_(\d+)(\d)\b", _nvcc(CUDA_HOME or "", "--list-gpu-arch"))
    return choose_architectures([f"{a}.{b}" for a, b in sorted(visible)], [f"{a}.{b}" for a, b in digits])


def architecture_flags(wanted: str) -> list[str]:
    """nvcc's flags for a list such as '9.0;12.0+PTX', or for one of torch's names.

    Given to nvcc by ourselves: torch adds none of its own where 'arch' stands anywhere in the flags, a folder's name
    among them.
    """
    from torch.utils import cpp_extension

    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = wanted
    try:
        return list(cpp_extension._get_cuda_arch_flags(None))
    except ValueError as error:
        raise SystemExit(f"bomkern: TORCH_CUDA_ARCH_LIST is {wanted!r}: {error}.") from None
    finally:
        os.environ.pop("TORCH_CUDA_ARCH_LIST")
        if before is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def memory() -> int:
    """Bytes of memory that the compilers may take together: the machine's, or less where a container allows less."""
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):
        found = [8 << 30]
    return min(found + list(_container_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))))


def _container_limits(own: Path, root: Path) -> Iterator[int]:
    """The memory limits of our control group and of those around it, of version 2 and of version 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        inner = top / path.lstrip("/")
        # In a container the path is the host's, and the limit is at the top.
        for folder in [inner, *inner.parents]:
            with contextlib.suppress(OSError, ValueError):  # 'max' is no number
                yield int((folder / name).read_text())
            if folder == top:
                break


def jobs() -> int:
    """Parallel compilers: one a core, and 2 GiB of memory each, which a file with torch's headers needs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory() // (2 << 30)))


@contextlib.contextmanager
def _output_kept() -> Iterator[Callable[[], str]]:
    """What this process and its children print meanwhile, read afterwards by the function."""
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

        def printed() -> str:
            sys.stdout.flush()
            sys.stderr.flush()
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            yield printed
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def first_error(text: str, fallback: str) -> str:
    """The line of a compiler's output that says what is wrong, without the tiny file's folder."""
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if re.search(r"\berror\b(?!s)|\bfatal\b|cannot find|not found", line, re.IGNORECASE)]
    line = next((line for line in said if not line.startswith(("FAILED", "ninja:"))), fallback)
    return (
        re.sub(r"^\S*/probe\.(cpp|cu)\S* ", "", line).removeprefix("fatal error: ").removeprefix("error: ").rstrip(".")
    )


def attempt(make: Make, cuda: bool, openmp: bool, nvcc_flags: list[str]) -> str:
    """What went wrong in building a tiny extension, empty where nothing did."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    with tempfile.TemporaryDirectory() as folder, _output_kept() as printed:
        files = {"probe.cpp": CPP} | ({"probe_cuda.cu": CU} if cuda else {})
        for name, text in files.items():
            Path(folder, name).write_text(text)
        extension = make([str(Path(folder, name)) for name in files], cuda, openmp, nvcc_flags)
        distribution = Distribution({"name": "probe", "ext_modules": [extension], "script_name": "setup.py"})
        command: Any = BuildExtension.with_options(use_ninja=True)(distribution)
        command.build_lib, command.build_temp = f"{folder}/lib", f"{folder}/temp"
        try:
            command.ensure_finalized()
            command.run()
        except (Exception, SystemExit) as error:
            # A RuntimeError of torch's may hold a whole paragraph.
            return first_error(printed(), (str(error).strip() or type(error).__name__).split(". ")[0])
    return ""


def _compiler_named() -> str:
    name = compiler() or ""
    try:
        done = subprocess.run([*shlex.split(name), "--version"], capture_output=True, text=True)
    except OSError:
        return name
    return f"{name} ({(done.stdout.splitlines() or ['no version'])[0].strip()})"


def climb(make: Make, want_cuda: bool = True) -> Ladder:
    """Try each rung on this machine.

    Args:
        make: makes the extension that `setup` takes, of given files, with the real flags.
        want_cuda: False leaves the rung out untried.
    """
    if reason := why_no_compiler():
        return Ladder(reason)
    if "CXX" not in os.environ and shutil.which("c++") is None:
        os.environ["CXX"] = str(compiler())  # which torch and setuptools ask for too
    find_cuda_home()
    openmp = ""
    if error := attempt(make, False, True, []):
        if without := attempt(make, False, False, []):
            return Ladder(f"{_compiler_named()} does not build for torch here ({without}); {COMPILER_FIX}.")
        openmp = f"{_compiler_named()} does not link OpenMP ({error}); install its OpenMP library, as in libomp-dev."
    if not want_cuda:
        return Ladder("", openmp, "BOMKERN_BUILD_CUDA is 0; unset it to build the CUDA kernels.")
    if reason := why_no_toolkit():
        return Ladder("", openmp, reason)
    chosen, reason, remark = architectures()
    if not reason and (error := attempt(make, True, not openmp, architecture_flags(chosen))):
        reason = (
            f"nvcc does not build for {chosen} with {_compiler_named()} ({error}); set CC and CXX to a compiler that "
            "it takes, or install a newer CUDA toolkit."
        )
    return Ladder("", openmp, reason) if reason else Ladder("", openmp, "", chosen, remark)
