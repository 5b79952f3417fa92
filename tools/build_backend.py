"""The PEP 517 backend: setuptools, built against the torch of the environment that pip installs into.

pip builds in an isolated environment. Were torch named in ``build-system.requires``, pip would fetch a second torch, of
another version or CUDA than the one installed, and the extension would be built against the wrong ABI. The isolated
build still knows where the target environment keeps its packages, so we look there first, and ask for a torch of our
own only where there is none.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

from setuptools import build_meta

TORCH = "torch>=2.11,<2.14"


def _see_target() -> bool:
    """Put the target environment's packages at the end of sys.path; whether there is a torch."""
    for key in ("purelib", "platlib"):
        folder = sysconfig.get_paths()[key]
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.util.find_spec("torch") is not None


def _requires(config_settings: Any = None) -> list[str]:
    return [] if _see_target() else [TORCH]


def _with_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    """setup.py imports torch, and every one of these hooks runs it."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        _see_target()
        return hook(*args, **kwargs)

    return run


get_requires_for_build_wheel = get_requires_for_build_editable = _requires
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
get_requires_for_build_sdist = _requires
build_sdist = _with_torch(build_meta.build_sdist)
