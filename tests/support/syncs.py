"""A count of the ops for which the host waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bomkern.common.torch_internals import TorchDispatchMode


class CountSyncs(TorchDispatchMode):
    """Count the calls that would make the host wait for a device."""

    syncs = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        to_host = name in ("_to_copy", "copy_") and str((kwargs or {}).get("device", "")) == "cpu"
        if name in self.syncs or to_host:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))
