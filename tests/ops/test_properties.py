"""Test properties of the statistics for any input: units, layouts and threads.

Each op's own file tests properties that only this op has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import (
    consistency_variance,
    covariance_penalty,
    gaussian_kl,
    gaussian_total_correlation,
    total_correlation,
)
from tests.fuzz.cases import LAYOUTS, laid_out
from tests.support.properties import Server, drawn, few, seeds, small
from tests.support.servers import servers
from tests.support.statistics import OPS, Inputs, codes, leaves, run, shuffled

SERVERS = {op: servers(op) for op in (*OPS, "total_correlation")}


def tc(*inputs: Tensor, impl: str | None) -> Tensor:
    return total_correlation(*inputs, 5000, "mss", impl=impl)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[int, int], Inputs]]] = {
    **{name: (op.call, op.make) for name, op in OPS.items()},
    "total_correlation": (tc, codes),
    "correlation": (lambda z, impl: covariance_penalty(z, normalize=True, impl=impl), lambda b, d: codes(b, d)[:1]),
    "block prior": (lambda *x, impl: gaussian_kl(*x, x[0].shape[1], 0.3, impl=impl), lambda b, d: codes(b, d)[1:]),
}
WHERE = {"correlation": "covariance_penalty", "block prior": "gaussian_kl"}
EVERY = pytest.mark.parametrize(
    ("name", "server"),
    [pytest.param(n, p.values[0], id=f"{n}-{p.id}") for n in CALLS for p in SERVERS[WHERE.get(n, n)]],
)


@EVERY
@few
@given(
    batch=st.integers(2, 70),
    dims=st.integers(1, 40),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), min_size=3, max_size=3),
)
def test_layouts(
    name: str, server: Server, batch: int, dims: int, layouts: list[str], dtypes: list[torch.dtype]
) -> None:
    """Each input has its own layout and dtype.

    Results and gradients are bitwise those of contiguous inputs.
    """
    impl, device = server
    batch, dims = small(server, batch, dims)
    call, make = CALLS[name]
    inputs = [x.to(t) for x, t in zip(make(batch, dims), dtypes, strict=False)]
    laid = [laid_out(x, how) for x, how in zip(inputs, layouts, strict=False)]
    if device != "cpu":  # the copy keeps strides
        laid = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
            for x in laid
            if 0 not in x.stride()
        ]
        if len(laid) < len(inputs):
            return
    odd = tuple(x.detach().requires_grad_() for x in laid)
    plain = tuple(x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in laid)
    values, grads = run(call, odd, impl)
    wanted, expected = run(call, plain, impl)
    for a, b in zip((*values, *grads), (*wanted, *expected), strict=True):
        if impl == "cpu":
            assert torch.equal(a, b)
        else:
            # All correlations of two samples are 1 or -1, and their gradient, 0, is a sum of terms that cancel: 1.2e-4.
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype != torch.float32 else 1e-4, atol=3e-4)


@EVERY
@few
@given(batch=st.integers(2, 12), channels=st.integers(1, 9), side=st.integers(1, 3))
def test_channels_last(name: str, server: Server, batch: int, channels: int, side: int) -> None:
    """Codes of a convolution may be pixels as samples, one pixel of each image, or flattened 1 x 1 maps."""
    impl, device = server
    call, make = CALLS[name]
    maps = [
        x.reshape(batch, side, side, channels)
        .permute(0, 3, 1, 2)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for x in make(batch * side * side, channels)
    ]
    for view in (
        lambda x: x.permute(0, 2, 3, 1).flatten(0, 2),
        lambda x: x[:, :, side - 1, 0],
        lambda x: x[:, :, :1, :1].flatten(1),
        lambda x: x[:, 0].flatten(1).T,
    ):
        codes_of = tuple(view(x).detach().requires_grad_() for x in maps)
        if codes_of[0].shape[0] < 2:
            continue
        plain = leaves(tuple(x.contiguous() for x in codes_of))
        for a, b in zip(*(sum(run(call, x, impl), ()) for x in (codes_of, plain)), strict=True):
            assert torch.equal(a, b) if impl == "cpu" else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=6)
@given(batch=st.integers(2, 600), dims=st.integers(1, 300), threads=st.integers(1, 5))
def test_same_bits_again_and_with_other_threads(name: str, batch: int, dims: int, threads: int) -> None:
    """Results are reproducible for any shape in float32."""
    server = ("cpu", "cpu")
    if not any(p.values[0] == server for p in SERVERS[WHERE.get(name, name)]):
        pytest.skip("no compiled kernels")
    call, make = CALLS[name]
    if name == "total_correlation":
        batch = min(batch, 200)
    inputs, before, results = leaves(make(batch, dims)), torch.get_num_threads(), []
    try:
        for count in (1, 1, threads):
            torch.set_num_threads(count)
            results.append(sum(run(call, inputs, "cpu"), ()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("server", SERVERS["total_correlation"])
@few
@given(batch=st.integers(2, 40), dims=st.integers(1, 8), seed=seeds, first=st.integers(0, 39))
def test_total_correlation_of_each_dimension_in_its_own_units(
    server: Server, batch: int, dims: int, seed: int, first: int
) -> None:
    """Rescaling and shifting each dimension by its own a and c changes nothing, for a single row as well.

    z becomes a z + c, mu becomes a mu + c, and logvar becomes logvar + 2 log |a|.
    """
    impl, device = server
    batch, dims = small(server, batch, dims)
    z, mu, logvar = (x.to(device) for x in codes(batch, dims))
    source = torch.Generator().manual_seed(seed)
    powers = torch.randint(-6, 7, (dims,), generator=source)
    scale = (2.0**powers * torch.where(torch.rand(dims, generator=source) < 0.5, -1, 1)).to(device)
    shift = torch.randint(-8, 9, (dims,), generator=source).to(device) * scale
    value = tc(z, mu, logvar, impl=impl)
    moved = tc(z * scale + shift, mu * scale + shift, logvar + 2 * scale.abs().log(), impl=impl)
    torch.testing.assert_close(moved, value, rtol=1e-3, atol=1e-3)
    roll = first % batch  # MSS depends on neighbours, which a rotation of the batch keeps
    rolled = tc(*(x.roll(-roll, 0) for x in (z, mu, logvar)), impl=impl)
    torch.testing.assert_close(rolled, value.roll(-roll), rtol=1e-4, atol=1e-4)


@few
@given(batch=st.integers(12, 60), dims=st.integers(1, 8), seed=seeds)
def test_gaussian_total_correlation_of_each_dimension_in_its_own_units(batch: int, dims: int, seed: int) -> None:
    z = drawn((batch, dims), seed)
    source = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-90, 91, (dims,), generator=source) * torch.where(torch.arange(dims) % 2 == 0, 1, -1)
    value = gaussian_total_correlation(z)
    torch.testing.assert_close(gaussian_total_correlation(z * scale), value, rtol=1e-4, atol=1e-5)
    order = shuffled(batch, seed, "cpu")
    torch.testing.assert_close(gaussian_total_correlation(z[order]), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("server", SERVERS["covariance_penalty"])
@few
@given(batch=st.integers(2, 30), dims=st.integers(1, 30), by=st.integers(1, 29), normalize=st.booleans(), seed=seeds)
def test_covariance_of_a_rotated_batch(
    server: Server, batch: int, dims: int, by: int, normalize: bool, seed: int
) -> None:
    """Differences are relative to another first row.

    The parts and their gradients rotate with the batch.
    """
    impl, device = server
    batch, dims = small(server, batch, dims)
    z = drawn((batch, dims), seed).to(device) + 3.0
    call = lambda z, impl: covariance_penalty(z, normalize, impl=impl)  # noqa: E731
    (value,), (grad,) = run(call, leaves((z,), device=device), impl, pull=torch.ones_like)
    (turned,), (moved,) = run(call, leaves((z.roll(by, 0),), device=device), impl, pull=torch.ones_like)
    size = {"rtol": 1e-3, "atol": 1e-4 * (1 + value.abs().max().item())}
    torch.testing.assert_close(turned, value.roll(by, 0), **size)
    torch.testing.assert_close(moved, grad.roll(by, 0), rtol=1e-3, atol=1e-3 * (1e-3 + grad.abs().max().item()))


@pytest.mark.parametrize("server", SERVERS["gaussian_kl"])
@few
@given(batch=st.integers(1, 40), size=st.integers(1, 6), more=st.integers(0, 30), where=st.floats(0.05, 0.95))
def test_kl_is_least_at_its_prior(server: Server, batch: int, size: int, more: int, where: float) -> None:
    """At the standard normal, value and gradient are 0. With a block prior, no mean has a lower value than 0."""
    impl, device = server
    zero = torch.zeros(batch, size + more)
    (value,), grads = run(gaussian_kl, leaves((zero, zero), device=device), impl)
    assert not value.any() and not any(g.any() for g in grads)
    least = -1 / (size - 1) if size > 1 else -1.0
    rho = least + where * (1 - least)
    block = lambda mu, logvar, impl: gaussian_kl(mu, logvar, size, rho, impl=impl)  # noqa: E731
    (value,), (grad, _) = run(block, leaves((zero, zero), device=device), impl)
    (away,), _ = run(block, leaves((zero + 0.5, zero), device=device), impl)
    assert not grad.any() and (value >= -1e-5 * (size + more)).all() and (away > value).all()
    # D log-variances of 0 cost only the correlations' part: -log det of the prior, and the diagonal of its inverse.
    block_of = torch.arange(size + more) // size
    matrix = torch.where(block_of[:, None] == block_of, torch.tensor(rho, dtype=torch.float64), 0).fill_diagonal_(1)
    want = (torch.logdet(matrix) + torch.linalg.inv(matrix).trace() - (size + more)) / 2
    assert value.double().cpu().tolist() == pytest.approx([want.item()] * batch, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("server", SERVERS["consistency_variance"])
@few
@given(count=st.integers(2, 16), batch=st.integers(1, 30), dims=st.integers(1, 20), seed=seeds)
def test_gradients_of_views_cancel(server: Server, count: int, batch: int, dims: int, seed: int) -> None:
    """Moving all views alike changes nothing, so their gradients sum to 0.

    For equal views each gradient is exactly 0.
    """
    impl, device = server
    batch, dims = small(server, batch, dims)
    x = drawn((count, batch, dims), seed)
    (value,), (grad,) = run(consistency_variance, leaves((x,), device=device), impl)
    assert grad.sum(0).abs().max() <= 1e-6 * (1 + count * grad.abs().max().item())
    (same,), (none,) = run(consistency_variance, leaves((x[:1].expand(x.shape),), device=device), impl)
    assert not same.any() and not none.any() and (value > 0).all()
