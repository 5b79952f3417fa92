"""The PEP 517 backend: setuptools, built against the torch of the environment that pip installs into.

pip builds in an isolated environment. If ``build-system.requires`` named torch, pip would fetch a second torch there.
Its version or CUDA could differ from the installed one, and the extension would be built against the wrong ABI. The
isolated build can still find the packages of the target environment. The backend therefore looks there first, and
requires torch only where there is none.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_ladder

try:
    import build_extension
    from setuptools import build_meta
except ImportError:
    raise SystemExit(
        "bomkern: a build without isolation needs setuptools>=77 in the environment: pip install 'setuptools>=77' "
        "ninja first, or leave --no-build-isolation out."
    ) from None


@functools.cache
def _target_path() -> list[str]:
    """Return this Python's package folders outside of the isolated build.

    They include the user's folder, and those of the system's Python where the environment sees them.
    """
    # pip sets these for an isolated build. The slice drops the current folder, which -c puts first.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    done = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
    return [str(folder) for folder in json.loads(done.stdout.splitlines()[-1])]


def _see_target() -> str:
    """Append the target environment's packages to sys.path, and return the version of its torch, empty without one."""
    sys.path.extend(folder for folder in _target_path() if folder not in sys.path)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    version = re.search(r"__version__ = ['\"]([^'\"]+)", Path(spec.origin).with_name("version.py").read_text())
    return version[1] if version else "of an unknown version"


def _requires(config_settings: Any = None) -> list[str]:
    if version := _see_target():
        build_extension.refuse_old_torch(version)
        return []
    # Without a compiler torch is not needed, and its download takes gigabytes.
    return [] if build_ladder.why_no_compiler() else [build_extension.TORCH]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def _with_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook so that setup.py, which imports torch to compile, finds the target environment's."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        _see_target()
        return hook(*args, **kwargs)

    return run


def _normalise(path: Path) -> None:
    """Rewrite an sdist without its builder's identity, and without the build time if SOURCE_DATE_EPOCH is set."""
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
    # Stale modules of an earlier build would be packed too. Temporary files, with torch's headers, take 400 MB.
    for folder in [*Path("build").glob("lib*"), *Path("build").glob("temp*")]:
        shutil.rmtree(folder)
    name: str = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return name


get_requires_for_build_wheel = get_requires_for_build_editable = _requires
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_editable = _with_torch(build_meta.build_editable)
