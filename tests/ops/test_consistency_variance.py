"""Test consistency_variance: every implementation against the reference in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import consistency_variance
from tests.support.servers import only_cpu, servers
from tests.support.statistics import (
    LARGE,
    LAYOUTS,
    PULLS,
    SHAPES,
    Inputs,
    check,
    check_far,
    check_only_the_gradients_wanted,
    check_places,
    check_same_bits,
    leaves,
    ramp,
    shuffled,
    views,
)

IMPLS = pytest.mark.parametrize("server", servers("consistency_variance"))


def of_views(*given: Tensor, correction: float = 1, impl: str | None = None) -> Tensor:
    return consistency_variance(given, correction, impl=impl)


def stacked(batch: int, dims: int, count: int = 3, dtype: torch.dtype = torch.float32) -> Inputs:
    return (torch.stack(views(batch, dims, count, dtype)),)


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), [(1, 1), (1, 6), *SHAPES])
def test_oracle(server: tuple[str, str], batch: int, dims: int) -> None:
    check(of_views, views(batch, dims), server)
    check(consistency_variance, stacked(batch, dims), server)


@IMPLS
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 15, 16])
def test_number_of_views(server: tuple[str, str], count: int) -> None:
    for correction in (0, 1, 0.5, count - 0.25):
        call = functools.partial(of_views, correction=correction)
        check(call, views(33, 21, count), server)
        check(functools.partial(consistency_variance, correction=correction), stacked(9, 5, count), server)


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), LARGE)
def test_larger_than_every_tile(server: tuple[str, str], batch: int, dims: int) -> None:
    check(of_views, views(batch, dims), server)
    check(consistency_variance, stacked(batch, dims, 2), server)


MIXED = [
    *(("float16",) * 3, ("bfloat16",) * 3, ("float16", "float32", "bfloat16"), ("float32", "bfloat16")),
    ("bfloat16", "float16", "float16", "float32", "float32"),
]


@IMPLS
@pytest.mark.parametrize("dtypes", MIXED)
def test_dtypes(server: tuple[str, str], dtypes: tuple[str, ...]) -> None:
    given = tuple(x.to(getattr(torch, t)) for x, t in zip(views(50, 20, len(dtypes)), dtypes, strict=True))
    check(of_views, given, server)
    check(consistency_variance, (stacked(50, 20)[0].to(given[0].dtype),), server)


@IMPLS
def test_float64(server: tuple[str, str]) -> None:
    check(of_views, views(70, 9, 5, torch.float64), server, slack=1e-13)
    check(consistency_variance, stacked(70, 9, 5, torch.float64), server, slack=1e-13)
    first, second, third = views(20, 8)
    check(of_views, (first, second.double(), third.half()), server, slack=1e-13)


STACKED_LAYOUTS = {
    "views last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "samples last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other view": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third column": lambda x: x.repeat_interleave(3, 2)[:, :, ::3],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "one sample for all": lambda x: x[:, :1].expand(x.shape),
    "one column for all": lambda x: x[:, :, :1].expand(x.shape),
}


@IMPLS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str) -> None:
    lay = LAYOUTS[layout]
    check(of_views, views(37, 12, 4), server, lay=lay)
    # Each view has its own layout: first one view alone, then the first view alone.
    check(lambda a, b, c, impl: of_views(a, lay(b), c, impl=impl), views(37, 12), server)
    check(lambda a, b, c, impl: of_views(lay(a), b, c, impl=impl), views(37, 12), server)


@IMPLS
@pytest.mark.parametrize("layout", STACKED_LAYOUTS)
def test_stacked_layouts(server: tuple[str, str], layout: str) -> None:
    check(consistency_variance, stacked(37, 12, 5), server, lay=STACKED_LAYOUTS[layout])


@IMPLS
@pytest.mark.parametrize("pull", PULLS)
def test_gradients_from_above(server: tuple[str, str], pull: str) -> None:
    for batch, dims in ((1, 4), (40, 12), (1030, 8)):
        check(of_views, views(batch, dims), server, pull=PULLS[pull])
    check(consistency_variance, stacked(40, 12), server, pull=PULLS[pull])


@IMPLS
def test_only_the_gradients_wanted(server: tuple[str, str]) -> None:
    check_only_the_gradients_wanted(of_views, views(40, 12, 4), server)


@IMPLS
@pytest.mark.parametrize("whole", [False, True])
def test_detach(server: tuple[str, str], whole: bool) -> None:
    """The first view's gradient stays the same, and the other views get none."""
    impl, device = server
    given = leaves(stacked(20, 6) if whole else views(20, 6), device=device)
    how = {"impl": impl, "correction": 0}
    value = consistency_variance(given[0] if whole else given, **how)
    every = torch.autograd.grad(value, given, ramp(value))
    targets = consistency_variance(given[0] if whole else given, detach=True, **how)
    first = torch.autograd.grad(targets, given, ramp(value), materialize_grads=True)
    assert torch.allclose(targets, value)
    if whole:
        assert torch.allclose(first[0][0], every[0][0]) and not first[0][1:].any()
    else:
        assert torch.allclose(first[0], every[0]) and not first[1].any() and not first[2].any()
    assert not consistency_variance([x.detach() for x in views(4, 3)], detach=True, impl="reference").requires_grad


@IMPLS
def test_the_same_tensor_twice(server: tuple[str, str]) -> None:
    check(lambda a, b, impl: of_views(a, b, a, impl=impl), views(20, 6, 2), server)
    alone = leaves(views(20, 6, 2), device=server[1])[0]
    value = of_views(alone, alone, impl=server[0])
    assert not value.any() and not torch.autograd.grad(value.sum(), alone)[0].any()


@IMPLS
def test_gradcheck(server: tuple[str, str]) -> None:
    impl, device = server
    given = leaves(views(4, 3, 3, torch.float64), device=device)
    for correction in (0, 1, 2.5):
        call = functools.partial(of_views, correction=correction, impl=impl)
        assert torch.autograd.gradcheck(call, given)
    one = leaves(stacked(4, 3, 4, torch.float64), device=device)
    assert torch.autograd.gradcheck(functools.partial(consistency_variance, impl=impl), one)


@IMPLS
def test_far_from_zero(server: tuple[str, str]) -> None:
    check_far(of_views, tuple(x / 0.3 + 1e4 for x in views(300, 24, 4)), server)
    check_far(consistency_variance, (stacked(300, 24, 4)[0] / 0.3 + 1e4,), server)


@IMPLS
def test_an_outlier_in_the_first_view(server: tuple[str, str]) -> None:
    """An outlier in the first view keeps its precision.

    Sums that start from the first view consist of its differences from the others.
    """
    given = views(300, 24, 16)
    check(of_views, (given[0] + 1e4, *given[1:]), server, slack=5e-6)
    outlier = given[0].clone()
    outlier[0] += 1e4
    check(of_views, (outlier, *given[1:]), server, slack=5e-6)


@IMPLS
def test_a_view_whose_squared_sum_overflows(server: tuple[str, str]) -> None:
    """Squared differences and the variance are finite, but the square of the differences' sum overflows."""
    given = views(20, 6, 16)
    check(of_views, (given[0] + 3e18, *given[1:]), server, slack=5e-6)


@IMPLS
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_sample(server: tuple[str, str], number: float) -> None:
    for view in range(3):
        value, *grads = check_places(of_views, views(40, 12), server, {(view, 3, 2): number})
        assert value.nonzero().tolist() == [[3]]
        assert all(grad.nonzero().tolist() == [[3, 2]] for grad in grads)


@only_cpu("consistency_variance")
@pytest.mark.parametrize(("batch", "dims"), [(5000, 70), (40, 3000), (3, 4), (1, 50_000)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int) -> None:
    check_same_bits(of_views, views(batch, dims))
    check_same_bits(consistency_variance, stacked(batch, dims, 4))


@IMPLS
@settings(max_examples=20)
@given(
    count=st.integers(2, 16),
    batch=st.integers(1, 30),
    dims=st.integers(1, 12),
    part=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_properties(server: tuple[str, str], count: int, batch: int, dims: int, part: float, seed: int) -> None:
    """The result equals torch.var.

    The order of views and samples does not matter, nor does a shift of all views. Scaling the views by s multiplies the
    result by s squared.
    """
    impl, device = server
    correction = part * count
    call = functools.partial(consistency_variance, correction=correction, impl=impl)
    given = [x.to(device) for x in views(batch, dims, count)]
    value = call(given)
    exact = torch.stack(given).double()
    mean = exact.mean(0)
    plain = ((exact - mean).square().sum(0) / (count - correction)).mean(1)
    close = {"rtol": 1e-4, "atol": 1e-6}
    assert torch.allclose(value.double(), plain, **close) and (value >= 0).all()
    if correction == 0 or count > 2:
        whole = torch.stack(given)
        assert torch.allclose(consistency_variance(whole, 1, impl=impl), whole.var(0).mean(1), **close)
    assert torch.allclose(call(torch.stack(given)), value, **close)
    assert torch.allclose(call([given[k] for k in shuffled(count, seed, "cpu")]), value, **close)
    order = shuffled(batch, seed, device)
    assert torch.allclose(call([x[order] for x in given]), value[order], **close)
    shift = torch.linspace(-8, 8, batch * dims, device=device).reshape(batch, dims)
    assert torch.allclose(call([x + shift for x in given]), value, **close)
    assert torch.allclose(call([x * 4 for x in given]), value * 16, rtol=1e-4, atol=1e-5)
    assert (call([given[0]] * count) == 0).all()
    # Two values of each view have the same mean square.
    if count <= 8:
        twice = consistency_variance([*given, *given], 0, impl=impl)
        assert torch.allclose(twice, consistency_variance(given, 0, impl=impl), **close)
