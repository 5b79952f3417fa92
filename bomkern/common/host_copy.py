"""A tensor's values on their way to the host, which does not wait for them until it reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured there: then the host can neither wait nor send what is not pinned."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """The values that a tensor has now: from a GPU into pinned memory behind an event, else a plain copy."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if source.device.type != "cuda":
            # Never the source itself, which may be written to; a clone is no copy between devices.
            self._host = source.clone() if source.device.type == "cpu" else source.cpu()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(source.device))  # the copy's, whichever GPU is current

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
