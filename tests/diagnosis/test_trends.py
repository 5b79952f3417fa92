"""Test the statistics of noisy series that the diagnosis uses."""

from __future__ import annotations

import math

import pytest
import torch

from bomkern.diagnosis.trends import BEST_T, ramp, rhythm, rise, smooth, stretches, trend
from tests.support.histories import noise


def test_trends_allow_for_noise_that_remembers_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    for memory, most in ((0.0, 0.05), (0.9, 0.12)):
        beyond = 0
        for _ in range(200):
            x, series = torch.zeros(()), []
            for e in torch.randn(300, generator=draw):
                x = memory * x + e
                series.append(x)
            beyond += abs(trend(torch.stack(series).double()).t) > 2.5
        assert beyond / 200 <= most, memory


def test_a_rhythm_has_its_period_and_noise_has_none() -> None:
    steps = torch.arange(500).double()
    wave = (torch.sin(2 * math.pi * steps / 29) > 0).double()
    assert rhythm(wave) == (29, pytest.approx(0.9, abs=0.1))
    period, regular = rhythm(wave + noise(0.5, 500).double())
    assert period == pytest.approx(29, abs=1) and 0.4 < regular < 0.6
    wave[100:140] = torch.nan
    assert rhythm(wave)[0] == pytest.approx(29, abs=1)
    assert rhythm(steps) == rhythm(torch.ones(500)) == rhythm(wave[:20]) == (0, 0)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.98])
def test_noise_that_keeps_its_value_has_no_rhythm(memory: float) -> None:
    draw = torch.Generator().manual_seed(0)
    kernel = memory ** torch.arange(400.0)
    for _ in range(100):
        e = torch.randn(899, generator=draw)
        series = torch.nn.functional.conv1d(e[None, None], kernel.flip(0)[None, None])[0, 0].double()
        for x in (series, (series > 0).double()):
            assert rhythm(x)[1] < 0.3


def test_trends_see_bent_rises_and_gaps() -> None:
    bent = torch.exp(torch.linspace(0, 5, 300).double())
    assert trend(bent).t == BEST_T and trend(-bent).t == -BEST_T
    line = torch.linspace(0, 1, 300).double() + noise(0.1, 300).double()
    line[40:90] = torch.nan
    assert trend(line).t > 6 and trend(line).change == pytest.approx(1, abs=0.15)
    assert trend(torch.ones(300).double()) == (0, 0) and trend(line[:8]) == (0, 0) and trend(line * torch.nan) == (0, 0)


def test_equal_values_do_not_rise_in_order_of_time() -> None:
    """Equal values count as ties.

    A flat side of a constraint or a saturated statistic holds the goal at one value until its last steps.
    """
    late = torch.cat([torch.zeros(280), torch.ones(20)]).double()
    assert abs(trend(late).t) < 4 and abs(trend(late.flip(0)).t) < 4 and trend(late.flip(0)).t < 0


def test_a_spike_does_not_blur_what_comes_after_it() -> None:
    series = torch.full((400, 2), 0.3).double()
    series[50, 0] = 1e22
    assert smooth(series, 13)[60:] == pytest.approx(0.3) and smooth(series, 13)[:, 1] == pytest.approx(0.3)
    assert smooth(series[:0], 13).shape == (0, 2)


def test_windows() -> None:
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1]).bool()
    assert stretches(mask) == [(1, 3), (4, 5), (8, 9)] and stretches(mask, 1) == [(1, 5), (8, 9)]
    assert rise(torch.tensor([3.0, 1, 2, 5, 0, 3])) == (1, 4)
    mean = smooth(torch.tensor([[1.0], [torch.nan], [3.0], [5.0]]), 3)
    assert mean[:, 0].tolist() == [1, 2, 4, 4]
    assert [ramp(x, 2, 4) for x in (1.0, 3.0, 5.0, math.nan)] == [0, 0.5, 1, 0] and ramp(1.0, 4, 2) == 1
