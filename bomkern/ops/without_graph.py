"""Warn of goals that can own samples but have no graph, so that no parameter moves for them; no host sync."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.host_copy import HostCopy, capturing
from ..common.torch_internals import mark_constant, under_transform

log = logging.getLogger("bomkern")

LOOKS = 3  # calls that are checked: a loop that is right in these seldom changes
SITES = 64  # places in the code, told apart by their constraints, whose calls are checked


def columns_without(tensors: Sequence[Any]) -> int:
    """Return a bit mask of the tensors that need no gradient, or 0 if no goal needs any.

    In that case everything is frozen on purpose, or torch's own error says so. Goals that are None are absent; any
    other value that is no tensor, such as a `Lazy`, counts as one with a graph.
    """
    without, moves = 0, False
    for k, x in enumerate(tensors):
        if isinstance(x, Tensor) and not x.requires_grad:
            without |= 1 << k
        elif x is not None:
            moves = True
    return without if moves else 0


def warn(goals: Sequence[str], shares: Sequence[float] | None, watch: str = "") -> None:
    """Log the goals, with the share of the gradient that each has taken so far, if it is known."""
    each = list(goals)
    if shares is not None:
        each = [f"{name} (share {share:.2f} so far)" for name, share in zip(goals, shares, strict=True)]
    log.warning(
        "no gradient flows back from %s: samples that %s own%s move no parameter. Compute it with gradient if it was "
        "detached by mistake; leave it out%s if it is only watched, as an accuracy is",
        " and ".join(each),
        *(("it", "s") if len(each) == 1 else ("they", "")),
        watch,
    )


_looks: dict[tuple[int, int], int] = {}  # calls that were checked, by number of goals and identity of the constraints
_waiting: list[tuple[list[str], list[int], HostCopy]] = []  # one warning at most, whose shares are not on the host yet
_told = [False]


def check_call(goals: Sequence[Any], constraints: object, share: Callable[[], Tensor]) -> None:
    """Check a call of `min_goal_loss` with several tensors, once gradient is enabled; warn once per process.

    Args:
        share: computes the shares of this call, [K] on the device.
    """
    if torch.compiler.is_compiling():
        _trace(columns_without(goals))
        return
    if _told[0]:
        if _waiting:
            _tell()
        return
    site = (len(goals), id(constraints))
    looks = _looks.get(site, 0)
    if looks == LOOKS or (looks == 0 and len(_looks) == SITES) or under_transform():
        return
    _looks[site] = looks + 1
    if without := columns_without(goals):
        if capturing(goals[0].device):
            return
        at = [k for k in range(len(goals)) if without >> k & 1]
        _told[0] = True
        _waiting.append(([f"goals[{k}]" for k in at], at, HostCopy(share())))
        _tell()


def _tell() -> None:
    names, at, copy = _waiting[0]
    if copy.ready():
        shares = copy.wait().tolist()
        _waiting.clear()
        warn(names, [shares[k] for k in at])


def _trace(without: int) -> None:
    """Warn while a call is traced; torch.compile runs this function once, instead of tracing it."""
    if without and not _told[0]:
        _told[0] = True
        warn([f"goals[{k}]" for k in range(without.bit_length()) if without >> k & 1], None)


mark_constant(_trace)
