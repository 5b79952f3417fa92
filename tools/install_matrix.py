"""Install bomkern into fresh environments in every common way, and record the result of each.

``python tools/install_matrix.py [--only PATTERN] [--cuda] [--again] [--work FOLDER]`` runs the cells of the matrix;
``--table`` prints the results as Markdown and installs nothing. A cell is named torch/compiler/what/tool. Each cell is
run once: tests/results/install_matrix.json is written after every cell, so that a later run continues an interrupted
one. The exit code is 1 where a cell did not turn out as expected. ``--cuda`` adds the cells with a CUDA build of torch,
gigabytes of download.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from check_dist import ROOT, tracked

RESULTS = ROOT / "tests" / "results" / "install_matrix.json"
TORCH = {
    "cpu": os.environ.get("TORCH", "torch==2.13.0"),
    "cuda": os.environ.get("CUDA_TORCH", "torch==2.14.1"),
    "2.11": "torch==2.11.*",
    "newest": os.environ.get("NEW_TORCH", "torch"),
}
TORCH["user"] = TORCH["system"] = TORCH["cpu"]
WHATS = ("editable", "wheel", "sdist")
TOOLS = ("pip", "no-isolation", "uv")
PROBE = """
import json, torch, bomkern
a, b = (torch.rand(64, requires_grad=True) for _ in range(2))
bomkern.min_goal_loss([a, b], [bomkern.Minimize(1.0), bomkern.Minimize(2.0)]).backward()
assert a.grad.abs().sum() + b.grad.abs().sum() > 0
info = bomkern.info()
best = {op: next(name for name, why in d["cpu"].items() if why is None) for op, d in info["ops"].items()}
print(json.dumps({"torch": info["torch"], "serve": sorted(set(best.values())), "cuda": info["build"].get("cuda", "")}))
"""
# Prints the installed packages and the identity of torch's file: an installation may add bomkern and triton alone.
INSTALLED = """
import importlib.metadata as m, importlib.util as u, json, os
spec = u.find_spec("torch")
file = os.stat(spec.origin) if spec else None
print(json.dumps({"packages": {d.name.lower().replace("_", "-"): d.version for d in m.distributions()},
                  "torch": [spec.origin, file.st_ino, file.st_mtime_ns] if spec else None}))
"""
ITS_OWN = {"bomkern", "triton"}
# A module that every Python of the environment imports, to pretend a GPU that no nvcc knows.
PRETENDED_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda index=None: (99, 0)
"""
# A shell line that imitates a kind of compiler, before the machine's own compiler is called with "$@".
COMPILERS = {
    "old g++": 'case "$*" in *-std=c++2*) echo "error: unrecognized command-line option" >&2; exit 1;; esac',
    # nvcc's header checks __GNUC__; the system's own headers do not build with a false one.
    "g++ that nvcc refuses": 'case "$*" in *__CUDACC__*) set -- -U__GNUC__ -D__GNUC__=99 "$@";; esac',
}
# The messages of the errors that some cells are expected to end with.
NO_TORCH = r"needs torch in the environment"
NO_SETUPTOOLS = r"needs setuptools.*in the environment"
# The message of `bomkern info` where a rung of the ladder was left out or was built differently.
SAYS = {
    "no Python.h": r"Python's headers are missing",
    "old g++": r"unrecognized command-line option",
    "g++ that nvcc refuses": r"unsupported GNU version",
    "unknown GPU": r"does not know the GPU that is there \(99\.0\)",
    "none": r"no C\+\+ compiler was found",
}


class Cell(NamedTuple):
    # The torch in the environment beforehand: none, cpu, cuda, 2.11, newest; "user" is a CPU build in the user's
    # folder, and "system" one in the folder of the system's Python, which the environment sees.
    torch: str
    compiler: str  # none, g++, g++ and nvcc, or a key of SAYS
    what: str  # one of WHATS
    tool: str  # one of TOOLS, or "bare": without isolation and without setuptools

    @property
    def name(self) -> str:
        return "/".join(self)

    @property
    def error(self) -> str | None:
        """The pattern of the error that this cell is expected to end with; None where it is to work."""
        if self.tool == "bare":
            return NO_SETUPTOOLS
        return NO_TORCH if (self.torch, self.tool) == ("none", "no-isolation") and self.compiler != "none" else None

    @property
    def serves(self) -> str:
        return "reference" if self.compiler in ("none", "no Python.h", "old g++") else "cpu"

    @property
    def cuda(self) -> bool:
        return self.compiler in ("g++ and nvcc", "unknown GPU")


def cells(cuda: bool) -> list[Cell]:
    """Return all cells, the quick ones first; with ``cuda`` also those whose torch is gigabytes of download."""
    matrix = [Cell(t, c, w, by) for c, t, by, w in itertools.product(("none", "g++"), ("cpu", "none"), TOOLS, WHATS)]
    matrix.append(Cell("none", "none", "editable", "bare"))
    matrix += [Cell("cpu", compiler, "editable", "pip") for compiler in ("no Python.h", "old g++")]
    matrix += [Cell("user", "g++", "wheel", "pip"), Cell("system", "g++", "editable", "pip")]
    if cuda:
        matrix += [Cell(torch, "g++", "wheel", "pip") for torch in ("2.11", "newest", "cuda")]
        matrix += [Cell("cuda", c, "wheel", "pip") for c in ("g++ and nvcc", "g++ that nvcc refuses")]
        matrix.append(Cell("cuda", "unknown GPU", "wheel", "no-isolation"))
    return matrix


class Failed(Exception):
    """A command failed; the message is its output."""


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise Failed(done.stdout)
    return done.stdout


def _lifted(cell: Cell) -> dict[str, str]:
    """Return what lifts pip's settings on this machine, whose constraints may forbid the newest torch."""
    return {"PIP_CONFIG_FILE": os.devnull} if cell.torch == "newest" else {}


class Bench:
    """The folder in which the cells are run, one after the other.

    The environment of every cell has the same path, because compilers' caches depend on paths. It is a copy, by hard
    links, of an environment that is made once.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.venv, self.source = work, work / "venv", work / "source"
        self.python = str(self.venv / "bin" / "python")
        for name in ("bases", "none", "tmp"):
            (work / name).mkdir(parents=True, exist_ok=True)
        self.uv = shutil.which("uv") or self._install_uv()

    def _install_uv(self) -> str:
        place = self.work / "uv"
        if not (place / "bin" / "uv").exists():
            run([sys.executable, "-m", "venv", str(place)], os.environ, self.work)
            run([str(place / "bin" / "python"), "-m", "pip", "install", "uv"], os.environ, self.work)
        return str(place / "bin" / "uv")

    def interpreter(self, cell: Cell) -> str:
        """Return the Python that makes the environment: a copy where the cell changes it or installs into it."""
        if cell.torch not in ("user", "system") and cell.compiler != "no Python.h":
            return sys.executable
        copy = self.work / f"python-{cell.torch}-{cell.compiler}".replace(" ", "-")
        if not copy.exists():
            shutil.copytree(sys.base_prefix, copy, symlinks=True)
            if cell.compiler == "no Python.h":
                shutil.rmtree(copy / "include")
        return str(copy / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")

    def fresh(self, cell: Cell) -> None:
        """Make an environment with the cell's torch, setuptools and ninja (not for "bare"), and copy the sources."""
        tools, base = cell.tool != "bare", self.interpreter(cell)
        kept = (
            self.work / "bases" / f"{cell.torch}{'-tools' * tools}{'-bare-python' * (cell.compiler == 'no Python.h')}"
        )
        for folder in (self.venv, self.source, self.work / "dist", self.work / "user"):
            shutil.rmtree(folder, ignore_errors=True)
        self.python = str(self.venv / "bin" / "python")
        if kept.exists():
            shutil.copytree(kept, self.venv, symlinks=True, copy_function=os.link)
        else:
            site = ["--system-site-packages"] * (cell.torch in ("user", "system"))
            run([base, "-m", "venv", *site, str(self.venv)], os.environ, self.work)
            pip = [self.python, "-m", "pip", "install", "--quiet"]
            run([*pip, "--upgrade", "pip"], os.environ, self.work)
            for wanted in ["setuptools>=77", "ninja"] * tools:
                run([*pip, wanted], os.environ, self.work)
            if cell.torch == "system":
                run([base, "-m", "pip", "install", "--quiet", TORCH["system"]], os.environ, self.work)
            elif cell.torch in TORCH and cell.torch != "user":
                run([*pip, TORCH[cell.torch]], {**os.environ, **_lifted(cell)}, self.work)
            if not tools:  # torch may have installed it
                run([self.python, "-m", "pip", "uninstall", "-y", "setuptools"], os.environ, self.work)
            shutil.copytree(self.venv, kept, symlinks=True, copy_function=os.link)
        if cell.torch == "user":  # pip installs there for users who cannot write to the system's folder
            self.python = base
            run([base, "-m", "pip", "install", "--user", "--quiet", TORCH["user"]], self.environment(cell), self.work)
        if cell.compiler == "unknown GPU":
            where = run(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], os.environ, self.work
            )
            Path(where.strip(), "pretended_gpu.py").write_text(PRETENDED_GPU)
            Path(where.strip(), "pretended_gpu.pth").write_text("import pretended_gpu\n")
        for name in tracked():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.source / name)

    def environment(self, cell: Cell) -> dict[str, str]:
        """Return the environment variables of a cell; without a compiler the PATH is an empty folder."""
        left_out = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PYTHONPATH", "BOMKERN_BUILD_CUDA")
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        kept |= {"TMPDIR": str(self.work / "tmp"), "UV_LINK_MODE": "copy", "PYTHONUSERBASE": str(self.work / "user")}
        # pip caches the wheel built from an archive and reuses it whatever the compiler and torch: each has its cache.
        kept["PIP_CACHE_DIR"] = str(self.work / "pip" / f"{cell.torch} {cell.compiler}".replace(" ", "-"))
        kept.setdefault("MAX_JOBS", "2")
        kept |= _lifted(cell)
        if cell.compiler == "unknown GPU":
            kept.pop("TORCH_CUDA_ARCH_LIST", None)
        else:
            kept.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
        if cell.compiler == "none":
            return kept | {"PATH": str(self.work / "none")}
        if not cell.cuda and cell.compiler != "g++ that nvcc refuses":
            kept["CUDA_HOME"] = str(self.work / "none")
        if cell.compiler in COMPILERS:
            folder = self.work / "compilers" / cell.compiler.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("c++", "g++", "gcc"):
                (folder / name).write_text(f'#!/bin/sh\n{COMPILERS[cell.compiler]}\nexec {shutil.which(name)} "$@"\n')
                (folder / name).chmod(0o755)
            return kept | {"PATH": f"{folder}{os.pathsep}{kept['PATH']}"}
        cached = Path("/usr/lib/ccache")
        if cached.is_dir():
            kept |= {"PATH": f"{cached}{os.pathsep}{kept['PATH']}", "CCACHE_BASEDIR": str(self.work)}
            kept |= {"CCACHE_NOHASHDIR": "1", "CCACHE_DIR": str(self.work / "ccache")}
        return kept

    def commands(self, cell: Cell) -> list[list[str]]:
        """Return the commands of a cell. Archives are built by the same tool under the same conditions."""
        dist, source = str(self.work / "dist"), str(self.source)
        user = ["--user"] * (cell.torch == "user")
        open_ = ["--no-build-isolation"] if cell.tool in ("no-isolation", "bare") else []
        if cell.tool == "uv":
            install = [self.uv, "pip", "install", "--python", self.python]
            if cell.torch != "none":  # as in the README: uv's isolated builds do not see the installed torch
                open_ = ["--no-build-isolation-package", "bomkern"]
            wheel = [self.uv, "build", "--wheel", "--python", self.python, "--out-dir", dist, source]
            wheel += ["--no-build-isolation"] * (cell.torch != "none")
        else:
            install = [self.python, "-m", "pip", "install", *user, *open_]
            wheel = [self.python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", dist, *open_, source]
        if cell.what == "editable":
            return [[*install, *open_, "-e", source]]
        if cell.what == "wheel":
            return [wheel, [*install, "bomkern @ *.whl"]]
        return [[*install, *open_, "bomkern @ *.tar.gz"]]

    def sdist(self) -> None:
        """Build an sdist with the Python that runs this, as for a release."""
        (self.work / "dist").mkdir()
        code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": "tools", "PATH": str(self.work / "none"), "CXX": "nowhere"}
        run([sys.executable, "-c", code, str(self.work / "dist")], environment, self.source)

    def file(self, argument: str) -> str:
        """Replace ``NAME @ PATTERN`` by the archive that matches the pattern."""
        if " @ " not in argument:
            return argument
        return f"bomkern @ {next((self.work / 'dist').glob(argument.partition(' @ ')[2])).as_uri()}"

    def installed(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return the packages of the environment; torch may print warnings before."""
        found: dict[str, Any] = json.loads(run([self.python, "-c", INSTALLED], environment, self.work).splitlines()[-1])
        return found

    def attempt(self, cell: Cell) -> dict[str, Any]:
        """Run one cell, and return its result."""
        self.fresh(cell)
        if cell.what == "sdist":
            self.sdist()
        environment, begun = self.environment(cell), time.monotonic()
        result: dict[str, Any] = {"cell": cell.name, "outcome": "works"}
        before = self.installed(environment)
        try:
            for command in self.commands(cell):
                run([self.file(argument) for argument in command], environment, self.work)
            result["seconds"] = round(time.monotonic() - begun)
            info = run([self.python, "-m", "bomkern", "info"], environment, self.work)
            result |= json.loads(run([self.python, "-c", PROBE], environment, self.work).splitlines()[-1])
            wrong = ""
            if result["serve"] != [cell.serves] or cell.error is not None:
                wrong = "another implementation serves than expected"
            if cell.cuda != bool(result["cuda"]):
                wrong = f"the CUDA kernels were expected to be {'built' if cell.cuda else 'left out'}"
            if cell.compiler in SAYS and not re.search(SAYS[cell.compiler], info):
                wrong, result["said"] = "bomkern info does not say why", info[:500]
            wrong = changed(before, self.installed(environment)) or wrong
        except Failed as why:
            text = str(why).replace(str(self.work), ".")
            result.setdefault("seconds", round(time.monotonic() - begun))
            expected = re.search(rf"^.*{cell.error}.*$", text, re.MULTILINE) if cell.error else None
            result["outcome"] = "clear error" if expected else "fails"
            result["said"] = expected[0].strip() if expected else text[-3000:]
            wrong = "" if expected else "an unexpected error"
        return {**result, "as_expected": not wrong, **({"wrong": wrong} if wrong else {})}


def changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the unexpected changes that an installation made to the packages; empty where there are none."""
    was, now = before["packages"], after["packages"]
    if before["torch"] is None:  # torch and its dependencies are new
        now = {name: version for name, version in now.items() if name in was}
    elif before["torch"] != after["torch"]:
        return f"torch was {before['torch']} and is {after['torch']}"
    lost = [f"{name} {was[name]} is {now.get(name, 'gone')}" for name in was if now.get(name) != was[name]]
    return "; ".join(lost + [f"{name} is new" for name in sorted(set(now) - set(was) - ITS_OWN)])


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": {}}


def keep(results: dict[str, Any], result: dict[str, Any]) -> None:
    results["python"], results["machine"] = platform.python_version(), f"{platform.system()} {platform.machine()}"
    results["cells"][result.pop("cell")] = {**result, "date": time.strftime("%Y-%m-%d")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: a row for each machine state and kind of file, and a column for each tool."""

    def shown(result: dict[str, Any] | None) -> str:
        if result is None:
            return "not run"
        mark = "" if result["as_expected"] else "**unexpected** "
        if result["outcome"] != "works":
            return mark + result["outcome"]
        served = ", ".join(result["serve"]) + (f" and CUDA {result['cuda']}" if result["cuda"] else "")
        return f"{mark}{served}, {result['seconds']} s"

    names = {"none": "none", "cpu": "CPU build", "cuda": "CUDA build", "user": "in the user's folder"}
    names |= {"system": "in the system's folder", "2.11": "2.11", "newest": "the newest"}
    tools = {
        "pip": "pip",
        "no-isolation": "pip `--no-build-isolation`",
        "uv": "uv",
        "bare": "the same without setuptools",
    }
    known = set(cells(cuda=True))
    there = [Cell(*name.split("/")) for name in results["cells"]]
    columns = [tool for tool in tools if any(cell.tool == tool for cell in there)]
    lines = [f"| torch before | compiler | from | {' | '.join(tools[tool] for tool in columns)} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for torch, compiler, what in sorted({cell[:3] for cell in there}):
        row = [
            shown(results["cells"].get(cell.name)) if cell in known else ""
            for cell in (Cell(torch, compiler, what, tool) for tool in columns)
        ]
        lines.append(f"| {names[torch]} | {compiler} | {what} | {' | '.join(row)} |")
    versions = ", ".join(sorted({r["torch"] for r in results["cells"].values() if "torch" in r}))
    lines += [
        "",
        "Which implementation serves on the CPU, and the seconds of the installation, with compilers' caches, beside "
        f"other work: torch {versions}, Python ",
    ]
    return "\n".join(lines) + f"{results['python']}, {results['machine']} (`make install-matrix`)."


def main() -> int:
    parser = argparse.ArgumentParser(description="Install bomkern into fresh environments in every common way.")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells to run, as in 'cpu/g++/*'")
    parser.add_argument("--cuda", action="store_true", help="also run the cells with a CUDA build of torch")
    parser.add_argument("--again", action="store_true", help="also run cells that have results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "install-matrix", metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, and run nothing")
    args, results = parser.parse_args(), load()
    if args.table:
        print(table(results))
        return 0
    bench, bad = Bench(args.work.resolve()), 0
    for cell in cells(args.cuda):
        if not fnmatch.fnmatch(cell.name, args.only) or (cell.name in results["cells"] and not args.again):
            continue
        result = bench.attempt(cell)
        bad, results = bad + (not result["as_expected"]), load()  # another process may have added cells
        print(*(f"{key}={value}" for key, value in result.items()), flush=True)
        keep(results, result)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
