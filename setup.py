"""Build ``bomkern._C`` as far as this machine's compilers allow; pyproject.toml holds all other metadata.

A C++ compiler gives the CPU kernels, and an nvcc of torch's CUDA major version also the CUDA kernels. Without a
compiler the install is pure Python, and says so when it is imported. tools/build_ladder.py and tools/build_extension.py
check the machine and the environment variables.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_extension  # noqa: E402  found once tools/ is on the path

# The file that says why nothing is compiled in this installation; bomkern/dispatch/select.py reads it.
WHY_NOT = "_not_compiled.txt"


class BuildPython(build_py):
    """Copy the Python files, and write the reason beside them if nothing is compiled."""

    reason = ""

    def run(self) -> None:
        super().run()
        note = (ROOT if self.editable_mode else Path(self.build_lib)) / "bomkern" / WHY_NOT
        note.unlink(missing_ok=True)
        if self.reason:
            note.write_text(self.reason + "\n")


def compiled() -> dict[str, Any]:
    """Return the arguments of `setup` for a command that builds; other commands need neither compiler nor torch."""
    if not {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"} & set(sys.argv):
        return {}
    ladder = build_extension.ladder()
    BuildPython.reason = ladder.cpp
    print(f"bomkern: building {ladder}", flush=True)
    arguments = build_extension.arguments(ladder)
    return {**arguments, "cmdclass": {**arguments.get("cmdclass", {}), "build_py": BuildPython}}


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
