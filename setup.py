"""Builds ``bomkern._C`` as far as this machine's compilers reach; pyproject.toml holds everything else.

The ladder: a C++ compiler gives the CPU kernels; an nvcc of torch's CUDA major gives the CUDA kernels too; no compiler
gives a pure Python install, which says so when it is imported. What is asked of the machine, and of the environment's
variables, is in tools/build_ladder.py and tools/build_extension.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_extension  # noqa: E402  where tools/ is on the path

# Read by bomkern/dispatch/select.py; why nothing is compiled in this installation.
WHY_NOT = "_not_compiled.txt"


class BuildPython(build_py):
    """Python's files, and beside them why there is nothing else."""

    reason = ""

    def run(self) -> None:
        super().run()
        note = (ROOT if self.editable_mode else Path(self.build_lib)) / "bomkern" / WHY_NOT
        note.unlink(missing_ok=True)
        if self.reason:
            note.write_text(self.reason + "\n")


def compiled() -> dict[str, Any]:
    """The arguments of `setup` for a command that builds; no other needs a compiler or torch."""
    if not {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"} & set(sys.argv):
        return {}
    found = build_extension.ladder()
    BuildPython.reason = found.cpp
    print(f"bomkern: building {found}", flush=True)
    given = build_extension.arguments(found)
    return {**given, "cmdclass": {**given.get("cmdclass", {}), "build_py": BuildPython}}


packages = [".".join(p.parent.relative_to(ROOT).parts) for p in sorted((ROOT / "bomkern").rglob("__init__.py"))]
kernels = ["bomkern.kernels", *(f"bomkern.kernels.{p.parent.name}" for p in (ROOT / "kernels").glob("*/__init__.py"))]
setup(
    packages=packages + kernels,
    package_dir={"bomkern": "bomkern", "bomkern.kernels": "kernels"},
    py_modules=["bomkern_command"],
    package_data={"bomkern": ["py.typed"]},
    include_package_data=False,
    **compiled(),
)
