"""The compiled extension, bomkern._C, or the reason why it is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from . import schemas as schemas  # defines the ops whose kernels bomkern._C registers
from .built_for import build_again, recorded, why_other


def load() -> tuple[ModuleType | None, str]:
    """Return the compiled extension and "", or None and the reason."""
    build = recorded()
    # Before the import: a library for another torch may not load, or load and crash.
    if why := why_other(build.get("torch", ""), build.get("cuda", "")):
        return None, why
    try:
        module = importlib.import_module("bomkern._C")
    except ModuleNotFoundError:
        reason = build.get("not_compiled_because") or "install a C++ compiler."
        return (
            None,
            f"bomkern was installed without its compiled kernels: {reason} Then build it again: {build_again()}",
        )
    except ImportError as error:
        return None, f"the compiled kernels do not load ({error}); build bomkern again: {build_again()}"
    facts = module.build()  # the record may be of another library, such as one built in place
    if why := why_other(facts["torch"], facts["cuda"]):
        return None, why
    return module, ""


extension, missing = load()
