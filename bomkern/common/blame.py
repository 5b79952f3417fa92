"""Texts of errors: which of several inputs is at fault, and what to write instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAST_BATCH = "use a larger batch, and drop_last=True if it was the last one of a DataLoader"
TOO_MANY = "pass the mean of similar goals as one goal, or make two losses and add them"
RAGGED = 'take .mean() of each, or use GoalSet(..., spill="auto"), which needs only means'


def odd_one(values: Sequence[object]) -> tuple[int, int, bool]:
    """Return the index of a value that differs, that of one that it differs from, and whether most equal the latter.

    If no value is that of the majority, the first value counts as right.
    """
    counts = [sum(bool(value == other) for other in values) for value in values]
    most = 2 * max(counts) > len(values)
    right = counts.index(max(counts)) if most else 0
    return next(k for k, value in enumerate(values) if value != values[right]), right, most


def odd_length(lengths: Sequence[int]) -> tuple[int, int, bool]:
    """Return `odd_one` of the lengths of goals; without a majority one sample, or a flattened goal, is at fault."""
    odd, right, most = odd_one(lengths)
    a, b = lengths[odd], lengths[right]
    if not most and (b == 1 or (a > 1 and b > a and b % a == 0)):
        odd, right = right, odd
    return odd, right, most


def samples(count: int) -> str:
    return f"{count} sample" + "s" * (count != 1)


def length_fix(length: int, batch: int) -> str:
    """Return what to write for a goal of another length than the batch."""
    if length == 1:
        return "write .squeeze(0), which makes it one value for the whole batch"
    if batch > 1 and length > batch and length % batch == 0:
        return f"write .view({batch}, -1).mean(1) if each sample has {length // batch} values; if not, {RAGGED}"
    return RAGGED


def goal_fix(shape: Sequence[int], batch: int | None = None) -> str:
    """Return what to write for a goal of several dimensions, beside goals of ``batch`` samples."""
    if len(shape) > 2:
        return "write .flatten(1).mean(1)"
    if shape[1] == 1:
        return "write .squeeze(1)"
    if shape[0] == 1:
        return "write .squeeze(0)"
    if batch == shape[1] and batch != shape[0]:
        return "write .mean(0)"
    return "write .mean(1), or (x * w).sum(1) / w.sum(1) with a mask or weights w of the same shape"


def matrix_fix(shape: Sequence[int]) -> str:
    """Return what to write for a code that is not [B, D]."""
    if len(shape) == 3:
        return "write .flatten(0, 1), which makes each position a sample"
    if len(shape) > 3:
        return "write .flatten(1), or .movedim(1, -1).flatten(0, -2) to make each position a sample"
    return "write .unsqueeze(1) if it has one dimension" if len(shape) == 1 else "it needs samples and dimensions"


def tensor_fix(value: object) -> str:
    """Return ": " and what to write for a value that is not a tensor, or "" for a value of an unknown kind."""
    if isinstance(value, (int, float)):
        return f": write torch.tensor({float(value)}, device=...)"
    if type(value).__module__.partition(".")[0] == "numpy":
        return ": write torch.as_tensor(x, dtype=torch.float32, device=...)"
    if isinstance(value, (list, tuple)):
        stacked = value and all(isinstance(part, Tensor) for part in value)
        return ": write torch.stack(x)" if stacked else ": write torch.tensor(x, device=...)"
    return ""


def dtype_fix(dtype: torch.dtype) -> str:
    return "write .abs() or .real" if dtype.is_complex else "write .float()"


def number_fix(value: object) -> str:
    """Return ": " and what to write for a tensor where a number is needed, "" for anything else."""
    return ": write .item(), which waits for the device" if isinstance(value, Tensor) else ""
