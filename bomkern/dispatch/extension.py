"""The compiled extension, bomkern._C, or the reason why it is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

from . import schemas as schemas  # defines the ops whose kernels bomkern._C registers

# Without --no-cache-dir, pip would install the wheel that it built before, for the compiler and torch of that time.
AGAIN = "reinstall bomkern: pip install --force-reinstall --no-deps --no-cache-dir"


def why_not_compiled() -> str:
    """Return the reason that setup.py wrote beside the Python files."""
    try:
        return Path(__file__).parents[1].joinpath("_not_compiled.txt").read_text().strip()
    except OSError:
        return "install a C++ compiler."


def load() -> tuple[ModuleType | None, str]:
    """Return the compiled extension and "", or None and the reason."""
    try:
        module = importlib.import_module("bomkern._C")
    except ModuleNotFoundError:
        return None, f"bomkern was installed without its compiled kernels: {why_not_compiled()} Then {AGAIN}"
    except ImportError as error:
        return None, f"the compiled kernels do not load ({error}); {AGAIN}"
    built, here = module.build()["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built.split(".")[:2] != here.split(".")[:2]:
        return None, f"bomkern was built for torch {built}, this is {here}; {AGAIN}"
    return module, ""


extension, missing = load()
