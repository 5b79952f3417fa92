"""Build ``bomkern._C`` as far as this machine's compilers allow; pyproject.toml holds all other metadata.

A C++ compiler gives the CPU kernels, and an nvcc of torch's CUDA major version also the CUDA kernels. Without a
compiler the install is pure Python, and says so when it is imported. tools/build_ladder.py and tools/build_extension.py
check the machine and the environment variables.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_extension  # noqa: E402  found once tools/ is on the path


class BuildPython(build_py):
    """Copy the Python files, and write beside them what is compiled, which bomkern/dispatch/built_for.py reads."""

    record: dict[str, str]

    def run(self) -> None:
        super().run()
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / "bomkern"
        (folder / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")


def version() -> str:
    """Return the version, with the local part that BOMKERN_LOCAL_VERSION gives to a wheel.

    An sdist never has one: pip refuses a wheel whose version differs from that of the sdist it is built from.
    """
    public: str = runpy.run_path(str(ROOT / "bomkern" / "_version.py"))["__version__"]
    local = os.environ.get("BOMKERN_LOCAL_VERSION")
    return f"{public}+{local}" if local and "sdist" not in sys.argv else public


def compiled() -> dict[str, Any]:
    """Return the arguments of `setup` for a command that builds; other commands need neither compiler nor torch."""
    if not {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"} & set(sys.argv):
        return {}
    ladder = build_extension.ladder()
    BuildPython.record = build_extension.record(ladder)
    print(f"bomkern: building {ladder}", flush=True)
    arguments = build_extension.arguments(ladder)
    return {**arguments, "cmdclass": {**arguments.get("cmdclass", {}), "build_py": BuildPython}}


packages = [".".join(p.parent.relative_to(ROOT).parts) for p in sorted((ROOT / "bomkern").rglob("__init__.py"))]
kernels = ["bomkern.kernels", *(f"bomkern.kernels.{p.parent.name}" for p in (ROOT / "kernels").glob("*/__init__.py"))]
setup(
    version=version(),
    packages=packages + kernels,
    package_dir={"bomkern": "bomkern", "bomkern.kernels": "kernels"},
    py_modules=["bomkern_command"],
    package_data={"bomkern": ["py.typed"]},
    include_package_data=False,
    **compiled(),
)
