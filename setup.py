"""Builds ``bomkern._C`` as far as this machine's compilers reach; pyproject.toml holds everything else.

The ladder: a C++ compiler gives the CPU kernels; an nvcc of torch's CUDA major gives the CUDA kernels too; no compiler
gives a pure Python install, which says so when it is imported. ``BOMKERN_BUILD_CUDA``: unset builds what it can, 0
never builds CUDA, 1 makes any shortfall fatal. ``BOMKERN_SANITIZE`` (``address,undefined`` or ``thread``): builds the
CPU kernels with these sanitizers, for tools/sanitize.py. ``BOMKERN_DEBUG=1``: keeps debug lines, which make the library
fifteen times as large; a sanitized build always has them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Compiled where no GPU is visible: what people train on since Ampere, and PTX of the newest for what comes later.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
SANITIZE = os.environ.get("BOMKERN_SANITIZE", "")
WISH = os.environ.get("BOMKERN_BUILD_CUDA", "0" if SANITIZE else "")
DEBUG = os.environ.get("BOMKERN_DEBUG", "")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def find_cuda_home() -> None:
    """Set CUDA_HOME to the toolkit that nvcc itself says it belongs to: a wrapper script may stand on the PATH."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    done = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    if found := re.search(r"^#\$ _?TOP=(.+)$", done.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(found[1])


def nvcc_version(home: str) -> tuple[int, int] | None:
    try:
        text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def why_no_cuda() -> str | None:
    """None where the CUDA kernels can be built, else the reason and the fix in one sentence."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if WISH == "0":
        return "BOMKERN_BUILD_CUDA is 0; unset it to build the CUDA kernels."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch first."
    version = nvcc_version(CUDA_HOME) if CUDA_HOME else None
    if version is None:
        return f"no nvcc was found; install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it."
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return (
            f"nvcc is {version[0]}.{version[1]} but torch {torch.__version__} is built with CUDA {torch.version.cuda}; "
            f"set CUDA_HOME to a CUDA {torch.version.cuda.split('.')[0]} toolkit."
        )
    return None


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST as given, or the visible GPUs', or the default list that this nvcc can compile."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if given := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return given
    if torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
    text = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}\n" in text + "\n"]
    return ";".join([*known[:-1], known[-1] + "+PTX"])


def jobs() -> int:
    """Parallel compilers: one a core, and 2 GiB of memory each, which a file with torch's headers needs."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 8 << 30
    return max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, memory // (2 << 30)))


def relocatable() -> list[str]:
    """Flags that keep the building machine's folders out of the library: names in messages and debug lines."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    folders = {ROOT: ".", Path(torch.__file__).parent: "torch", sysconfig.get_path("include"): "python"}
    if CUDA_HOME:
        folders[CUDA_HOME] = "cuda"
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for d in ("csrc", "kernels") for p in (ROOT / d).rglob(f"*{suffix}"))


def sanitizer_flags() -> list[str]:
    # torch's classes have no type information that its users see, which vptr would ask for.
    return [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g", "-O1"] if SANITIZE else []


def extension() -> dict[str, object]:
    """The arguments of `setup` that build the extension, {} where there is no compiler."""
    if WISH not in ("", "0", "1"):
        raise SystemExit(f"BOMKERN_BUILD_CUDA must be 0, 1 or unset, got {WISH!r}.")
    if SANITIZE not in ("", "address,undefined", "thread"):
        raise SystemExit(f"BOMKERN_SANITIZE must be 'address,undefined', 'thread' or unset, got {SANITIZE!r}.")
    if DEBUG not in ("", "0", "1"):
        raise SystemExit(f"BOMKERN_DEBUG must be 0, 1 or unset, got {DEBUG!r}.")
    if compiler() is None:
        if WISH == "1":
            raise SystemExit("BOMKERN_BUILD_CUDA is 1 but there is no C++ compiler; install g++ or set CXX.")
        print("bomkern: no C++ compiler was found; installing without compiled kernels.")
        return {}
    find_cuda_home()
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit(
            "bomkern: a build without isolation needs torch in the environment: pip install 'torch>=2.11,<2.14' ninja "
            "first, or leave --no-build-isolation out."
        ) from None
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    reason = why_no_cuda()
    if reason and WISH == "1":
        raise SystemExit(f"BOMKERN_BUILD_CUDA is 1 but {reason}")
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    # -fno-trapping-math lets comparisons be vectorised; it changes no result. torch chooses the C++ standard.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
    # Python's own flags, which come before these, ask for debug lines.
    flags += ["-g" if DEBUG == "1" else "-g0", *sanitizer_flags()]
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []
    macros = {
        "BOMKERN_TORCH_VERSION": torch.__version__,
        "BOMKERN_CUDA_VERSION": "" if reason else torch.version.cuda,
        "BOMKERN_CUDA_ARCHITECTURES": "",
        "BOMKERN_NO_CUDA_BECAUSE": reason or "",
    }
    files, kind = sources(".cpp"), CppExtension
    if SANITIZE == "thread":
        files.append("tests/sanitizers/openmp_threads.cpp")
    compile_flags = {"cxx": flags + openmp + relocatable()}
    if reason is None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = macros["BOMKERN_CUDA_ARCHITECTURES"] = architectures()
        files, kind = files + sources(".cu"), CUDAExtension
        compile_flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "--threads=2"]
        compile_flags["nvcc"] += [f"-Xcompiler={flag}" for flag in relocatable()]
        compile_flags["cxx"].append("-DBOMKERN_CUDA")
    else:
        print(f"bomkern: building without CUDA kernels: {reason}")
    module = kind(
        "bomkern._C",
        files,
        define_macros=[(name, '"' + value.replace('"', "'") + '"') for name, value in macros.items()],
        extra_compile_args=compile_flags,
        extra_link_args=openmp + sanitizer_flags(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)}}


packages = ["bomkern", "bomkern._triton", "bomkern.integrations", "bomkern.reference", "bomkern.train"]
kernels = ["bomkern.kernels", *(f"bomkern.kernels.{p.parent.name}" for p in (ROOT / "kernels").glob("*/__init__.py"))]
setup(
    packages=packages + kernels,
    package_dir={"bomkern": "bomkern", "bomkern.kernels": "kernels"},
    package_data={"bomkern": ["py.typed"]},
    include_package_data=False,
    **({} if "sdist" in sys.argv else extension()),  # an sdist holds the sources, and wants no torch
)
