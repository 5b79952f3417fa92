"""The reductions of a batch's losses to one loss, and their codes in the kernels."""

from __future__ import annotations

from enum import IntEnum


class Reduction(IntEnum):
    """A code of an op's argument ``reduction``; kernels/min_goal/min_goal.h has the same."""

    NONE = 0  # a loss for each sample
    MEAN = 1
    SUM = 2
    MIN = 3  # the loss of the worst sample


# Codes by the names that users give. They are plain ints: torch.export writes arguments of ops as source text.
REDUCTIONS = {reduction.name.lower(): int(reduction) for reduction in Reduction}
