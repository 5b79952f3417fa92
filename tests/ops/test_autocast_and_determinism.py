"""Test every op under autocast, GradScaler, another default dtype, and deterministic algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    GoalSet,
    Minimize,
    Upper,
    active_units,
    consistency_variance,
    covariance_penalty,
    gaussian_kl,
    gaussian_total_correlation,
    latent_statistics,
    min_goal_loss,
    total_correlation,
)
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("gaussian_kl"))
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
Call = Callable[..., Any]


def goal_set(z: Tensor, mu: Tensor, logvar: Tensor, impl: str | None) -> Tensor:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 2.0), c=Upper(0.0, 1.0), temperature=0.1, impl=impl)
    return goals.to(z.device)({"a": z[:, 0], "b": mu[:, 1], "c": logvar[:, 2]}).loss


CALLS: dict[str, Call] = {
    "min_goal_loss": lambda z, mu, logvar, impl: min_goal_loss(
        [z[:, 0], mu[:, 1], logvar[:, 0]], [Minimize(0.5), Minimize(1.0), Upper(0.2, 0.3)], impl=impl
    ),
    "GoalSet": goal_set,
    "total_correlation": lambda z, mu, logvar, impl: total_correlation(z, mu, logvar, impl=impl),
    "total_correlation, parts": lambda *x: total_correlation(*x[:3], parts=True, impl=x[3]),
    "gaussian_kl": lambda z, mu, logvar, impl: gaussian_kl(mu, logvar, impl=impl),
    "consistency_variance": lambda z, mu, logvar, impl: consistency_variance([z, mu], impl=impl),
    "covariance_penalty": lambda z, mu, logvar, impl: covariance_penalty(z, normalize=True, impl=impl),
    "active_units": lambda z, mu, logvar, impl: active_units(mu, impl=impl),
    "latent_statistics": lambda z, mu, logvar, impl: latent_statistics(z, mu, logvar, impl=impl),
    "gaussian_total_correlation": lambda z, mu, logvar, impl: gaussian_total_correlation(z),
}
EACH = pytest.mark.parametrize("name", CALLS)


def results(name: str, given: Any, impl: str | None) -> list[Tensor]:
    out = CALLS[name](*given, impl)
    return [out] if isinstance(out, Tensor) else list(out)


def codes(device: str, *dtypes: torch.dtype) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    made = [torch.randn(24, 4, generator=source, dtype=torch.float32) for _ in range(3)]
    made[2] = 0.3 * made[2] - 0.5
    return [x.to(device=device, dtype=dtype).requires_grad_() for x, dtype in zip(made, dtypes, strict=True)]


@EACH
@HALVES
@IMPLS
def test_autocast(server: tuple[str, str], half: torch.dtype, name: str) -> None:
    """Results under autocast are bitwise those outside, for the mixed dtypes that a model under autocast gives."""
    impl, device = server
    single, double = torch.float32, torch.float64
    for dtypes in ((half,) * 3, (half, single, half), (single, half, single), (single,) * 3, (half, double, single)):
        x = codes(device, *dtypes)
        want = results(name, x, impl)
        with torch.autocast(device, dtype=half):
            got = results(name, x, impl)
        for out in (got, want):
            out += torch.autograd.grad(sum(a.double().sum() for a in out), x, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
        assert all(g is None or g.dtype == t.dtype for g, t in zip(got[-3:], x, strict=True))


@EACH
@HALVES
@IMPLS
def test_halves_are_converted_inside(server: tuple[str, str], half: torch.dtype, name: str) -> None:
    """Half inputs give bitwise the results of their float32 copies, in float32."""
    impl, device = server
    x = codes(device, half, half, half)
    for a, b in zip(results(name, x, impl), results(name, [t.float() for t in x], impl), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@EACH
@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_default_dtype(server: tuple[str, str], dtype: torch.dtype, name: str, double_by_default: None) -> None:
    impl, device = server
    got = results(name, codes(device, dtype, dtype, dtype), impl)
    torch.set_default_dtype(torch.float32)
    want = results(name, codes(device, dtype, dtype, dtype), impl)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b)


@EACH
@IMPLS
def test_deterministic_algorithms(server: tuple[str, str], name: str) -> None:
    impl, device = server
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = codes(device, *[torch.float32] * 3)
            out = results(name, x, impl)
            runs.append([*out, *torch.autograd.grad(sum(a.sum() for a in out), x, allow_unused=True)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_grad_scaler() -> None:
    """If a scaled gradient overflows, the scaler skips the step and the goals take it back."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), spill=0.5)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)

    def step(scale: float) -> None:
        y = net(torch.ones(8, 4))
        out = goals({"a": y[:, 0] ** 2, "b": y[:, 1].abs()})
        optimizer.zero_grad()
        scaler.scale(out.loss * scale).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        goals.accept(torch.tensor(scaler.get_scale() >= before))

    step(1.0)
    weights, average = net.weight.detach().clone(), goals.average.clone()
    step(1e38)
    assert torch.equal(net.weight, weights) and torch.equal(goals.average, average)
    assert goals.history["finite"].tolist() == [1, 0]
    step(1.0)
    assert not torch.equal(net.weight, weights)
