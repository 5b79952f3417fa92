"""Test active_units: every implementation against the reference in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bomkern import active_units
from tests.support.servers import only_cpu, servers
from tests.support.statistics import (
    LARGE,
    LAYOUTS,
    PULLS,
    SHAPES,
    Inputs,
    check,
    check_far,
    check_places,
    check_same_bits,
    codes,
    leaves,
    run,
    shuffled,
)

IMPLS = pytest.mark.parametrize("server", servers("active_units"))
ACTIVE, EFFECTIVE = (0,), (1,)
FIELDS = pytest.mark.parametrize("fields", [None, ACTIVE, EFFECTIVE], ids=["both", "active", "effective"])


def means(batch: int, dims: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return codes(batch, dims, dtype)[1:2]


@IMPLS
@FIELDS
@pytest.mark.parametrize(("batch", "dims"), SHAPES)
def test_oracle(server: tuple[str, str], batch: int, dims: int, fields: tuple[int, ...] | None) -> None:
    # A single dimension is always 1 effective dimension, so its gradient is pure rounding.
    check(active_units, means(batch, dims), server, fields=fields, unit=1e-2 if dims == 1 else 0.0)


@IMPLS
@FIELDS
@pytest.mark.parametrize(("batch", "dims"), LARGE)
def test_larger_than_every_tile(server: tuple[str, str], batch: int, dims: int, fields: tuple[int, ...] | None) -> None:
    check(active_units, means(batch, dims), server, fields=fields)


@IMPLS
@FIELDS
@pytest.mark.parametrize(("threshold", "temperature"), [(0.01, 0.001), (1.0, 2.0), (-0.5, 0.3), (1e-3, 1e-4), (0, 1)])
def test_threshold_and_temperature(
    server: tuple[str, str], threshold: float, temperature: float, fields: tuple[int, ...] | None
) -> None:
    call = functools.partial(active_units, threshold=threshold, temperature=temperature)
    # The sigmoid multiplies a variance's rounding error by 1 / temperature.
    check(call, means(50, 40), server, fields=fields, slack=1e-6 + 1e-7 / temperature)


@IMPLS
def test_a_cold_threshold_is_a_step(server: tuple[str, str]) -> None:
    """Far from the threshold, exp overflows: the results are 0 and 1, without gradient."""
    impl, device = server
    scale = torch.tensor([1e-3, 1e-2, 10.0, 100.0])
    inputs = leaves((means(50, 4)[0].sign() * scale,), device=device)
    call = functools.partial(active_units, threshold=1.0, temperature=1e-3)
    (active, _), (grad,) = run(call, inputs, impl, fields=ACTIVE)
    assert active == 0.5 and not grad.any()


@IMPLS
@FIELDS
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_dtypes(server: tuple[str, str], half: torch.dtype, fields: tuple[int, ...] | None) -> None:
    check(active_units, means(20, 21, half), server, fields=fields)


@IMPLS
def test_float64(server: tuple[str, str]) -> None:
    for fields in (None, ACTIVE, EFFECTIVE):
        check(active_units, means(70, 9, torch.float64), server, slack=1e-13, fields=fields)


@IMPLS
@FIELDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, fields: tuple[int, ...] | None) -> None:
    # Equal columns have the largest effective fraction, where the gradient is 0 but for rounding.
    check(
        active_units, means(37, 12), server, lay=LAYOUTS[layout], fields=fields, unit=0.1 if "for all" in layout else 0
    )


@IMPLS
@pytest.mark.parametrize("pull", ["sum", "offset"])
def test_gradients_from_above(server: tuple[str, str], pull: str) -> None:
    """Pull either result or both, by tensors that are expanded or begin inside a storage."""
    for fields in (None, ACTIVE, EFFECTIVE):
        check(active_units, means(40, 12), server, pull=PULLS[pull], fields=fields)


@IMPLS
def test_each_fields_gradient_is_its_own(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(means(40, 12), device=device)
    both = run(lambda mu, impl: sum(active_units(mu, impl=impl)), inputs, impl)[1][0]  # type: ignore[arg-type]
    parts = [run(active_units, inputs, impl, fields=fields, pull=PULLS["sum"])[1][0] for fields in (ACTIVE, EFFECTIVE)]
    assert torch.allclose(both, -(parts[0] + parts[1]), rtol=1e-4, atol=1e-7)  # one incoming gradient is -1
    assert not torch.allclose(parts[0], parts[1], rtol=0.1)


@IMPLS
def test_gradcheck(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(means(6, 4, torch.float64), device=device)
    assert torch.autograd.gradcheck(functools.partial(active_units, impl=impl), inputs)
    soft = functools.partial(active_units, threshold=0.5, temperature=1.5, impl=impl)
    assert torch.autograd.gradcheck(soft, inputs)


@IMPLS
def test_far_from_zero(server: tuple[str, str]) -> None:
    mu = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) + 1e4
    check_far(functools.partial(active_units, threshold=1.0), (mu,), server)


@IMPLS
@FIELDS
def test_far_from_zero_in_float64(server: tuple[str, str], fields: tuple[int, ...] | None) -> None:
    """At 1e8 deviations from zero, over several blocks of rows, differences from the first value stay exact."""
    check(active_units, (means(300, 9, torch.float64)[0] + 1e8,), server, fields=fields, slack=1e-12)


@IMPLS
@FIELDS
def test_an_outlier_in_the_first_row(server: tuple[str, str], fields: tuple[int, ...] | None) -> None:
    """An outlier in the first row keeps its precision.

    The squared differences from it sum to about B times its square, and the variance is a B-th of that.
    """
    mu = means(3000, 24)[0].clone()
    mu[0] += torch.linspace(500, 1500, 24)
    call = functools.partial(active_units, threshold=500.0, temperature=200.0)
    check(call, (mu,), server, fields=fields, slack=1e-5)


@IMPLS
def test_collapsed_code(server: tuple[str, str]) -> None:
    """Without varying dimensions, none is effective, active is the sigmoid at 0, and there is no gradient.

    With one varying dimension, effective is 1/D.
    """
    impl, device = server
    for value in (0.0, 0.1, -1e4):
        for batch in (2, 3, 1000):
            collapsed = leaves((torch.full((batch, 5), value),), device=device)
            (active, effective), (grad,) = run(active_units, collapsed, impl)
            assert effective == 0 and not grad.any()
            assert active.item() == pytest.approx(1 / (1 + math.exp(2)), rel=1e-5)
            assert not run(active_units, collapsed, impl, fields=EFFECTIVE)[1][0].any()
    one = torch.full((100, 5), 0.1)
    one[:, 3] = torch.linspace(-2, 5, 100)
    (_, effective), (grad,) = run(active_units, leaves((one,), device=device), impl)
    assert effective.item() == pytest.approx(0.2, rel=1e-6) and grad.isfinite().all()
    assert not grad[:, [0, 1, 2, 4]].any()  # a constant column's gradient is exactly 0
    check(active_units, (one,), server)


@IMPLS
def test_nan_takes_its_column_and_what_is_shared(server: tuple[str, str]) -> None:
    for number in (torch.nan, torch.inf):
        where = {(0, 3, 2): number}
        *values, grad = check_places(active_units, means(40, 6), server, {(0, 3, 2): torch.nan})
        assert all(values) and grad.all()
        *_, grad = check_places(active_units, means(40, 6), server, where, fields=ACTIVE)
        assert grad[:, 2].all() and grad.sum() == 40
        *_, grad = check_places(active_units, means(40, 6), server, where, fields=EFFECTIVE)
        assert grad.all()


@only_cpu("active_units")
@pytest.mark.parametrize(("batch", "dims"), [(5000, 70), (40, 3000), (3, 4), (50_000, 1)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int) -> None:
    check_same_bits(active_units, means(batch, dims))


@IMPLS
@settings(max_examples=25)
@given(batch=st.integers(2, 40), dims=st.integers(1, 12), power=st.integers(-8, 8), seed=st.integers(0, 99))
def test_properties(server: tuple[str, str], batch: int, dims: int, power: int, seed: int) -> None:
    """Both results stay within their bounds.

    Order, shifts and signs do not matter. Units do not change the effective fraction.
    """
    impl, device = server
    call = functools.partial(active_units, impl=impl)
    (mu,) = (x.to(device) for x in means(batch, dims))
    active, effective = call(mu)
    assert active.shape == effective.shape == ()
    assert 0 <= active <= 1 + 1e-6 and 1 / dims - 1e-6 <= effective <= 1 + 1e-6
    close = {"rtol": 1e-4, "atol": 1e-6}

    def same(other: torch.Tensor) -> None:
        for a, b in zip(call(other), (active, effective), strict=True):
            assert torch.allclose(a, b, **close)

    same(mu[shuffled(batch, seed, device)])
    same(mu[:, shuffled(dims, seed, device)])
    same(mu + torch.linspace(-8, 8, dims, device=device))
    same(
        mu * torch.linspace(-1, 1, dims, device=device).sign().where(torch.arange(dims, device=device) != dims // 2, 1)
    )
    unit = 2.0**power
    scaled = call(mu * unit, 0.1 * unit**2, 0.05 * unit**2)
    assert torch.allclose(scaled[0], active, **close)
    assert torch.allclose(call(mu * unit)[1], effective, **close)
    # Columns that vary alike are all effective; idle columns beside them are not.
    alike = mu[:, :1].expand(batch, dims)
    assert call(alike)[1].item() == pytest.approx(1, rel=1e-5)
    idle = torch.cat([alike, torch.zeros_like(mu)], 1)
    assert call(idle)[1].item() == pytest.approx(0.5, rel=1e-5)
    variance = mu.double().var(0)
    want = torch.sigmoid((variance - 0.1) / 0.05).mean()
    assert torch.allclose(active.double(), want, rtol=1e-4)
    p = torch.distributions.Categorical(probs=variance)
    assert torch.allclose(effective.double(), p.entropy().exp() / dims, rtol=1e-4)
