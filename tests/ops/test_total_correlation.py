"""Test total_correlation: every implementation against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import reference, total_correlation
from tests.support.servers import servers
from tests.support.statistics import MATRIX_LAYOUTS as LAYOUTS
from tests.support.tolerances import assert_as_good_as_eager
from tests.support.total_correlation import ESTIMATORS, Latents, latents, leaves, run

IMPLS = pytest.mark.parametrize("server", servers("total_correlation"))


def check(
    inputs: Latents,
    server: tuple[str, str],
    which: tuple[int | None, str] = (None, "mws"),
    lay: Callable[[Tensor], Tensor] = lambda x: x,
    slack: float = 1e-6,
    unit: float = 1.0,
) -> None:
    """Compare values and gradients of ``server`` with float64, on inputs laid out by ``lay``."""
    impl, device = server
    names = ("value", "grad z", "grad mu", "grad logvar")
    exact = run(leaves(inputs, torch.float64), "reference", which)
    eager = run(leaves(inputs, torch.float32), "reference", which)
    ours = leaves(inputs, device=device)
    laid: Latents = tuple(lay(x) for x in ours)  # type: ignore[assignment]
    value = total_correlation(*laid, *which, impl=impl)
    weight = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=device)
    got = (value.detach(), *torch.autograd.grad((value * weight).sum(), ours))
    wide = any(x.dtype == torch.float64 for x in inputs)
    assert value.dtype == (torch.float64 if wide else torch.float32) and value.shape == inputs[0].shape[:1]
    for name, a, b, c, x in zip(names, got, eager, exact, (value, *inputs), strict=True):
        assert a.dtype == x.dtype, name
        # A half gradient is the float32 gradient, rounded once.
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(a.dtype, slack)
        try:
            assert_as_good_as_eager(a, c if a.dtype == torch.float64 else b, c, rounding, unit)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


SHAPES = [(1, 1), (1, 6), (2, 3), (7, 1), (33, 5), (64, 16), (65, 17), (130, 130), (300, 33)]


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
@pytest.mark.parametrize(("batch", "dims"), SHAPES)
def test_oracle(server: tuple[str, str], batch: int, dims: int, which: str) -> None:
    if which == "mss" and batch == 1:
        pytest.skip("one sample has no strata")
    check(latents(batch, dims), server, ESTIMATORS[which])


@IMPLS
@pytest.mark.parametrize("which", ["plain", "mss"])
def test_larger_than_every_tile(server: tuple[str, str], which: str) -> None:
    if server in (("triton", "cpu"), ("reference", "cpu")):
        pytest.skip(
            "minutes under Triton's interpreter; the reference has no tiles, and is what the others are held to"
        )
    check(latents(1100, 40), server, ESTIMATORS[which])


@IMPLS
@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("bfloat16",) * 3, ("float16", "float32", "bfloat16")])
def test_dtypes(server: tuple[str, str], dtypes: tuple[str, ...]) -> None:
    inputs = tuple(x.to(getattr(torch, t)) for x, t in zip(latents(50, 20), dtypes, strict=True))
    check(inputs, server, (5000, "mss"))  # type: ignore[arg-type]


@IMPLS
def test_float64(server: tuple[str, str]) -> None:
    for which in ESTIMATORS.values():
        check(latents(70, 9, torch.float64), server, which, slack=1e-13)
        z, mu, logvar = latents(20, 5)
        check((z, mu.double(), logvar), server, which)


@IMPLS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str) -> None:
    lay = LAYOUTS[layout]
    inputs = latents(37, 12)
    if "for all" in layout:  # the oracle gets the same values
        impl, device = server
        plain = leaves(inputs, device=device)
        same: Latents = tuple(lay(x).contiguous() for x in plain)  # type: ignore[assignment]
        value = total_correlation(*(lay(x) for x in plain), impl=impl)
        assert torch.allclose(value, total_correlation(*same, impl="reference"), rtol=1e-4, atol=1e-4)
        return
    check(inputs, server, (5000, "mss"), lay)


EXTREMES: dict[str, Callable[[], Latents]] = {
    "log-variances from -30 to 20": lambda: (
        *latents(60, 8)[:2],
        torch.linspace(-30, 20, 480).reshape(8, 60).t().contiguous(),
    ),
    "samples 30 sigma away": lambda: (latents(60, 8)[0] * 0 + 30, torch.zeros(60, 8), torch.zeros(60, 8)),
    "one dimension far, one narrow": lambda: (
        latents(60, 8)[0] + torch.tensor([100.0] + [0.0] * 7),
        latents(60, 8)[1],
        latents(60, 8)[2] - torch.tensor([0.0] + [20.0] + [0.0] * 6),
    ),
    "duplicate rows": lambda: tuple(x[:5].repeat(12, 1) for x in latents(60, 8)),  # type: ignore[dict-item,return-value]
    "far from zero": lambda: (latents(60, 8)[0] + 1e4, latents(60, 8)[1] + 1e4, latents(60, 8)[2]),
    "collapsed posteriors": lambda: (latents(60, 8)[2], torch.zeros(60, 8), torch.zeros(60, 8)),
    "many dimensions": lambda: latents(40, 600),
}


@IMPLS
@pytest.mark.parametrize("which", ["plain", "mss"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(server: tuple[str, str], extreme: str, which: str) -> None:
    # If eager's numbers are whole, eager has no error. The size of the logarithms bounds our error instead.
    unit = {"samples 30 sigma away": 30**2 / 2 * 8, "collapsed posteriors": 8.0}.get(extreme, 1.0)
    check(EXTREMES[extreme](), server, ESTIMATORS[which], unit=unit)


@IMPLS
def test_stratified_weights_where_they_matter(server: tuple[str, str]) -> None:
    """In separate clusters, each row has density at its own component and the next one only, with different weights."""
    impl, device = server
    batch = 40
    mu = torch.arange(batch, dtype=torch.float32)[:, None].repeat(1, 3) * 100
    z = mu + torch.tensor([0.0, 0.5, -0.5])
    value = total_correlation(z.to(device), mu.to(device), torch.zeros_like(mu).to(device), 1000, "mss", impl=impl)
    # The joint and the marginals have one component each: t and w = 1/N appear once in the joint, D times in the
    # marginals.
    assert torch.allclose(value.cpu(), torch.full((batch,), 2 * math.log(1000)), rtol=1e-5)
    rolled = total_correlation(
        z.roll(-1, 0).to(device), mu.to(device), torch.zeros_like(mu).to(device), 1000, "mss", impl=impl
    )
    want = -2 * math.log((1000 - (batch - 1)) / (1000 * (batch - 1)))
    assert torch.allclose(rolled.cpu(), torch.full((batch,), want), rtol=1e-5)


def test_the_weights_of_a_row_sum_to_one() -> None:
    for batch, size in ((2, 2), (5, 17), (64, 60_000)):
        weights = reference.log_weights(torch.arange(batch), batch, size, True).exp()
        assert torch.allclose(weights.sum(1), torch.ones(batch, dtype=torch.float64))
        assert torch.allclose(weights.diagonal(), torch.tensor(1 / size, dtype=torch.float64))


@pytest.mark.parametrize("which", ESTIMATORS)
def test_the_reference_in_chunks_is_the_reference(which: str) -> None:
    size, estimator = ESTIMATORS[which]
    inputs = leaves(latents(50, 6, torch.float64))
    whole, parts = (
        reference.total_correlation(*inputs, size, estimator == "mss", limit=limit) for limit in (10**9, 2000)
    )
    assert torch.allclose(whole, parts, rtol=1e-13)
    for a, b in zip(torch.autograd.grad(whole.sum(), inputs), torch.autograd.grad(parts.sum(), inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
def test_gradcheck(server: tuple[str, str], which: str) -> None:
    impl, device = server
    inputs = leaves(latents(7, 3, torch.float64), device=device)
    assert torch.autograd.gradcheck(lambda *x: total_correlation(*x, *ESTIMATORS[which], impl=impl), inputs)


@IMPLS
@pytest.mark.parametrize("poisoned", ["z", "mu", "logvar"])
def test_nan_stays_in_its_row_or_takes_all(server: tuple[str, str], poisoned: str) -> None:
    impl, device = server
    inputs = leaves(latents(40, 6), device=device)
    with torch.no_grad():
        inputs[("z", "mu", "logvar").index(poisoned)][3, 2] = torch.nan
    value, *grads = run(inputs, impl, (None, "mws"))
    nan = value.isnan().cpu()
    assert nan[3] and nan.sum() == (1 if poisoned == "z" else 40)
    assert all(g.isnan().any() for g in grads)


@IMPLS
def test_an_infinite_sample_leaves_no_number_in_what_it_reaches(server: tuple[str, str]) -> None:
    """An infinite sample makes its value NaN, and so every gradient that depends on its weights."""
    impl, device = server
    inputs = leaves(latents(40, 6), device=device)
    with torch.no_grad():
        inputs[0][3, 2] = torch.inf
    value, *grads = run(inputs, impl, (None, "mws"))
    assert value.isnan().nonzero().tolist() == [[3]]
    assert grads[0].isnan().any(1).nonzero().tolist() == [[3]] and grads[0][3].isnan().all()
    assert grads[1].isnan().all() and grads[2].isnan().all()


@IMPLS
def test_farther_than_float32_can_say(server: tuple[str, str]) -> None:
    """In float64, log densities may be -1e40 and below."""
    z, mu, logvar = latents(40, 6, torch.float64)
    check((z + 1e20, mu, logvar), server, slack=1e-13, unit=1e41)


@IMPLS
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_gradients_wanted(server: tuple[str, str], wanted: tuple[bool, ...]) -> None:
    impl, device = server
    inputs = leaves(latents(20, 5), device=device)
    every = run(inputs, impl, (None, "mws"))[1:]
    some = tuple(x if w else x.detach() for x, w in zip(inputs, wanted, strict=True))
    value = total_correlation(*some, impl=impl)
    weight = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=device)
    got = torch.autograd.grad((value * weight).sum(), [x for x, w in zip(inputs, wanted, strict=True) if w])
    want = [g for g, w in zip(every, wanted, strict=True) if w]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@IMPLS
@settings(max_examples=25)
@given(batch=st.integers(2, 40), dims=st.integers(1, 12), data=st.data())
def test_properties(server: tuple[str, str], batch: int, dims: int, data: st.DataObject) -> None:
    """One dimension has no total correlation.

    The order of samples and the units of a dimension do not matter.
    """
    impl, device = server
    if impl == "triton" and device == "cpu":
        batch, dims = min(batch, 12), min(dims, 4)
    z, mu, logvar = (x.to(device) for x in latents(batch, dims))
    value = total_correlation(z, mu, logvar, impl=impl)
    assert total_correlation(z[:, :1], mu[:, :1], logvar[:, :1], impl=impl).abs().max() < 1e-5
    close = {"rtol": 1e-4, "atol": 1e-4}
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(device)
    assert torch.allclose(total_correlation(z[order], mu[order], logvar[order], impl=impl), value[order], **close)
    columns = torch.randperm(dims).to(device)
    assert torch.allclose(
        total_correlation(z[:, columns], mu[:, columns], logvar[:, columns], impl=impl), value, **close
    )
    # A power of two, so that the change of units rounds nothing.
    unit = 2.0 ** data.draw(st.integers(-6, 6))
    scaled = total_correlation(z * unit, mu * unit, logvar + 2 * math.log(unit), impl=impl)
    assert torch.allclose(scaled, value, rtol=1e-3, atol=1e-3)
    # MWS is the plain estimate plus (D - 1) log N.
    moved = total_correlation(z, mu, logvar, 1000, impl=impl)
    assert torch.allclose(moved, value + (dims - 1) * math.log(1000), **close)
