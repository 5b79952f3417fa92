"""Read data of the user in float64, a part at a time: tensors, NumPy arrays, and sequences of either or of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .devices import widest_float

PART = 2**22  # numbers in float64 at a time


def tensor_of(name: str, given: object) -> Tensor:
    """Return data as a tensor without gradient, in its own dtype.

    Raises:
        TypeError: it is neither a tensor, an array nor a sequence of numbers, or it is complex.
    """
    x = _tensor(name, given).detach()
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}: write .abs() or .real")
    return x


def _tensor(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given
    try:
        if hasattr(given, "__array__"):
            array = given.__array__()
            # A copy, because torch refuses negative strides and foreign byte orders, and warns of read-only memory.
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and len(given):
            if all(isinstance(part, Tensor) or hasattr(part, "__array__") for part in given):
                return torch.stack([_tensor(name, part) for part in given])
            numbers = torch.tensor(given, device="cpu")
            return torch.tensor(given, dtype=torch.float64, device="cpu") if numbers.is_floating_point() else numbers
    except (TypeError, ValueError, RuntimeError) as why:
        raise TypeError(f"{name} must hold numbers of one shape, got {type(given).__name__}: {why}") from None
    what = "an empty sequence" if isinstance(given, Sequence) and not len(given) else type(given).__name__
    raise TypeError(f"{name} must be a tensor, a NumPy array or a sequence of numbers, got {what}")


def samples_of(name: str, given: object, least: int = 1) -> Tensor:
    """Return data of at least ``least`` samples, [N, ...], as the user's loss sees it.

    Raises:
        TypeError: see `tensor_of`; or it holds bools or bytes, whose unit is not that of a loss.
        ValueError: it has no samples.
    """
    x = tensor_of(name, given)
    if x.dtype in (torch.bool, torch.uint8):
        fix = "write .float()" if x.dtype == torch.bool else "write x / 255 or x.float(), whichever the loss is given"
        raise TypeError(f"{name} must have the unit in which the loss is computed, got {x.dtype}: {fix}")
    if x.dim() == 0 or x.numel() == 0 or len(x) < least:
        few = f"{least} samples" if least > 1 else "one sample"
        raise ValueError(f"{name} must hold at least {few}, [N, ...], got shape {list(x.shape)}")
    return x


def in_float64(name: str, x: Tensor) -> Tensor:
    """Return x in float64, on the host if its device has none. Raises ValueError for a value that is not finite."""
    wide = (x if widest_float(x.device) == torch.float64 else x.cpu()).double()
    if not wide.isfinite().all():
        bad = wide[~wide.isfinite()]
        raise ValueError(f"{name} must be finite, got {float(bad[0])} in {len(bad)} places: leave those samples out")
    return wide


def columns_of(name: str, x: Tensor) -> Iterator[Tensor]:
    """Yield all samples of some outputs at a time, [N, m] float64."""
    for part in x.reshape(len(x), -1).split(max(1, PART // len(x)), 1):
        yield in_float64(name, part)


def rows_of(name: str, x: Tensor) -> Iterator[Tensor]:
    """Yield some samples at a time, [n, ...] float64."""
    for part in x.split(max(1, PART * len(x) // x.numel())):
        yield in_float64(name, part)


def counts_of_labels(name: str, given: object, ignore_index: int | None = None) -> tuple[Tensor, int]:
    """Return how often each label occurs, float64, and the largest label.

    Args:
        name: in errors.
        given: whole numbers of any shape, at least 0.
        ignore_index: a label that is left out.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: a label is negative, or none is left.
    """
    x = tensor_of(name, given)
    if x.is_floating_point() or x.dtype == torch.bool:
        fix = "write .long(), or .argmax(1) of class scores" if x.dtype != torch.bool else "use anchors.bce, or .long()"
        raise TypeError(f"{name} must be whole numbers, got {x.dtype}: {fix}")
    labels, counts = x.reshape(-1).to(torch.int64).unique(return_counts=True)
    if ignore_index is not None:
        kept = labels != ignore_index
        labels, counts = labels[kept], counts[kept]
    if not len(labels):
        raise ValueError(f"{name} must hold at least one label that is not ignored, got shape {list(x.shape)}")
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise ValueError(f"{name} must be at least 0, got {least}: ignore_index leaves one such label out")
    return in_float64(name, counts), most
