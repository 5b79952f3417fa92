"""Installs bomkern in every way that people do, into fresh environments, and says what each gives.

``python tools/install_matrix.py [--only PATTERN] [--cuda] [--again] [--work FOLDER]``; ``--table`` prints the results
as Markdown and installs nothing. A cell is named torch/compiler/what/tool. Each is done once: results are kept in
tests/results/install_matrix.json after every cell, so that an interrupted run goes on where it was. Exit code 1 where
a cell did not turn out as expected. ``--cuda`` adds the cells with a CUDA build of torch, gigabytes of download.
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
# What is installed, and which file torch is: the same before and after, but for bomkern and what it brings.
INSTALLED = """
import importlib.metadata as m, importlib.util as u, json, os
spec = u.find_spec("torch")
file = os.stat(spec.origin) if spec else None
print(json.dumps({"packages": {d.name.lower().replace("_", "-"): d.version for d in m.distributions()},
                  "torch": [spec.origin, file.st_ino, file.st_mtime_ns] if spec else None}))
"""
ITS_OWN = {"bomkern", "triton"}
# A module that every Python of the environment imports: a GPU that no nvcc knows.
PRETENDED_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda index=None: (99, 0)
"""
# A line of a shell that makes a compiler behave as one of that kind, before the machine's own is called with "$@".
COMPILERS = {
    "old g++": 'case "$*" in *-std=c++2*) echo "error: unrecognized command-line option" >&2; exit 1;; esac',
    "g++ that nvcc refuses": 'set -- -U__GNUC__ -D__GNUC__=99 "$@"',  # which nvcc's own header looks at
}
# Why a cell is to end in an error, and how that error reads.
NO_TORCH = r"needs torch in the environment"
NO_SETUPTOOLS = r"needs setuptools.*in the environment"
# What `bomkern info` says where a rung of the ladder was left out, or was built otherwise.
SAYS = {
    "no Python.h": r"Python's headers are missing",
    "old g++": r"unrecognized command-line option",
    "g++ that nvcc refuses": r"unsupported GNU version",
    "unknown GPU": r"does not know the GPU that is there \(99\.0\)",
    "none": r"no C\+\+ compiler was found",
}


class Cell(NamedTuple):
    # In the environment beforehand: none, cpu, cuda, 2.11, newest; or a CPU build in the user's folder, or in that of
    # the system's Python behind an environment that sees it.
    torch: str
    compiler: str  # none, g++, g++ and nvcc, or a key of SAYS
    what: str  # one of WHATS
    tool: str  # one of TOOLS, or bare: without isolation, and without setuptools

    @property
    def name(self) -> str:
        return "/".join(self)

    @property
    def error(self) -> str | None:
        """What a clear error of this cell says, None where it is to work."""
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
    """All of them, the quick ones first; `cuda`: also those whose torch is gigabytes of download."""
    found = [Cell(t, c, w, by) for c, t, by, w in itertools.product(("none", "g++"), ("cpu", "none"), TOOLS, WHATS)]
    found.append(Cell("none", "none", "editable", "bare"))
    found += [Cell("cpu", compiler, "editable", "pip") for compiler in ("no Python.h", "old g++")]
    found += [Cell("user", "g++", "wheel", "pip"), Cell("system", "g++", "editable", "pip")]
    if cuda:
        found += [Cell(torch, "g++", "wheel", "pip") for torch in ("2.11", "newest", "cuda")]
        found += [Cell("cuda", c, "wheel", "pip") for c in ("g++ and nvcc", "g++ that nvcc refuses")]
        found.append(Cell("cuda", "unknown GPU", "wheel", "no-isolation"))
    return found


class Failed(Exception):
    """A command failed; what it printed."""


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise Failed(done.stdout)
    return done.stdout


class Bench:
    """The folder in which one cell after the other is tried.

    Each gets the environment at the same place, as compilers' caches go by paths: a copy, by hard links, of one that
    was made once.
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
        """The Python that environments are made from: a copy where the cell changes it or installs into it."""
        if cell.torch not in ("user", "system") and cell.compiler != "no Python.h":
            return sys.executable
        copy = self.work / f"python-{cell.torch}-{cell.compiler}".replace(" ", "-")
        if not copy.exists():
            shutil.copytree(sys.base_prefix, copy, symlinks=True)
            if cell.compiler == "no Python.h":
                shutil.rmtree(copy / "include")
        return str(copy / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")

    def fresh(self, cell: Cell) -> None:
        """An environment with the cell's torch, with setuptools and ninja but for bare, and the sources beside it."""
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
                lifted = {"PIP_CONFIG_FILE": os.devnull} if cell.torch == "newest" else {}
                run([*pip, TORCH[cell.torch]], {**os.environ, **lifted}, self.work)
            if not tools:  # torch may bring it
                run([self.python, "-m", "pip", "uninstall", "-y", "setuptools"], os.environ, self.work)
            shutil.copytree(self.venv, kept, symlinks=True, copy_function=os.link)
        if cell.torch == "user":  # where pip puts it for who may not write to the system's folder
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
        """The machine as the cell has it: without compilers nothing is on the PATH at all."""
        left_out = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PYTHONPATH", "BOMKERN_BUILD_CUDA")
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        kept |= {"TMPDIR": str(self.work / "tmp"), "UV_LINK_MODE": "copy", "PYTHONUSERBASE": str(self.work / "user")}
        # pip keeps what it built from an archive, and takes it again whatever compiler and torch are there by then.
        kept["PIP_CACHE_DIR"] = str(self.work / "pip" / f"{cell.torch} {cell.compiler}".replace(" ", "-"))
        kept.setdefault("MAX_JOBS", "2")
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
        """What is typed. Archives are built by the same tool, under the same conditions."""
        dist, source = str(self.work / "dist"), str(self.source)
        user = ["--user"] * (cell.torch == "user")
        open_ = ["--no-build-isolation"] if cell.tool in ("no-isolation", "bare") else []
        if cell.tool == "uv":
            install = [self.uv, "pip", "install", "--python", self.python]
            if cell.torch != "none":  # the README's way: uv's isolated builds do not see the torch that is there
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
        """Made as a release is: by the Python that runs this."""
        (self.work / "dist").mkdir()
        code = "import sys, build_backend; build_backend.build_sdist(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": "tools", "PATH": str(self.work / "none"), "CXX": "nowhere"}
        run([sys.executable, "-c", code, str(self.work / "dist")], environment, self.source)

    def file(self, argument: str) -> str:
        """``NAME @ PATTERN`` as the archive that matches it."""
        if " @ " not in argument:
            return argument
        return f"bomkern @ {next((self.work / 'dist').glob(argument.partition(' @ ')[2])).as_uri()}"

    def attempt(self, cell: Cell) -> dict[str, Any]:
        """Do one cell, and say how it came out."""
        self.fresh(cell)
        if cell.what == "sdist":
            self.sdist()
        environment, begun = self.environment(cell), time.monotonic()
        result: dict[str, Any] = {"cell": cell.name, "outcome": "works"}
        before = json.loads(run([self.python, "-c", INSTALLED], environment, self.work))
        try:
            for command in self.commands(cell):
                run([self.file(argument) for argument in command], environment, self.work)
            result["seconds"] = round(time.monotonic() - begun)
            info = run([self.python, "-m", "bomkern", "info"], environment, self.work)
            result |= json.loads(run([self.python, "-c", PROBE], environment, self.work).splitlines()[-1])
            wrong = "" if result["serve"] == [cell.serves] and cell.error is None else "serves otherwise than expected"
            if cell.cuda != bool(result["cuda"]):
                wrong = "the CUDA kernels are there or not, otherwise than expected"
            if cell.compiler in SAYS and not re.search(SAYS[cell.compiler], info):
                wrong, result["said"] = "bomkern info does not say why", info[:500]
            wrong = changed(before, json.loads(run([self.python, "-c", INSTALLED], environment, self.work))) or wrong
        except Failed as why:
            text = str(why).replace(str(self.work), ".")
            result.setdefault("seconds", round(time.monotonic() - begun))
            said = re.search(rf"^.*{cell.error}.*$", text, re.MULTILINE) if cell.error else None
            result["outcome"] = "clear error" if said else "fails"
            result["said"] = said[0].strip() if said else text[-3000:]
            wrong = "" if said else "an error that was not expected"
        return {**result, "as_expected": not wrong, **({"wrong": wrong} if wrong else {})}


def changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What an installation did to what was there, or brought besides; empty where it is as it should be."""
    was, now = before["packages"], after["packages"]
    if before["torch"] is None:  # torch and all that it needs are new
        now = {name: version for name, version in now.items() if name in was}
    elif before["torch"] != after["torch"]:
        return f"torch was {before['torch']} and is {after['torch']}"
    lost = [f"{name} {was[name]} is {now.get(name, 'gone')}" for name in was if now.get(name) != was[name]]
    return "; ".join(lost + [f"{name} is new" for name in sorted(set(now) - set(was) - ITS_OWN)])


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cells": {}}


def keep(found: dict[str, Any], result: dict[str, Any]) -> None:
    found["python"], found["machine"] = platform.python_version(), f"{platform.system()} {platform.machine()}"
    found["cells"][result.pop("cell")] = {**result, "date": time.strftime("%Y-%m-%d")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: a row for each state of the machine and kind of file, a column for each tool."""

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
    there = [Cell(*name.split("/")) for name in found["cells"]]
    columns = [tool for tool in tools if any(cell.tool == tool for cell in there)]
    lines = [f"| torch before | compiler | from | {' | '.join(tools[tool] for tool in columns)} |"]
    lines.append("|---" * (3 + len(columns)) + "|")
    for torch, compiler, what in sorted({cell[:3] for cell in there}):
        row = [
            shown(found["cells"].get(cell.name)) if cell in known else ""
            for cell in (Cell(torch, compiler, what, tool) for tool in columns)
        ]
        lines.append(f"| {names[torch]} | {compiler} | {what} | {' | '.join(row)} |")
    versions = ", ".join(sorted({r["torch"] for r in found["cells"].values() if "torch" in r}))
    lines += [
        "",
        "Which implementation serves on the CPU, and the seconds of the installation, with compilers' caches, beside "
        f"other work: torch {versions}, Python ",
    ]
    return "\n".join(lines) + f"{found['python']}, {found['machine']} (`make install-matrix`)."


def main() -> int:
    parser = argparse.ArgumentParser(description="Install bomkern in every way that people do.")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells, as in 'cpu/g++/*'")
    parser.add_argument("--cuda", action="store_true", help="also with a CUDA build of torch")
    parser.add_argument("--again", action="store_true", help="also those done before")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "install-matrix", metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, and do nothing")
    arguments, found = parser.parse_args(), load()
    if arguments.table:
        print(table(found))
        return 0
    bench, bad = Bench(arguments.work.resolve()), 0
    for cell in cells(arguments.cuda):
        if not fnmatch.fnmatch(cell.name, arguments.only) or (cell.name in found["cells"] and not arguments.again):
            continue
        result = bench.attempt(cell)
        bad, found = bad + (not result["as_expected"]), load()  # another may be at other cells
        print(*(f"{key}={value}" for key, value in result.items()), flush=True)
        keep(found, result)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
