"""PyTorch ops, fakes and autograd of the Triton implementations, one file per op.

Import it only if impl "triton" is requested. It imports triton itself at the first call, because that may initialize a
driver.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ..schemas import OPS
from .launcher import why_not as why_not

# The function of each op that has a file here. The function replaces the module of the same name.
served: dict[str, Callable[..., Any]] = {
    op: getattr(importlib.import_module(f"{__name__}.{op}"), op)
    for op in OPS
    if importlib.util.find_spec(f"{__name__}.{op}") is not None
}
globals().update(served)
