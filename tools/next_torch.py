"""Try bomkern with another torch: ``make next-torch TORCH='torch==X'``.

``python tools/next_torch.py REQUIREMENT`` makes a fresh environment named after the requirement, and prints the private
names that its torch lacks. Then it builds bomkern there from a copy of the sources, prints ``bomkern info`` and runs
the quick tests. The exit code is 1 where a name is missing or a step fails; the later steps run anyway. ``--names``
only prints the missing names for the torch of the Python that runs this.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check_dist import ROOT, tracked

INTERNALS = ROOT / "bomkern" / "common/torch_internals"


def folder_of(requirement: str) -> str:
    """Return the folder of the environment: .venv-torch-2.15.0 for ``torch==2.15.0``."""
    return ".venv-" + re.sub(r"[^\w.]+", "-", requirement).strip("-.")


def missing_names() -> list[str]:
    """Return a line for each private name that the torch of this Python lacks. bomkern need not be built."""
    spec = importlib.util.spec_from_file_location("torch_internals", INTERNALS / "__init__.py")
    assert spec is not None and spec.loader is not None
    internals = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = internals  # for its relative imports
    spec.loader.exec_module(internals)
    return [str(line) for line in internals.describe(internals.missing())]


def print_names() -> int:
    lines = missing_names()
    print("\n".join(lines) if lines else "this torch has every private name that bomkern/common/torch_internals lists")
    return 1 if lines else 0


def copy_sources(to: Path) -> None:
    """Copy the project's files: a build in place would replace the extension of the environment in use."""
    for name in tracked():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


def try_torch(requirement: str) -> int:
    """Run all steps for one requirement, and return the exit code."""
    venv = ROOT / folder_of(requirement)
    python, source = str(venv / "bin" / "python"), venv / "src"
    pip = [python, "-m", "pip", "install", "--quiet"]

    def run(*command: str, where: Path = ROOT) -> bool:
        print(f"$ {' '.join(command)}", flush=True)
        return subprocess.run(command, cwd=where).returncode == 0

    if not run(sys.executable, "-m", "venv", "--clear", str(venv)) or not run(*pip, requirement, "numpy"):
        return 1
    complete = run(python, str(Path(__file__).resolve()), "--names")
    version = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('torch'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (venv / "constraints.txt").write_text(f"torch=={version}\n")
    os.environ["PIP_CONSTRAINT"] = f"{os.environ.get('PIP_CONSTRAINT', '')} {venv / 'constraints.txt'}".strip()
    os.environ["GIT_CEILING_DIRECTORIES"] = str(venv)  # else git would list no files: it ignores the copy
    copy_sources(source)
    install = str(source / "tools" / "install.py")
    done = (
        run(python, install, "build")
        and run(python, install, "extra", "test")
        and run(python, "-m", "bomkern", "info", where=source)
    )
    quick = ["-m", "pytest", "tests", "-m", "not slow", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    return 0 if done and run(python, *quick, where=source) and complete else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "requirement", nargs="?", default="torch", help="a requirement of pip (default: torch, the newest)"
    )
    parser.add_argument(
        "--names", action="store_true", help="only print the private names that this Python's torch lacks"
    )
    args = parser.parse_args()
    if not re.match(r"torch\b(?!-)", args.requirement):
        parser.error(f"REQUIREMENT must be one of torch, such as torch==2.15.0, got {args.requirement!r}")
    return print_names() if args.names else try_torch(args.requirement)


if __name__ == "__main__":
    sys.exit(main())
