"""Test that subnormal numbers become zero before a product, since each would cost a CPU a hundred cycles.

The time is compared with the time under `torch.set_flush_denormal`, in turns, by the best of several runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import Anchored, GoalSet
from bomkern.dispatch import select

COMPILED = pytest.mark.skipif(select.extension is None, reason="not compiled")
LIMIT = 1.15  # largest ratio to the time with such numbers flushed; the bugs fixed here had ratios of 1.4 to 10
ROUNDS = 12
Step = Callable[[], tuple[Tensor, ...]]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run on one thread, whose mode `torch.set_flush_denormal` sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlation(spread: float, logvar: float, scale: float = 1.0) -> Step:
    """Return total correlation of a code whose posteriors lie ``spread`` apart; ``scale`` multiplies the loss."""
    mu = spread * normal(256, 64)
    inputs = [mu + math.exp(logvar / 2) * normal(256, 64, seed=1), mu, torch.full_like(mu, logvar)]
    inputs = [x.requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(scale * bomkern.total_correlation(*inputs).mean(), inputs)


def smooth(apart: float) -> Step:
    """Return a smooth minimum of nine goals, eight of them ``apart`` temperatures better than the worst."""
    goals = GoalSet({f"goal{k}": Anchored(0.0, 1.0) for k in range(9)}, temperature=0.01).eval()
    raw = {f"goal{k}": 0.1 * torch.rand(8192) + 0.01 * apart * (k == 0) for k in range(9)}
    raw = {name: x.requires_grad_() for name, x in raw.items()}
    return lambda: torch.autograd.grad(goals(raw).loss, list(raw.values()), materialize_grads=True)


def units(deviation: float) -> Step:
    """Return active units of a code whose dimensions vary far more than the threshold, at a small temperature."""
    mu = (deviation * normal(4096, 64)).requires_grad_()
    return lambda: torch.autograd.grad(bomkern.active_units(mu, threshold=40.0, temperature=0.05)[0], [mu])


def statistics(logvar: float) -> Step:
    """Return every statistic of a code whose log-variances are far below zero."""
    z, mu = normal(2048, 64), normal(2048, 64, seed=1)
    inputs = [x.requires_grad_() for x in (z, mu, normal(2048, 64, seed=2) * 0.1 + logvar)]

    def step() -> tuple[Tensor, ...]:
        found = bomkern.latent_statistics(*inputs)
        return torch.autograd.grad(found.kl.mean() + found.active + found.logvar_square.mean(), inputs)

    return step


CASES: dict[str, Step] = {
    "total correlation, apart": correlation(1.0, 0.0),
    "total correlation, far apart": correlation(3.0, -3.0),
    "total correlation, sharp": correlation(1.0, -8.0),
    "total correlation, a small loss": correlation(3.0, -3.0, scale=1e-9),
    "smooth minimum, 80 temperatures": smooth(80.0),
    "smooth minimum, 300 temperatures": smooth(300.0),
    "active units": units(6.0),
    "latent statistics": statistics(-90.0),
}


def seconds(step: Step) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


@COMPILED
@pytest.mark.parametrize("name", CASES)
def test_time_is_that_of_flushed_numbers(name: str, one_thread: None) -> None:
    step, best = CASES[name], {False: math.inf, True: math.inf}
    step()
    for _ in range(ROUNDS):
        for flush in best:
            torch.set_flush_denormal(flush)
            best[flush] = min(best[flush], *(seconds(step) for _ in range(3)))
    assert best[False] < LIMIT * best[True], best


@COMPILED
@pytest.mark.parametrize("name", CASES)
def test_gradients_hold_no_subnormal_number(name: str) -> None:
    """Subnormal numbers in a gradient would slow down the rest of backward, too."""
    for grad in CASES[name]():
        assert grad.isfinite().all()
        assert not ((grad != 0) & (grad.abs() < torch.finfo(grad.dtype).tiny)).any()


@COMPILED
def test_a_gradient_of_any_size_is_the_same_digits() -> None:
    """Multiplying the loss costs no digits, as long as the results themselves are in range."""
    plain = correlation(3.0, -3.0)()
    for power in (-70, -20, 30, 90):
        scaled = correlation(3.0, -3.0, scale=2.0**power)()
        for a, b in zip(plain, scaled, strict=True):
            want = a * 2.0**power
            normal_ones = want.abs() >= torch.finfo(want.dtype).tiny
            assert torch.equal(want[normal_ones], b[normal_ones])


@COMPILED
def test_float64_keeps_a_weight_as_long_as_it_is_a_normal_number() -> None:
    """A goal 700 temperatures behind the worst has weight 1e-304 and an accurate gradient."""
    constraints = {"worst": Anchored(0.0, 1.0), "far": Anchored(0.0, 1.0)}
    found = []
    for impl in ("cpu", "reference"):
        raw = {"worst": torch.tensor(0.75, dtype=torch.float64), "far": torch.tensor(0.05, dtype=torch.float64)}
        raw["far"].requires_grad_()
        goals = GoalSet(constraints, temperature=0.001, impl=impl).eval()
        found.append(torch.autograd.grad(goals(raw).loss, raw["far"])[0])
    assert 1e-306 < found[1].abs() < 1e-290
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0.0)
