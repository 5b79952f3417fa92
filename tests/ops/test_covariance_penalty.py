"""Test covariance_penalty: every implementation against the reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bomkern
from bomkern import covariance_penalty
from tests.support.servers import only_cpu, servers
from tests.support.statistics import (
    LARGE,
    LAYOUTS,
    PULLS,
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

IMPLS = pytest.mark.parametrize("server", servers("covariance_penalty"))
Penalty = Callable[..., Tensor]
CALLS = {
    "covariance": covariance_penalty,
    "correlation": functools.partial(covariance_penalty, normalize=True),
    "covariance of the batch": functools.partial(covariance_penalty, reduction="batch"),
    "correlation of the batch": functools.partial(covariance_penalty, normalize=True, reduction="batch"),
}
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=[name.replace(" of the ", "-") for name in CALLS])
# D < B, D = B and D > B, on both sides of a vector's width and of a GEMM's tile.
SHAPES = [(2, 1), (2, 2), (3, 2), (2, 3), (7, 1), (16, 16), (33, 5), (5, 33), (65, 17), (17, 65), (130, 300), (1030, 9)]


def sample(batch: int, dims: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return correlated columns of different units, some of them nearly constant."""
    own = codes(batch, dims, torch.float64)[0]
    return ((own + 0.5 * own.roll(1, 1) + torch.linspace(-3, 3, dims, dtype=torch.float64)).to(dtype),)


def size_of(inputs: Inputs, call: Penalty) -> float:
    """Return the magnitude of the sums that may cancel.

    With D > B the diagonal cancels. Two samples correlate by 1, so everything cancels.
    """
    x = inputs[0].double() - inputs[0].double().mean(0)
    if getattr(call, "keywords", {}).get("normalize"):
        deviation = x.std(0)
        return 1 / deviation[deviation > 0].min().item() if len(x) == 2 else float(x.shape[1] > x.shape[0])
    return x.var(0).square().mean().item() if x.shape[1] > x.shape[0] else 0.0


def verify(call: Penalty, inputs: Inputs, server: tuple[str, str], slack: float = 2e-6, **how: object) -> None:
    check(call, inputs, server, slack=slack, unit=size_of(inputs, call), **how)  # type: ignore[arg-type]


@IMPLS
@EACH
@pytest.mark.parametrize(("batch", "dims"), SHAPES)
def test_oracle(server: tuple[str, str], batch: int, dims: int, call: Penalty) -> None:
    verify(call, sample(batch, dims), server)


@IMPLS
@EACH
@pytest.mark.parametrize(("batch", "dims"), [LARGE[0], LARGE[1], (5, 700), (700, 701), (300, 299)])
def test_larger_than_every_tile(server: tuple[str, str], batch: int, dims: int, call: Penalty) -> None:
    verify(call, sample(batch, dims), server)


@IMPLS
@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(server: tuple[str, str], dtype: torch.dtype, call: Penalty) -> None:
    verify(call, sample(20, 12, dtype), server)
    verify(call, sample(12, 20, dtype), server)


@IMPLS
@EACH
def test_float64(server: tuple[str, str], call: Penalty) -> None:
    for batch, dims in ((70, 9), (9, 70)):
        verify(call, sample(batch, dims, torch.float64), server, slack=1e-13)


@IMPLS
@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, call: Penalty) -> None:
    for batch, dims in ((37, 12), (12, 37)):
        # Equal rows are constant columns, which leave only rounding.
        unit = 1.0 if "for all" in layout else size_of(sample(batch, dims), call)
        check(call, sample(batch, dims), server, lay=LAYOUTS[layout], slack=2e-6, unit=unit)


@IMPLS
@EACH
@pytest.mark.parametrize("pull", PULLS)
def test_gradients_from_above(server: tuple[str, str], pull: str, call: Penalty) -> None:
    for batch, dims in ((40, 12), (12, 40), (1030, 8)):
        verify(call, sample(batch, dims), server, pull=PULLS[pull])


@IMPLS
@EACH
def test_weights_of_a_bottleneck_rule(server: tuple[str, str], call: Penalty) -> None:
    """Most samples have another bottleneck, so their weight is 0."""
    for batch, dims in ((40, 12), (12, 40)):

        def few(value: Tensor) -> Tensor:
            return torch.where(torch.arange(value.numel(), device=value.device) % 5 == 0, 1.0, 0.0).reshape(value.shape)

        verify(call, sample(batch, dims), server, pull=few)


@IMPLS
@EACH
def test_gradcheck(server: tuple[str, str], call: Penalty) -> None:
    impl, device = server
    for batch, dims in ((6, 3), (3, 6), (4, 4)):
        inputs = leaves(sample(batch, dims, torch.float64), device=device)
        assert torch.autograd.gradcheck(functools.partial(call, impl=impl), inputs)


@IMPLS
@EACH
def test_far_from_zero(server: tuple[str, str], call: Penalty) -> None:
    for batch, dims in ((300, 24), (24, 300)):
        (z,) = sample(batch, dims)
        check_far(call, (z / z.std(0) + 1e4,), server)


@IMPLS
@EACH
def test_far_from_zero_in_float64(server: tuple[str, str], call: Penalty) -> None:
    """At 1e8 deviations from zero, over several blocks of rows, differences from the first value stay exact."""
    for batch, dims in ((300, 9), (40, 90)):
        verify(call, (sample(batch, dims, torch.float64)[0] + 1e8,), server, slack=1e-11)


@IMPLS
@EACH
def test_an_outlier_in_the_first_row(server: tuple[str, str], call: Penalty) -> None:
    for batch, dims in ((3000, 24), (24, 100)):
        (z,) = sample(batch, dims)
        z[0] += torch.linspace(500, 1500, dims)
        verify(call, (z,), server, slack=1e-5)


@IMPLS
@EACH
def test_constant_columns(server: tuple[str, str], call: Penalty) -> None:
    """Constant columns do not change the others' penalty, and their gradient is exactly 0."""
    impl, device = server
    for batch, dims in ((40, 8), (8, 24)):
        (z,) = sample(batch, dims)
        z[:, 2], z[:, 5], z[:, 7] = 0.1, 0.0, -12345.678
        constant = torch.zeros(dims, dtype=torch.bool)
        constant[[2, 5, 7]] = True
        (value,), (grad,) = run(call, leaves((z,), device=device), impl)
        (want,), (expected,) = run(call, leaves((z[:, ~constant],), torch.float64), "reference")
        share = (dims - 3) / dims
        assert torch.allclose(value.cpu().double(), want * share, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        size = expected.abs().max().item()
        assert torch.allclose(grad[:, ~constant].cpu().double(), expected * share, rtol=1e-3, atol=1e-4 * size)
        assert not grad[:, constant].any()
    (value,), (grad,) = run(call, leaves((torch.full((20, 4), 0.1),), device=device), impl)
    assert not value.any() and not grad.any()


@IMPLS
def test_a_column_constant_to_within_rounding(server: tuple[str, str]) -> None:
    """A column that varies by one step of float32 counts as constant; one that varies by 100 steps does not.

    Its correlation would be pure rounding.
    """
    impl, device = server
    for batch, dims in ((40, 6), (6, 12)):
        (z,) = sample(batch, dims)
        step = torch.linspace(0, 1, batch).round() * 2**-10  # a rounding step of 1e4
        z[:, 3] = 1e4 + step
        assert z[:, 3].std() > 0
        for reduction in ("sample", "batch"):
            call = functools.partial(covariance_penalty, normalize=True, reduction=reduction, impl=impl)
            near = z.to(device).requires_grad_()
            flat = torch.where(torch.arange(dims) == 3, 1e4, z).to(device)
            value = call(near)
            assert torch.allclose(value, call(flat), rtol=1e-4, atol=1e-6)
            (grad,) = torch.autograd.grad(value.sum(), near)
            assert not grad[:, 3].any() and grad[:, 2].any()
            wide = z.clone()
            wide[:, 3] = 1e4 + 100 * step
            exact = covariance_penalty(wide.double(), True, reduction=reduction, impl="reference")
            assert torch.allclose(call(wide.to(device)).cpu().double(), exact, rtol=1e-2, atol=1e-3)


@IMPLS
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_deviation_without_an_inverse_is_none(server: tuple[str, str], reduction: str) -> None:
    """A deviation too small for a finite inverse counts as a constant column, instead of giving inf times 0."""
    impl, device = server
    for batch, dims in ((40, 6), (6, 12)):
        (z,) = sample(batch, dims)
        z[:, 3] *= 1e-40 / z[:, 3].abs().max()
        assert z[:, 3].any()
        call = functools.partial(covariance_penalty, normalize=True, reduction=reduction)
        flat = torch.where(torch.arange(dims) == 3, 0, z)
        (value,), (grad,) = run(call, leaves((z,), device=device), impl)
        (want,), (expected,) = run(call, leaves((flat,), device=device), impl)
        assert torch.equal(value, want) and torch.equal(grad, expected) and not grad[:, 3].any()


@IMPLS
@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e25), (torch.float64, 1e200)])
def test_squares_that_overflow_are_not_hidden(
    server: tuple[str, str], reduction: str, dtype: torch.dtype, unit: float
) -> None:
    """The normalized penalty does not depend on units.

    It is NaN if a deviation's squares overflow, never a silent 0.
    """
    impl, device = server
    for batch, dims in ((40, 6), (6, 12), (20, 1)):
        (z,) = sample(batch, dims)
        z = z.to(device, dtype)
        call = functools.partial(covariance_penalty, normalize=True, reduction=reduction, impl=impl)
        value, right = call(z * unit), call(z)
        assert value.isnan().all() or torch.allclose(value, right, rtol=1e-4, atol=1e-6)


@IMPLS
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_a_variance_that_overflows_is_not_looked_at(server: tuple[str, str], reduction: str) -> None:
    """Only the elements off the diagonal count, and they are finite here."""
    impl, device = server
    (z,) = sample(40, 2)
    z = z * torch.tensor([1e20, 1e-18])
    call = functools.partial(covariance_penalty, reduction=reduction)
    (value,), (grad,) = run(call, leaves((z,), device=device), impl)
    (want,), (expected,) = run(call, leaves((z.double(),), device=device), "reference")
    assert torch.allclose(value.double(), want, rtol=1e-4)
    assert torch.allclose(grad.double(), expected, rtol=1e-3)


@IMPLS
@EACH
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_takes_all(server: tuple[str, str], call: Penalty, number: float) -> None:
    """A NaN reaches every result, because every sample uses every column's mean. A single column uses its own."""
    for batch, dims in ((20, 6), (6, 20), (20, 1)):
        value, grad = check_places(call, sample(batch, dims), server, {(0, 3, dims // 3): number})
        assert value.all() and grad.all()


@only_cpu("covariance_penalty")
@EACH
@pytest.mark.parametrize(("batch", "dims"), [(5000, 70), (300, 1200), (3, 4), (4, 3), (700, 300)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int, call: Penalty) -> None:
    check_same_bits(call, sample(batch, dims))


def plain(z: Tensor, normalize: bool) -> Tensor:
    """Return the batch's penalty by torch.cov or torch.corrcoef."""
    c = torch.corrcoef(z.T) if normalize else torch.cov(z.T)
    return (c - torch.diag(c.diagonal())).square().sum() / len(c)


@IMPLS
@settings(max_examples=25)
@given(batch=st.integers(2, 30), dims=st.integers(1, 30), normalize=st.booleans(), seed=st.integers(0, 99))
def test_properties(server: tuple[str, str], batch: int, dims: int, normalize: bool, seed: int) -> None:
    """The mean of the parts is torch.cov's penalty.

    Order, shift and sign do not matter. With normalization, units do not matter either.
    """
    impl, device = server
    call = functools.partial(covariance_penalty, normalize=normalize, impl=impl)
    (z,) = (x.to(device) for x in sample(batch, dims))
    parts = call(z)
    size = parts.abs().max().item() + size_of((z.cpu(),), call)
    close = {"rtol": 1e-4, "atol": 1e-4 * size + 1e-6}
    penalty = call(z, reduction="batch")
    assert parts.shape == (batch,) and penalty.shape == ()
    assert torch.allclose(parts.mean(), penalty, **close) and penalty >= -1e-5 * size
    if dims > 1:
        assert torch.allclose(penalty.double(), plain(z.double(), normalize), **close)
    else:
        assert parts.abs().max() <= 1e-6 and penalty.abs() <= 1e-6
    order, columns = shuffled(batch, seed, device), shuffled(dims, seed, device)
    assert torch.allclose(call(z[order]), parts[order], **close)
    assert torch.allclose(call(z[:, columns]), parts, **close)
    assert torch.allclose(call(z + torch.linspace(-8, 8, dims, device=device)), parts, **close)
    sign = torch.where(torch.arange(dims, device=device) % 2 == 0, 1.0, -1.0)
    assert torch.allclose(call(z * sign), parts, **close)
    if normalize:
        units = 2.0 ** (torch.arange(dims, device=device) % 9 - 4)
        assert torch.allclose(call(z * units), parts, **close)
    else:
        assert torch.allclose(call(z * 2), parts * 16, rtol=1e-4, atol=16 * close["atol"])
    # Added constant columns change D only, and with it whether D > B.
    more, ratio = torch.cat([z, torch.ones(batch, 31, device=device)], 1), (dims + 31) / dims
    close["atol"] += 1e-4 * ratio * size_of((more.cpu(),), call)
    assert torch.allclose(call(more) * ratio, parts, **close)


@IMPLS
def test_independent_columns_give_the_ideal_by_chance(server: tuple[str, str]) -> None:
    """Independent columns give (D - 1) / (B - 1), as the docstring states."""
    impl, device = server
    for batch, dims in ((4000, 40), (100, 200)):
        z = torch.randn(batch, dims, generator=torch.Generator().manual_seed(1)).to(device)
        for normalize in (False, True):
            value = covariance_penalty(z, normalize, reduction="batch", impl=impl).item()
            assert value == pytest.approx((dims - 1) / (batch - 1), rel=0.15)


@pytest.mark.skipif(bomkern.dispatch.select.extension is None, reason="not compiled")
def test_the_backward_op_reads_no_product_that_is_not_there() -> None:
    """The backward op refuses a product when the forward made none, because it might read past its end."""
    z = torch.rand(5, 3)
    _, product, second, offset, inverse = torch.ops.bomkern.covariance_penalty(z, False, False, True)
    kept = (second, offset, inverse, False, False)
    back = torch.ops.bomkern.covariance_penalty_backward
    with pytest.raises(ValueError, match=r"^product must have shape"):
        back(torch.ones(()), z, torch.ones(2), *kept)
    assert back(torch.ones(()), z, product, *kept).shape == z.shape
