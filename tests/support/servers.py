"""The implementations that serve each op on this machine, for parametrising tests."""

from __future__ import annotations

import pytest
import torch

import bomkern
from bomkern.dispatch import select

PAIRS = (
    ("reference", "cpu"),
    ("cpu", "cpu"),
    ("triton", "cpu"),
    ("cuda", "cuda"),
    ("triton", "cuda"),
    ("reference", "cuda"),
)


def why_skipped(op: str, impl: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU here"
    return select.why_not(op, impl, device)


def servers(op: str) -> list[object]:
    """Return the (impl, device) pairs that can serve here, for parametrize.

    tests/dispatch/test_info.py reports the others.
    """
    return [pytest.param(pair, id="-".join(pair)) for pair in PAIRS if why_skipped(op, *pair) is None]


def only_cpu(op: str) -> pytest.MarkDecorator:
    reason = select.why_not(op, "cpu", "cpu")
    return pytest.mark.skipif(reason is not None, reason=reason or "")


COMPILED = pytest.mark.skipif(bomkern.dispatch.select.extension is None, reason="not compiled")
