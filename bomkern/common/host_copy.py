"""Asynchronous copies of tensors to the host, which waits for the values only when it reads them."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured: the host can then neither wait nor copy from unpinned memory."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """A copy of the current values of a tensor.

    From a CUDA device it goes into pinned memory behind an event, and only `wait` waits. From any other device it is a
    plain copy, for which the constructor waits.
    """

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if source.device.type != "cuda":
            # Never the source itself, which may be written to. A clone stays on the device.
            self._host = source.clone() if source.device.type == "cpu" else source.cpu()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(source.device))  # the stream of the copy, whichever GPU is current

    def ready(self) -> bool:
        """Return whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
