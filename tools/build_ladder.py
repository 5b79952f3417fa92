"""Find out how far this machine can build bomkern: in Python alone, with C++ kernels, or with CUDA kernels too.

build_extension.py calls this before it compiles anything. Each rung of the ladder is tried on one tiny file, with the
compilers, flags and libraries of the real build. A rung that fails is left out, with the reason and the fix in one
sentence. An error in bomkern's own code comes later, and stays an error.
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

# The targets where no GPU is visible: training GPUs since Ampere, and PTX of the newest for later ones.
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
# Makes the extension from files, with or without CUDA, with or without OpenMP, and with these nvcc flags.
Make = Callable[[list[str], bool, bool, list[str]], Any]


class Ladder(NamedTuple):
    """The reason why each rung is left out, in one sentence with the fix; empty where it is built."""

    cpp: str
    openmp: str = ""
    cuda: str = ""
    architectures: str = ""  # nvcc's targets, in the format of TORCH_CUDA_ARCH_LIST
    remark: str = ""  # on how the CUDA kernels are built

    def __str__(self) -> str:
        if self.cpp:
            return f"without compiled kernels: {self.cpp}"
        cuda = f"without CUDA kernels: {self.cuda}" if self.cuda else f"with CUDA kernels for {self.architectures}"
        openmp = [f"on one thread: {self.openmp}"] * bool(self.openmp)
        return "; ".join([cuda, *openmp] + [self.remark] * bool(self.remark))


def compiler() -> str | None:
    """Return the first C++ compiler that exists of CXX, c++, g++ and clang++."""
    wanted = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    return next((name for name in wanted if name and shutil.which(shlex.split(name)[0])), None)


def why_no_compiler() -> str:
    """Return why the C++ rung cannot be built, as far as that is known without torch; empty if nothing prevents it."""
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
    """Set CUDA_HOME to the toolkit that nvcc reports, since the nvcc on the PATH may be a wrapper script."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    if top := re.search(r"^#\$ _?TOP=(.+)$", done.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(top[1])


def _nvcc(home: str, flag: str) -> str:
    try:
        return subprocess.run([f"{home}/bin/nvcc", flag], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def why_no_toolkit() -> str:
    """Return why the CUDA rung cannot be built, before anything is compiled; empty if nothing prevents it."""
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
    """Choose the architectures to compile for.

    For a GPU that nvcc does not know, the choice is the newest older architecture with PTX, which the driver compiles
    at the first use.

    Args:
        visible: the capabilities of the GPUs of this machine, as in '9.0'. known: the architectures that nvcc knows.

    Returns:
        The architectures in the format of TORCH_CUDA_ARCH_LIST, the reason if there are none, and a remark.
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
    # '9.0+PTX' includes '9.0'.
    kept = {a for a in chosen if f"{a}+PTX" not in chosen}
    return ";".join(sorted(kept, key=lambda a: _number(a.removesuffix("+PTX")))), "", "; ".join(remarks)


def architectures() -> tuple[str, str, str]:
    """Return `choose_architectures` for this machine; TORCH_CUDA_ARCH_LIST takes precedence where it is set."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return wanted, "", ""
    visible = set()
    if torch.cuda.is_available():
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    digits = re.findall(r"compute_(\d+)(\d)\b", _nvcc(CUDA_HOME or "", "--list-gpu-arch"))
    return choose_architectures([f"{a}.{b}" for a, b in sorted(visible)], [f"{a}.{b}" for a, b in digits])


def architecture_flags(wanted: str) -> list[str]:
    """Return nvcc's flags for a list such as '9.0;12.0+PTX', or for one of torch's names.

    The build passes them explicitly, because torch adds none if 'arch' occurs anywhere in the flags, even in the name
    of a folder.
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
    """Return the bytes of memory available to all compilers together: the machine's, or a container's limit."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        machine = 8 << 30
    return min([machine, *_container_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _container_limits(own: Path, root: Path) -> Iterator[int]:
    """Yield the memory limits of this process's control group and its parents, for versions 1 and 2."""
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
        # In a container the path is the host's, and the limit is in the top folder.
        for folder in [inner, *inner.parents]:
            with contextlib.suppress(OSError, ValueError):  # 'max' is not a number
                yield int((folder / name).read_text())
            if folder == top:
                break


def jobs() -> int:
    """Return the number of parallel compilers: one per core, and at least 2 GiB of memory each for torch's headers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory() // (2 << 30)))


@contextlib.contextmanager
def _captured_output() -> Iterator[Callable[[], str]]:
    """Capture the output of this process and its children, and yield a function that reads it."""
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
    """Return the first line of a compiler's output that reports an error, without the tiny file's folder."""
    lines = [line.strip() for line in text.splitlines()]
    pattern = re.compile(r"\berror\b(?!s)|\bfatal\b|cannot find|not found", re.IGNORECASE)
    errors = [line for line in lines if pattern.search(line)]
    line = next((line for line in errors if not line.startswith(("FAILED", "ninja:"))), fallback)
    return (
        re.sub(r"^\S*/probe\.(cpp|cu)\S* ", "", line).removeprefix("fatal error: ").removeprefix("error: ").rstrip(".")
    )


def attempt(make: Make, cuda: bool, openmp: bool, nvcc_flags: list[str]) -> str:
    """Build a tiny extension, and return the error, empty where it succeeds."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    with tempfile.TemporaryDirectory() as folder, _captured_output() as printed:
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
            # The message of torch's RuntimeError may be a whole paragraph.
            return first_error(printed(), (str(error).strip() or type(error).__name__).split(". ")[0])
    return ""


def _compiler_description() -> str:
    name = compiler() or ""
    try:
        done = subprocess.run([*shlex.split(name), "--version"], capture_output=True, text=True)
    except OSError:
        return name
    return f"{name} ({(done.stdout.splitlines() or ['no version'])[0].strip()})"


def climb(make: Make, want_cuda: bool = True) -> Ladder:
    """Try each rung on this machine.

    Args:
        make: makes the extension for `setup` from files, with the real flags.
        want_cuda: False leaves the rung out without a trial.
    """
    if reason := why_no_compiler():
        return Ladder(reason)
    if "CXX" not in os.environ and shutil.which("c++") is None:
        os.environ["CXX"] = str(compiler())  # torch and setuptools read it too
    find_cuda_home()
    openmp = ""
    if error := attempt(make, False, True, []):
        if without := attempt(make, False, False, []):
            return Ladder(f"{_compiler_description()} does not build for torch here ({without}); {COMPILER_FIX}.")
        openmp = (
            f"{_compiler_description()} does not link OpenMP ({error}); install its OpenMP library, as in libomp-dev."
        )
    if not want_cuda:
        return Ladder("", openmp, "BOMKERN_BUILD_CUDA is 0; unset it to build the CUDA kernels.")
    if reason := why_no_toolkit():
        return Ladder("", openmp, reason)
    chosen, reason, remark = architectures()
    if not reason and (error := attempt(make, True, not openmp, architecture_flags(chosen))):
        reason = (
            f"nvcc does not build for {chosen} with {_compiler_description()} ({error}); set CC and CXX to a compiler "
            "that it takes, or install a newer CUDA toolkit."
        )
    return Ladder("", openmp, reason) if reason else Ladder("", openmp, "", chosen, remark)
