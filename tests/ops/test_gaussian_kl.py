"""Test gaussian_kl: every implementation against the reference in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from bomkern import gaussian_kl
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
    codes,
    leaves,
    run,
    shuffled,
)

IMPLS = pytest.mark.parametrize("server", servers("gaussian_kl"))
BLOCK = functools.partial(gaussian_kl, block_size=4, rho=0.6)
# 12 dimensions make blocks of 8 and 4; 20 make 8, 8 and 4
RAGGED = functools.partial(gaussian_kl, block_size=8, rho=0.6)
CALLS = pytest.mark.parametrize("call", [gaussian_kl, BLOCK, RAGGED], ids=["plain", "block", "ragged"])


def posterior(batch: int, dims: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return codes(batch, dims, dtype)[1:]


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), [(1, 1), (1, 6), *SHAPES])
def test_oracle(server: tuple[str, str], batch: int, dims: int) -> None:
    check(gaussian_kl, posterior(batch, dims), server)


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), LARGE)
def test_larger_than_every_tile(server: tuple[str, str], batch: int, dims: int) -> None:
    check(gaussian_kl, posterior(batch, dims), server)


BLOCKS = [
    *((1, 1, 1, 0.5), (5, 6, 1, -3.0), (1, 6, 6, 0.9), (33, 12, 2, -0.9), (33, 12, 3, -0.4), (40, 12, 4, 0.0)),
    *((7, 70, 35, 0.99), (65, 300, 100, 0.5), (1030, 9, 3, 0.3), (9, 2050, 1025, 0.1), (600, 130, 65, -0.01)),
    # The last block is shorter.
    *((33, 20, 8, 0.6), (5, 9, 8, -0.1), (33, 13, 12, 0.9), (40, 13, 6, 0.0), (7, 70, 33, 0.99), (1030, 11, 3, 0.3)),
    *((65, 300, 128, 0.5), (9, 2050, 2049, 0.1), (5, 1300, 600, 0.5), (600, 131, 65, -0.01)),
]


@IMPLS
@pytest.mark.parametrize(("batch", "dims", "block", "rho"), BLOCKS)
def test_block_prior(server: tuple[str, str], batch: int, dims: int, block: int, rho: float) -> None:
    inputs = posterior(batch, dims)
    # The magnitude of the sum: mu^2 over the prior's smallest variance.
    unit = inputs[0].square().sum(1).max().item() / min(1 - rho, 1 - rho + block * rho)
    check(functools.partial(gaussian_kl, block_size=block, rho=rho), inputs, server, unit=unit)


@IMPLS
@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize(
    "dtypes", [("float16",) * 2, ("bfloat16",) * 2, ("float16", "float32"), ("float32", "bfloat16")]
)
def test_dtypes(server: tuple[str, str], dtypes: tuple[str, ...], block: int) -> None:
    inputs = tuple(x.to(getattr(torch, t)) for x, t in zip(posterior(50, 21), dtypes, strict=True))
    check(functools.partial(gaussian_kl, block_size=block, rho=0.3), inputs, server)


@IMPLS
def test_float64(server: tuple[str, str]) -> None:
    check(gaussian_kl, posterior(70, 9, torch.float64), server, slack=1e-14)
    check(BLOCK, posterior(70, 20, torch.float64), server, slack=1e-13)
    check(RAGGED, posterior(70, 20, torch.float64), server, slack=1e-13)
    mu, logvar = posterior(20, 8)
    check(BLOCK, (mu, logvar.double()), server, slack=1e-13)
    check(BLOCK, (mu.double(), logvar.half()), server, slack=1e-13)


@IMPLS
@CALLS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, call: functools.partial) -> None:
    check(call, posterior(37, 12), server, lay=LAYOUTS[layout])
    lay = LAYOUTS[layout]  # a layout of one input only
    check(lambda mu, logvar, impl: call(lay(mu), logvar, impl=impl), posterior(37, 12), server)


@IMPLS
@pytest.mark.parametrize("pull", PULLS)
def test_gradients_from_above(server: tuple[str, str], pull: str) -> None:
    for batch, dims in ((1, 4), (40, 12), (1030, 8)):
        check(gaussian_kl, posterior(batch, dims), server, pull=PULLS[pull])
        check(BLOCK, posterior(batch, dims), server, pull=PULLS[pull])
        check(RAGGED, posterior(batch, dims + 9), server, pull=PULLS[pull])


@IMPLS
@CALLS
def test_only_the_gradients_wanted(server: tuple[str, str], call: functools.partial) -> None:
    check_only_the_gradients_wanted(call, posterior(40, 12), server)


@IMPLS
def test_gradcheck(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(posterior(5, 6, torch.float64), device=device)
    for block, rho in ((None, 0.0), (3, 0.4), (2, -0.7), (4, 0.4), (5, -0.2)):
        assert torch.autograd.gradcheck(lambda *x: gaussian_kl(*x, block, rho, impl=impl), inputs)  # noqa: B023


@IMPLS
@CALLS
def test_tangent_beyond_80(server: tuple[str, str], call: functools.partial) -> None:
    """Beyond 80, where exp would overflow, value and gradient stay finite.

    Below 80 and at the seam they do not change.
    """
    impl, device = server
    mu, logvar = posterior(30, 12)
    logvar = torch.linspace(-120, 200, 360).reshape(12, 30).t().contiguous()
    check(call, (mu, logvar), server)
    rows = torch.tensor([79.0, 79.999, 80.0, 80.001, 81.0, 88.0, 89.0, 100.0, 200.0])
    logvar = torch.zeros(len(rows), 12)
    logvar[:, 5] = rows
    # float32's exp(80) has an error of one ulp of 80
    check(call, (torch.zeros_like(logvar), logvar), server, slack=1e-5)
    values, (_, grad) = run(call, leaves((torch.zeros_like(logvar), logvar), device=device), impl, pull=PULLS["sum"])
    assert values[0].isfinite().all() and (values[0].diff() > 0).all()
    assert (grad[:, 5] > 1e34).all() and grad.isfinite().all()
    assert torch.allclose(grad[2:, 5], grad[2, 5], rtol=1e-5)


@IMPLS
def test_far_from_zero(server: tuple[str, str]) -> None:
    mu, logvar = posterior(300, 24)
    for call in (gaussian_kl, BLOCK, functools.partial(gaussian_kl, block_size=10, rho=0.6)):
        check_far(call, (mu / mu.std(0) + 1e4, logvar), server)


@IMPLS
def test_nan_stays_in_its_sample(server: tuple[str, str]) -> None:
    value, mu, logvar = check_places(gaussian_kl, posterior(40, 12), server, {(0, 3, 2): torch.nan})
    assert value.nonzero().tolist() == [[3]] and mu.nonzero().tolist() == [[3, 2]] and not logvar.any()
    value, mu, logvar = check_places(gaussian_kl, posterior(40, 12), server, {(1, 3, 2): torch.nan})
    assert value.nonzero().tolist() == [[3]] and logvar.nonzero().tolist() == [[3, 2]] and not mu.any()
    value, mu, logvar = check_places(BLOCK, posterior(40, 12), server, {(0, 3, 2): torch.nan})
    assert value.nonzero().tolist() == [[3]] and not logvar.any()
    assert mu.nonzero().tolist() == [[3, d] for d in range(4)]  # its block
    value, mu, logvar = check_places(RAGGED, posterior(40, 20), server, {(0, 3, 17): torch.nan})
    assert value.nonzero().tolist() == [[3]] and not logvar.any()
    assert mu.nonzero().tolist() == [[3, d] for d in range(16, 20)]  # the last block, which is shorter


@IMPLS
@pytest.mark.parametrize("number", [torch.inf, -torch.inf])
def test_infinity_stays_in_its_sample(server: tuple[str, str], number: float) -> None:
    """The reference is excluded: for its missing block it computes 0 * inf, which is NaN."""
    impl, device = server
    for k in (0, 1):
        clean = leaves(posterior(40, 12), device=device)
        inputs = leaves(clean, device=device)
        with torch.no_grad():
            inputs[k][3, 2] = number
        value, grads = run(gaussian_kl, inputs, impl)
        want, expected = run(gaussian_kl, clean, impl)
        others = torch.arange(40, device=device) != 3
        assert not value[0][3].isfinite() and torch.equal(value[0][others], want[0][others])
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a[others], b[others])
        assert torch.equal(grads[1 - k], expected[1 - k])
    assert number > 0 or value[0][3] == torch.inf  # the variance is 0


@IMPLS
def test_a_block_of_one_has_no_correlation(server: tuple[str, str]) -> None:
    """A block of one dimension ignores rho, at infinity too."""
    impl, device = server
    mu, logvar = (x.to(device) for x in posterior(9, 4))
    mu[3, 2] = torch.inf
    value = gaussian_kl(mu, logvar, 1, 0.9, impl=impl)
    assert torch.equal(value, gaussian_kl(mu, logvar, impl=impl)) and value[3] == torch.inf


@IMPLS
@pytest.mark.parametrize(("block", "rho"), [(4, 0.0), (5, 0.0), (11, 0.5), (11, -0.09)])
def test_infinity_where_a_block_shares_nothing(server: tuple[str, str], block: int, rho: float) -> None:
    """Without correlation, or in a last block of one dimension, no 0 * inf occurs."""
    impl, device = server
    mu, logvar = posterior(9, 12)
    mu[3, 11] = torch.inf
    call = functools.partial(gaussian_kl, block_size=block, rho=rho)
    (value,), (by_mu, by_logvar) = run(call, leaves((mu, logvar), device=device), impl)
    assert value[3] == torch.inf and value.isfinite().sum() == 8
    assert by_mu[3, 11].isinf() and by_mu.isfinite().sum() == 9 * 12 - 1 and by_logvar.isfinite().all()


@IMPLS
def test_an_infinite_log_variance_has_the_tangents_slope(server: tuple[str, str]) -> None:
    impl, device = server
    mu, logvar = posterior(5, 4)
    logvar[2, 1], logvar[3, 1] = torch.inf, 100.0
    _, (_, grad) = run(gaussian_kl, leaves((mu, logvar), device=device), impl, pull=PULLS["sum"])
    assert grad[2, 1] == grad[3, 1] > 1e34


@only_cpu("gaussian_kl")
@pytest.mark.parametrize(("batch", "dims"), [(5000, 70), (40, 3000), (3, 4), (1, 100_000)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int) -> None:
    check_same_bits(gaussian_kl, posterior(batch, dims))
    for block in (2, 3):
        check_same_bits(functools.partial(gaussian_kl, block_size=block, rho=0.5), posterior(batch, dims))


@IMPLS
@settings(max_examples=20)
@given(size=st.integers(1, 6), more=st.integers(0, 14), where=st.floats(0.05, 0.95), batch=st.integers(1, 20))
@example(size=8, more=12, where=0.6, batch=9)  # blocks of 8, 8 and 4
def test_is_torchs_divergence(server: tuple[str, str], size: int, more: int, where: float, batch: int) -> None:
    impl, device = server
    mu, logvar = (x.to(device) for x in posterior(batch, size + more, torch.float64))
    deviation = torch.exp(logvar / 2)
    plain = kl_divergence(Normal(mu, deviation), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
    assert torch.allclose(gaussian_kl(mu, logvar, impl=impl), plain, rtol=1e-12, atol=1e-12)
    least = -1 / (size - 1) if size > 1 else -1.0
    rho = least + where * (1 - least)
    block_of = torch.arange(size + more) // size
    matrix = torch.where(block_of[:, None] == block_of, torch.tensor(rho, dtype=torch.float64), 0).fill_diagonal_(1)
    prior = MultivariateNormal(torch.zeros(size + more, dtype=torch.float64), matrix)
    want = kl_divergence(MultivariateNormal(mu.cpu(), torch.diag_embed(logvar.exp().cpu())), prior)
    got = gaussian_kl(mu, logvar, size, rho, impl=impl)
    assert torch.allclose(got.cpu(), want, rtol=1e-10, atol=1e-10)


@IMPLS
@settings(max_examples=20)
@given(batch=st.integers(1, 40), dims=st.integers(1, 12), other=st.integers(1, 9), seed=st.integers(0, 99))
def test_properties(server: tuple[str, str], batch: int, dims: int, other: int, seed: int) -> None:
    """The divergence is never below 0, and 0 at the prior.

    It is a sum over dimensions in any order, and samples are independent.
    """
    impl, device = server
    call = functools.partial(gaussian_kl, impl=impl)
    mu, logvar = (x.to(device) for x in posterior(batch, 2 * dims))
    value = call(mu, logvar)
    assert (value >= -1e-6 * dims).all() and value.max() > 0
    assert (call(mu * 1e-3, logvar * 1e-3) >= -1e-6 * dims).all()
    assert (call(mu * 0, logvar * 0) == 0).all()
    close = {"rtol": 1e-5, "atol": 1e-5}
    more = tuple(x.to(device) for x in posterior(batch, other))
    both = call(torch.cat([mu, more[0]], 1), torch.cat([logvar, more[1]], 1))
    assert torch.allclose(both, value + call(*more), **close)
    order, columns = shuffled(batch, seed, device), shuffled(2 * dims, seed, device)
    assert torch.allclose(call(mu[order], logvar[order]), value[order], **close)
    assert torch.allclose(call(mu[:, columns], logvar[:, columns]), value, **close)
    assert torch.allclose(call(mu, logvar, 2, 0.0), value, **close)
    blocks = (2 * shuffled(dims, seed, device)[:, None] + torch.arange(2, device=device)).reshape(-1)
    block = call(mu, logvar, 2, 0.7)
    assert torch.allclose(call(mu[:, blocks], logvar[:, blocks], 2, 0.7), block, **close)
    # Use rho = -0.7, and then 0.7 with one dimension of each block negated.
    sign = torch.tensor([1.0, -1.0], device=device).repeat(dims)
    assert torch.allclose(call(mu * sign, logvar, 2, -0.7), block, **close)
