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
    "cpu": os.environ.get("TORCH", "torch>=2.11,<2.14"),
    "cuda": os.environ.get("CUDA_TORCH", "torch>=2.11,<2.14"),
}
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
# Why a cell is to end in an error, and how that error reads. None: it is to work.
NO_TORCH = r"needs torch in the environment"
NO_SETUPTOOLS = r"needs setuptools.*in the environment"


class Cell(NamedTuple):
    torch: str  # none, cpu, cuda: in the environment beforehand
    compiler: str  # g++, none, g++ and nvcc
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
        return "reference" if self.compiler == "none" else "cpu"


def cells(cuda: bool) -> list[Cell]:
    """All of them, the quick ones first."""
    found = [Cell(t, c, w, by) for c, t, by, w in itertools.product(("none", "g++"), ("cpu", "none"), TOOLS, WHATS)]
    found.append(Cell("none", "none", "editable", "bare"))
    if cuda:
        found += [Cell("cuda", "g++", "wheel", "pip"), Cell("cuda", "g++ and nvcc", "wheel", "pip")]
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

    def fresh(self, torch: str, tools: bool) -> None:
        """An environment with this torch, and with setuptools and ninja if `tools`, and the sources beside it."""
        base = self.work / "bases" / f"{torch}{'-tools' * tools}"
        for folder in (self.venv, self.source, self.work / "dist"):
            shutil.rmtree(folder, ignore_errors=True)
        if base.exists():
            shutil.copytree(base, self.venv, symlinks=True, copy_function=os.link)
        else:
            run([sys.executable, "-m", "venv", str(self.venv)], os.environ, self.work)
            pip = [self.python, "-m", "pip", "install", "--quiet"]
            run([*pip, "--upgrade", "pip"], os.environ, self.work)
            for wanted in ([TORCH[torch]] if torch in TORCH else []) + ["setuptools>=77", "ninja"] * tools:
                run([*pip, wanted], os.environ, self.work)
            if not tools:  # torch may bring it
                run([self.python, "-m", "pip", "uninstall", "-y", "setuptools"], os.environ, self.work)
            shutil.copytree(self.venv, base, symlinks=True, copy_function=os.link)
        for name in tracked():
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.source / name)

    def environment(self, cell: Cell) -> dict[str, str]:
        """The machine as the cell has it: without compilers nothing is on the PATH at all."""
        left_out = ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "PYTHONPATH", "BOMKERN_BUILD_CUDA")
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        kept |= {"TMPDIR": str(self.work / "tmp"), "UV_LINK_MODE": "copy"}
        # pip keeps what it built from an archive, and takes it again whatever compiler and torch are there by then.
        kept["PIP_CACHE_DIR"] = str(self.work / "pip" / f"{cell.torch} {cell.compiler}".replace(" ", "-"))
        kept.setdefault("MAX_JOBS", "2")
        kept.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
        if cell.compiler == "none":
            return kept | {"PATH": str(self.work / "none")}
        if cell.compiler == "g++":
            kept["CUDA_HOME"] = str(self.work / "none")
        cached = Path("/usr/lib/ccache")
        if cached.is_dir():
            kept |= {"PATH": f"{cached}{os.pathsep}{kept['PATH']}", "CCACHE_BASEDIR": str(self.work)}
            kept |= {"CCACHE_NOHASHDIR": "1", "CCACHE_DIR": str(self.work / "ccache")}
        return kept

    def commands(self, cell: Cell) -> list[list[str]]:
        """What is typed. Archives are built by the same tool, under the same conditions."""
        dist, source = str(self.work / "dist"), str(self.source)
        open_ = ["--no-build-isolation"] if cell.tool in ("no-isolation", "bare") else []
        if cell.tool == "uv":
            install = [self.uv, "pip", "install", "--python", self.python]
            if cell.torch != "none":  # the README's way: uv's isolated builds do not see the torch that is there
                open_ = ["--no-build-isolation-package", "bomkern"]
            wheel = [self.uv, "build", "--wheel", "--python", self.python, "--out-dir", dist, source]
            wheel += ["--no-build-isolation"] * (cell.torch != "none")
        else:
            install = [self.python, "-m", "pip", "install", *open_]
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
        self.fresh(cell.torch, cell.tool != "bare")
        if cell.what == "sdist":
            self.sdist()
        environment, begun = self.environment(cell), time.monotonic()
        result: dict[str, Any] = {"cell": cell.name, "outcome": "works"}
        try:
            for command in self.commands(cell):
                run([self.file(argument) for argument in command], environment, self.work)
            result["seconds"] = round(time.monotonic() - begun)
            run([self.python, "-m", "bomkern", "info"], environment, self.work)
            result |= json.loads(run([self.python, "-c", PROBE], environment, self.work).splitlines()[-1])
            wrong = "" if result["serve"] == [cell.serves] and cell.error is None else "serves otherwise than expected"
            if ("nvcc" in cell.compiler) != bool(result["cuda"]):
                wrong = "the CUDA kernels are there or not, otherwise than expected"
        except Failed as why:
            text = str(why).replace(str(self.work), ".")
            result.setdefault("seconds", round(time.monotonic() - begun))
            said = re.search(rf"^.*{cell.error}.*$", text, re.MULTILINE) if cell.error else None
            result["outcome"] = "clear error" if said else "fails"
            result["said"] = said[0].strip() if said else text[-3000:]
            wrong = "" if said else "an error that was not expected"
        return {**result, "as_expected": not wrong, **({"wrong": wrong} if wrong else {})}


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

    names = {"none": "none", "cpu": "CPU build", "cuda": "CUDA build"}
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
