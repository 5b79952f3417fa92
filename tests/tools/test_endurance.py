"""Test a short run of tests/endurance.py: no leaks, planted batches are rejected, implementations agree."""

from __future__ import annotations

import pytest
import torch

from tests import endurance


@pytest.mark.slow
def test_a_run_of_every_op_leaks_nothing_and_drifts_nowhere() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = endurance.run(800)
    finally:
        torch.set_num_threads(threads)
    assert found["rejected"] == found["planted"] == 8
    assert found["slope_a_step"]["handles"] == found["slope_a_step"]["threads"] == 0
    assert found["slope_a_step"]["resident"] < 20_000  # a leaked graph of one step would be larger
    for impl, apart in found["learnt_apart"].items():
        assert apart < 1e-5, impl
        for name, errors in found["errors"][impl].items():
            assert max(errors) < 2e-5, (impl, name, errors)


def test_the_slope_is_that_of_what_grows() -> None:
    assert endurance.slope([(k, 7) for k in range(0, 100, 5)]) == 0
    assert endurance.slope([(k, 1000 + 3 * k + 500 * (k < 50)) for k in range(0, 100, 5)]) == pytest.approx(3)
