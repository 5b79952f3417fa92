"""The PEP 517 backend: setuptools, built against the torch of the environment that pip installs into.

pip builds in an isolated environment. Were torch named in ``build-system.requires``, pip would fetch a second torch, of
another version or CUDA than the one installed, and the extension would be built against the wrong ABI. The isolated
build still knows where the target environment keeps its packages, so we look there first, and ask for a torch of our
own only where there is none.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import os
import shutil
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from setuptools import build_meta
except ImportError:
    raise SystemExit(
        "bomkern: a build without isolation needs setuptools>=77 in the environment: pip install 'setuptools>=77' "
        "ninja first, or leave --no-build-isolation out."
    ) from None

TORCH = "torch>=2.11,<2.14"


def _see_target() -> bool:
    """Put the target environment's packages at the end of sys.path; whether there is a torch."""
    for key in ("purelib", "platlib"):
        folder = sysconfig.get_paths()[key]
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.util.find_spec("torch") is not None


def _compiler() -> str | None:
    """As in setup.py: where there is none, nothing is built, and gigabytes of torch would be fetched for it."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def _requires(config_settings: Any = None) -> list[str]:
    return [] if _see_target() or _compiler() is None else [TORCH]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def _with_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    """setup.py imports torch, and every one of these hooks runs it."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        _see_target()
        return hook(*args, **kwargs)

    return run


def _normalise(path: Path) -> None:
    """Rewrite an sdist so that it tells nothing of who built it, nor when where SOURCE_DATE_EPOCH is set."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"]) if os.environ.get("SOURCE_DATE_EPOCH") else None
    out = io.BytesIO()
    with (
        tarfile.open(path) as old,
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.mtime = int(member.mtime) if epoch is None else epoch
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    path.write_bytes(out.getvalue())


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    name: str = build_meta.build_sdist(sdist_directory, config_settings)
    _normalise(Path(sdist_directory, name))
    return name


@_with_torch
def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    for folder in Path("build").glob("lib*"):  # modules that an earlier build left there would be packed too
        shutil.rmtree(folder)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


get_requires_for_build_wheel = get_requires_for_build_editable = _requires
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
build_editable = _with_torch(build_meta.build_editable)
