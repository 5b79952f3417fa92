"""The torch that the kernels of this installation are built for, and the command that builds them for another one."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path

import torch

from .._version import __version__, version_for

PACKAGE = Path(__file__).parents[1]
RECORD = PACKAGE / "_build.json"  # setup.py writes it: "torch", "cuda", "not_compiled_because"


def recorded() -> dict[str, str]:
    """Return what the build recorded; {} where no build has."""
    try:
        return dict(json.loads(RECORD.read_text()))
    except (OSError, ValueError):
        return {}


def _source() -> str:
    """Return what pip builds bomkern from: the place that it was installed from, or the sdist of this version."""
    if (PACKAGE.parent / "setup.py").is_file():
        return f"-e {shlex.quote(str(PACKAGE.parent))}"
    for installed in metadata.distributions(name="bomkern", path=[str(PACKAGE.parent)]):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        url, repository = origin.get("url", ""), origin.get("vcs_info")
        if repository:
            return f"{repository['vcs']}+{url}@{repository['commit_id']}"
        if url and not url.endswith(".whl"):
            return str(url)
    return f"--no-binary bomkern bomkern=={__version__}"


def build_again() -> str:
    """Return the command that builds bomkern for the torch that is imported, in backquotes."""
    # Without --no-cache-dir, pip would install the wheel that it built before, for the compiler and torch of that time.
    return f"`pip install --force-reinstall --no-deps --no-cache-dir {_source()}`"


def _described(version: str, cuda: str) -> str:
    return f"torch {version}" + (f" with CUDA {cuda}" if cuda and "+cu" not in version else "")


def why_other(built: str, cuda: str) -> str:
    """Return why kernels for this torch, and this CUDA unless it is empty, do not fit the torch that is imported.

    The answer is one sentence with what to install, or "" where they fit.
    """
    here, cuda_here = torch.__version__, torch.version.cuda or ""
    fits = built.split(".")[:2] == here.split(".")[:2] and (not cuda or cuda.split(".")[0] == cuda_here.split(".")[0])
    if not built or fits:
        return ""
    return (
        f"bomkern was built for {_described(built, cuda)} and this is {_described(here, cuda_here)}; install the wheel "
        f"of version {version_for(here, cuda and cuda_here)}, or build it here: {build_again()}"
    )
