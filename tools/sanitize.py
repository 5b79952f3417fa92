"""The C++ and the CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: g++, no GPU.

    make sanitize                          every part
    make sanitize PART="planted kernels"   some

planted    An error of each kind, which has to be reported. Without it no silence means anything.
kernels    Every CPU kernel, for each instruction set here, from plain C++: memory of exactly its size, then threads.
emulator   Every CUDA kernel under tests/native/cuda_emulator, with all memory that is no kernel's forbidden.
memory     The extension in PyTorch with AddressSanitizer and UndefinedBehaviorSanitizer: the ops' tests, impl cpu.
threads    The extension in PyTorch with ThreadSanitizer: the same tests, fewer of them.

Everything is built in .sanitize, from a copy: the extension of the source tree stays as it is. With --results FILE,
what each part ran and found goes there as JSON. Exits with 1 where anything was found, with 2 where a tool is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / ".sanitize"
SANITIZERS = ROOT / "tests" / "native" / "sanitizers"
EMULATOR = ROOT / "tests" / "native" / "cuda_emulator"
JOBS = int(os.environ.get("MAX_JOBS", "0")) or len(os.sched_getaffinity(0))

MEMORY, THREADS = "address,undefined", "thread"
PLAIN = ["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
REPORT = re.compile(r"ERROR: AddressSanitizer|ERROR: LeakSanitizer|runtime error:|WARNING: ThreadSanitizer")

OPS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/cuda.cu"))
TESTS = (
    *OPS,
    *("total_correlation_rows", "total_correlation_in_pytorch", "statistics_in_pytorch", "min_goal_in_pytorch"),
    *("goal_set_in_pytorch", "large_offsets"),
)
NEVER = "compile or opcheck or fakes or triton or instruction_sets or process"  # no C++ of ours, or a Python without it
PICKED = {
    MEMORY: f"(cpu-cpu or backward_op or bad_input or winner or threads) and not ({NEVER})",
    THREADS: f"((cpu-cpu and (oracle or layouts or places or large)) or number_of_threads) and not ({NEVER} or 20000)",
}


class Missing(Exception):
    """A tool that is not here."""


class Done(NamedTuple):
    """One program under one sanitizer."""

    ran: str
    sanitizer: str
    seconds: float
    found: list[str]
    said: str  # its last line


def gxx() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise Missing("g++ is not installed; install it or set CXX")
    return found


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library(name: str) -> str:
    """A sanitizer's runtime, to be loaded before Python's own libraries."""
    path = output(gxx(), f"-print-file-name={name}").strip()
    if not os.path.isabs(path):
        raise Missing(f"{name} is not installed; it comes with g++")
    return os.path.realpath(path)


def newest(*folders: Path) -> float:
    return max(p.stat().st_mtime for folder in folders for p in folder.rglob("*") if p.is_file())


def build(name: str, sources: list[Path], sanitizer: str, *flags: str) -> Path:
    """A program of these sources under a sanitizer, made anew where anything they may include has changed."""
    folder = OUT / sanitizer.split(",")[0] / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [gxx(), *PLAIN, "-w", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *flags]
    changed = newest(ROOT / "kernels", SANITIZERS, EMULATOR)

    def compiled(source: Path) -> Path:
        to = folder / ("_".join(source.relative_to(ROOT).parts) + ".o")
        if not to.exists() or to.stat().st_mtime < changed:
            run = subprocess.run([*wanted, "-x", "c++", "-c", source, "-o", to], capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{source} did not compile:\n{run.stderr}")
        return to

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / name
    subprocess.run([*wanted, *objects, "-o", program], check=True)
    return program


def run(ran: str, sanitizer: str, command: list[object], cwd: Path = ROOT, **environment: str) -> Done:
    begun = time.monotonic()
    env = {**os.environ, **ENVIRONMENT, **environment}
    log = OUT / f"{re.sub(r'[^a-z0-9]+', '_', f'{ran} {sanitizer}'.lower())}.log"
    with log.open("w") as file:
        done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text(errors="replace")
    found = [line.strip() for line in text.splitlines() if REPORT.search(line)]
    if done.returncode and not found:
        found = [f"exit status {done.returncode}"]
    said = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    print(f"{ran}, {sanitizer}: {time.monotonic() - begun:.0f} s, {len(found)} found; {said.strip('= ')}", flush=True)
    for line in found[:5]:
        print(f"    {line}    ({log})", flush=True)
    return Done(ran, sanitizer, round(time.monotonic() - begun, 1), found, said.strip("= "))


def planted() -> list[Done]:
    """Nothing found here is the error."""
    kinds = [
        ("planted", MEMORY, "overflow", "heap-buffer-overflow"),
        ("planted", MEMORY, "undefined", "runtime error"),
        ("planted", THREADS, "race", "data race"),
        ("planted_kernel", MEMORY, "input", "use-after-poison"),
        ("planted_kernel", MEMORY, "shared", "use-after-poison"),
    ]
    all_done = []
    for name, sanitizer, kind, wanted in kinds:
        program = build(name, [SANITIZERS / f"{name}.cpp"], sanitizer, f"-I{EMULATOR}")
        text = subprocess.run([program, kind], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True).stderr
        said = f"reported: {wanted}" if wanted in text else f"NOT reported: {wanted}"
        print(f"{name} {kind}, {sanitizer}: {said}", flush=True)
        all_done.append(Done(f"{name} {kind}", sanitizer, 0.0, [] if wanted in text else [said], said))
    return all_done


def kernels() -> list[Done]:
    sources = sorted([*(ROOT / "kernels").glob("*/cpu*.cpp"), *SANITIZERS.glob("cpu_*.cpp")])
    return [run("every CPU kernel", s, [build("cpu_kernels", sources, s)]) for s in (MEMORY, THREADS)]


def emulator() -> list[Done]:
    all_done = []
    for op in OPS:
        sources = [ROOT / "kernels" / op / "cuda.cu", EMULATOR / f"check_{op}.cpp"]
        if op == "min_goal":
            sources.append(ROOT / "kernels" / op / "cpu_baseline.cpp")
        program = build(f"emulated_{op}", sources, MEMORY, f"-I{EMULATOR}")
        all_done.append(run(f"CUDA kernels of {op}, emulated", MEMORY, [program]))
    return all_done


def extension(sanitizer: str, *libraries: str) -> list[Done]:
    copy = OUT / sanitizer.split(",")[0] / "tree"
    for name in ("bomkern", "csrc", "kernels", "tests", "tools"):
        kept = shutil.ignore_patterns("__pycache__", "_C*.so", "results")
        shutil.copytree(ROOT / name, copy / name, ignore=kept, dirs_exist_ok=True)
    for name in ("setup.py", "bomkern_command.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    env = {**os.environ, "BOMKERN_SANITIZE": sanitizer, "MAX_JOBS": str(JOBS)}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, env=env, check=True)
    (made,) = (copy / "bomkern").glob("_C*.so")
    if f"__{sanitizer[0]}san_".encode() not in made.read_bytes():
        sys.exit(f"{made} was built without {sanitizer}")
    files = [f"tests/ops/test_{name}.py" for name in TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *files,
    ]
    environment = {
        "LD_PRELOAD": " ".join(library(name) for name in libraries),
        # Python and torch keep memory to the end. The rest is torch's.
        "ASAN_OPTIONS": ENVIRONMENT["ASAN_OPTIONS"] + ":detect_leaks=0:alloc_dealloc_mismatch=0",
        # What is not built with the sanitizer says nothing of its own synchronisation.
        "TSAN_OPTIONS": ENVIRONMENT["TSAN_OPTIONS"] + ":ignore_noninstrumented_modules=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "4",
        "PYTHONPATH": str(copy),
        "PYTHONFAULTHANDLER": "",
    }
    return [run("ops' tests, impl cpu", sanitizer, [*command, "-k", PICKED[sanitizer]], copy, **environment)]


def memory() -> list[Done]:
    return extension(MEMORY, "libasan.so", "libubsan.so", "libstdc++.so")


def threads() -> list[Done]:
    return extension(THREADS, "libtsan.so", "libstdc++.so")


PARTS: dict[str, Callable[[], list[Done]]] = {
    "planted": planted,
    "kernels": kernels,
    "emulator": emulator,
    "memory": memory,
    "threads": threads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    if wrong := [part for part in given.parts if part not in PARTS]:
        parser.error(f"no part {wrong[0]}: {', '.join(PARTS)}")
    try:
        done = {part: PARTS[part]() for part in given.parts}
    except Missing as missing:
        print(f"make sanitize not run: {missing}")
        sys.exit(2)
    if given.results:
        some = "" if given.parts == list(PARTS) else f' PART="{" ".join(given.parts)}"'
        facts = {
            "command": f"make sanitize{some}",
            "tools": {"compiler": output(gxx(), "--version").splitlines()[0], "python": platform.python_version()},
            "runs": [{"part": part, **one._asdict()} for part, all_done in done.items() for one in all_done],
        }
        before = json.loads(given.results.read_text()) if given.results.exists() else {}  # what was added by hand stays
        given.results.write_text(json.dumps({**before, **facts}, indent=2) + "\n")
    found = sum(bool(one.found) for all_done in done.values() for one in all_done)
    print(f"sanitizers: {sum(map(len, done.values()))} runs, {found} of them with findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
