"""The extension ``bomkern._C``, and how it is compiled. Run as a program: says what can be built here.

``BOMKERN_BUILD``: unset builds what it can; ``cpu`` makes it an error where the C++ kernels cannot be built.
``BOMKERN_BUILD_CUDA``: unset builds what it can, 0 never builds CUDA, 1 makes any shortfall fatal.
``BOMKERN_SANITIZE`` (``address,undefined`` or ``thread``): builds the CPU kernels with these sanitizers, for
tools/sanitize.py. ``BOMKERN_DEBUG=1``: keeps debug lines, which make the library fifteen times as large; a sanitized
build always has them. ``BOMKERN_LOCAL_VERSION`` (setup.py reads it): the local part of a wheel's version, which says
what the kernels are built for, as in ``torch2.13.cpu``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build_ladder

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)
TORCH = "torch>=" + ".".join(map(str, OLDEST_TORCH))
HEADER = "csrc/torch_headers.h"  # torch's own, parsed once for all of csrc/
CHOICES = {
    "BOMKERN_BUILD": ("", "cpu"),
    "BOMKERN_BUILD_CUDA": ("", "0", "1"),
    "BOMKERN_SANITIZE": ("", "address,undefined", "thread"),
    "BOMKERN_DEBUG": ("", "0", "1"),
}


def wish(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in CHOICES[name]:
        allowed = ", ".join(repr(choice) for choice in CHOICES[name] if choice)
        raise SystemExit(f"bomkern: {name} must be one of {allowed}, or unset, got {value!r}.")
    return value


def refuse_old_torch(version: str) -> None:
    """Raises SystemExit where torch is older than what bomkern works with: before anything is compiled or replaced."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise SystemExit(f"bomkern needs {TORCH} and finds torch {version}; first: pip install --upgrade '{TORCH}'")


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for d in ("csrc", "kernels") for p in (ROOT / d).rglob(f"*{suffix}"))


def _relocatable() -> list[str]:
    """Flags that keep the building machine's folders out of the library: names in messages and debug lines."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    folders = {ROOT: ".", Path(torch.__file__).parent: "torch", sysconfig.get_path("include"): "python"}
    if CUDA_HOME:
        folders[CUDA_HOME] = "cuda"
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def _sanitizer_flags() -> list[str]:
    # torch's classes have no type information that its users see, which vptr would ask for.
    asked = wish("BOMKERN_SANITIZE")
    return [f"-fsanitize={asked}", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g", "-O1"] if asked else []


def _as_text(text: str) -> str:
    """Without what C++'s strings, or ninja, would take for more than a letter: a compiler's words may hold any."""
    return re.sub(r'["\\$]', "'", text)


def make(
    files: list[str], cuda: bool, openmp: bool, nvcc_flags: list[str], macros: dict[str, str] | None = None
) -> Any:
    """The extension of these files, in the form that `setup` takes."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # -fno-trapping-math lets comparisons be vectorised; it changes no result. torch chooses the C++ standard.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
    flags.append("-Wno-sign-compare")  # which torch's headers do
    # Python's own flags, which come before these, ask for debug lines.
    flags += ["-g" if wish("BOMKERN_DEBUG") == "1" else "-g0", *_sanitizer_flags()]
    # Apple's clang does not take the flag.
    threads = ["-fopenmp"] if openmp and platform.system() == "Linux" else []
    compile_flags = {"cxx": flags + threads + _relocatable()}
    if cuda:
        compile_flags["cxx"].append("-DBOMKERN_CUDA")
        compile_flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "--threads=2", *nvcc_flags]
        compile_flags["nvcc"] += [f"-Xcompiler={flag}" for flag in _relocatable()]
    return (CUDAExtension if cuda else CppExtension)(
        "bomkern._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[(name, f'"{_as_text(text)}"') for name, text in (macros or {}).items()],
        extra_compile_args=compile_flags,
        extra_link_args=threads + _sanitizer_flags(),
    )


def ladder() -> build_ladder.Ladder:
    """Return what can be built here, among what is wanted."""
    wanted = {name: wish(name) for name in CHOICES}
    cuda = wanted["BOMKERN_BUILD_CUDA"] or ("0" if wanted["BOMKERN_SANITIZE"] else "")
    if not (reason := build_ladder.why_no_compiler()):
        try:
            import torch
        except ModuleNotFoundError:
            raise SystemExit(
                f"bomkern: a build without isolation needs torch in the environment: pip install '{TORCH}' ninja "
                "first, or leave --no-build-isolation out."
            ) from None
        refuse_old_torch(torch.__version__)
    found = build_ladder.Ladder(reason) if reason else build_ladder.climb(make, cuda != "0")
    if found.cpp and (wanted["BOMKERN_BUILD"] == "cpu" or cuda == "1"):
        raise SystemExit(
            f"bomkern: {'BOMKERN_BUILD_CUDA is 1' if cuda == '1' else 'BOMKERN_BUILD is cpu'} but {found.cpp}"
        )
    if found.cuda and cuda == "1":
        raise SystemExit(f"bomkern: BOMKERN_BUILD_CUDA is 1 but {found.cuda}")
    return found


def record(found: build_ladder.Ladder) -> dict[str, str]:
    """Return what an installation keeps about its build, in bomkern/_build.json."""
    if found.cpp:
        return {"torch": "", "cuda": "", "not_compiled_because": found.cpp}
    import torch

    cuda = "" if found.cuda else str(torch.version.cuda)
    return {"torch": torch.__version__, "cuda": cuda, "not_compiled_because": ""}


def arguments(found: build_ladder.Ladder) -> dict[str, Any]:
    """The arguments of `setup` that build the extension as far as `found` says; {} where it is Python alone."""
    if found.cpp:
        return {}
    import torch

    os.environ.setdefault("MAX_JOBS", str(build_ladder.jobs()))
    macros = {
        "BOMKERN_TORCH_VERSION": torch.__version__,
        "BOMKERN_CUDA_VERSION": "" if found.cuda else torch.version.cuda,
        "BOMKERN_CUDA_ARCHITECTURES": found.architectures,
        "BOMKERN_CUDA_REMARK": found.remark,
        "BOMKERN_NO_CUDA_BECAUSE": found.cuda,
        "BOMKERN_NO_OPENMP_BECAUSE": found.openmp,
    }
    files = sources(".cpp")
    if wish("BOMKERN_SANITIZE") == "thread":
        files.append("tests/native/sanitizers/openmp_threads.cpp")
    nvcc_flags = []
    if not found.cuda:
        files, nvcc_flags = files + sources(".cu"), build_ladder.architecture_flags(found.architectures)
    extension = make(files, not found.cuda, not found.openmp, nvcc_flags, macros)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": _build_command()}}


@contextlib.contextmanager
def _a_line_for_each_file() -> Iterator[None]:
    """Show which file is compiled in place of the commands that ninja prints; all else that is printed passes."""
    sys.stdout.flush()
    outside = os.dup(1)
    end, into = os.pipe()
    os.dup2(into, 1)
    os.close(into)

    def relay() -> None:
        with os.fdopen(end, errors="replace") as lines, os.fdopen(outside, "w") as out:
            for line in lines:
                file = re.match(r"\[(\d+)/(\d+)\] .* -c (\S+) -o ", line)
                name = os.path.relpath(file[3], ROOT) if file else ""
                out.write(f"bomkern: {file[1]} of {file[2]}: {name}\n" if file else line)
                out.flush()

    thread = threading.Thread(target=relay)
    thread.start()
    back = os.dup(outside)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(back, 1)
        os.close(back)
        thread.join()


def _takes_precompiled() -> bool:
    """Return whether the compiler finds a precompiled header by its path: g++ does, clang++ needs a flag."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return "clang" not in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.lower()


def _build_command() -> Any:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extension(self, extension: Any) -> None:
            with _a_line_for_each_file():
                if _takes_precompiled():
                    self._precompile(extension)
                super().build_extension(extension)

        def _precompile(self, extension: Any) -> None:
            """Compile torch's headers once, where csrc/ then finds them, and what needs none of them beside it."""
            temp = Path(self.build_temp).absolute()
            extension.include_dirs.insert(0, str(temp / "csrc"))
            # A source as any other, so that ninja makes it anew when torch, a flag or a header changes.
            self.compiler.src_extensions.append(".h")
            compiled, *_ = self.compiler.compile(
                [HEADER, *(name for name in extension.sources if name.startswith("kernels/"))],
                output_dir=str(temp),
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                debug=self.debug,
                extra_postargs=copy.deepcopy(extension.extra_compile_args),
            )
            # g++ takes the compiled form where the header is included first, and the header itself after that.
            shutil.copy2(ROOT / HEADER, temp / HEADER)
            header = temp / f"{HEADER}.gch"
            header.unlink(missing_ok=True)
            try:
                os.link(compiled, header)
            except OSError:
                shutil.copy2(compiled, header)

    return Build.with_options(use_ninja=True)


if __name__ == "__main__":
    print(f"bomkern: would be built {ladder()}")
