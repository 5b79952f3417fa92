"""The Triton implementations' bridge to PyTorch, a file for each op: its ops, fakes and autograd.

Import it only where impl "triton" is asked for. It imports triton itself no sooner than the first call, because that
may touch a driver.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ..schemas import OPS
from .launcher import why_not as why_not

# The function of each op that has a file here. Each name is from now on the function, not its module.
served: dict[str, Callable[..., Any]] = {
    op: getattr(importlib.import_module(f"{__name__}.{op}"), op)
    for op in OPS
    if importlib.util.find_spec(f"{__name__}.{op}") is not None
}
globals().update(served)
