"""Test every op on Triton's interpreter in a few sizes; the slow tests of each op run many more."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.processes import run_tests
from tests.support.statistics import OPS

FILES = ("min_goal", "goal_set", "goal_set_multipliers", "total_correlation", "total_correlation_parts", *OPS)
# Sizes as in the test ids: goals in batches of one sample and of more than a warp, wide and high matrices.
SIZES = ("raw-17-", "scores-64-", "raw-1-", "17-0.05-", "1-0.0-", "17-", "33-5-", "7-1-", "65-17-", "17-65-", "2-3-")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_op_agrees_with_its_definition() -> None:
    tests = " ".join(f"tests/ops/test_{name}.py::test_oracle" for name in FILES)
    sizes = " or ".join(f"test_oracle[{size}" for size in SIZES)
    run_tests(tests, f"triton-cpu and ({sizes})", TRITON_INTERPRET="1")
