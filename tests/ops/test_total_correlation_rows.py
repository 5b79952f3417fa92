"""Test total_correlation of some rows against all of a batch's posteriors, as processes that share a batch need it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bomkern import reference, total_correlation
from bomkern.dispatch import select
from tests.support.servers import servers
from tests.support.tolerances import assert_as_good_as_eager
from tests.support.total_correlation import ESTIMATORS, latents, leaves

IMPLS = pytest.mark.parametrize("server", servers("total_correlation"))
CUTS = [(0, 130), (0, 1), (129, 130), (0, 64), (63, 130), (40, 77)]


def rows_of(
    serve: object, inputs: tuple[Tensor, ...], which: tuple[int | None, str], cut: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Return the values of a range of rows, and the gradients of z (of all rows, 0 elsewhere), mu and logvar."""
    z, mu, logvar = inputs
    size, estimator = which
    begin, end = cut
    value = serve(z[begin:end], mu, logvar, size, estimator == "mss", begin)  # type: ignore[operator]
    weight = torch.linspace(-1, 2, len(z), dtype=value.dtype, device=value.device)[begin:end]
    return value.detach(), *torch.autograd.grad((value * weight).sum(), inputs)


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
@pytest.mark.parametrize("cut", CUTS)
def test_rows(server: tuple[str, str], cut: tuple[int, int], which: str) -> None:
    impl, device = server
    # a larger size takes minutes under Triton's interpreter
    inputs = latents(130, 9 if server == ("triton", "cpu") else 37)
    serve = select.resolve("total_correlation", device, impl)
    got = rows_of(serve, leaves(inputs, device=device), ESTIMATORS[which], cut)
    eager = rows_of(reference.total_correlation, leaves(inputs), ESTIMATORS[which], cut)
    exact = rows_of(reference.total_correlation, leaves(inputs, torch.float64), ESTIMATORS[which], cut)
    for name, a, b, c in zip(("value", "grad z", "grad mu", "grad logvar"), got, eager, exact, strict=True):
        try:
            assert_as_good_as_eager(a, b, c, unit=1.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
def test_parts_are_the_whole(server: tuple[str, str], which: str) -> None:
    """The parts' values equal a single call's, row by row, and the parts' gradients sum to its gradients."""
    impl, device = server
    serve = select.resolve("total_correlation", device, impl)
    inputs = leaves(latents(96, 6, torch.float64), device=device)
    size, estimator = ESTIMATORS[which]
    value = serve(*inputs, size, estimator == "mss")
    weight = torch.linspace(-1, 2, len(value), dtype=value.dtype, device=device)
    grads = torch.autograd.grad((value * weight).sum(), inputs)
    parts = [rows_of(serve, inputs, ESTIMATORS[which], cut) for cut in ((0, 32), (32, 33), (33, 96))]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), value.detach(), rtol=1e-12, atol=1e-12)
    for k, grad in enumerate(grads):
        torch.testing.assert_close(sum(p[k + 1] for p in parts), grad, rtol=1e-11, atol=1e-12)


@IMPLS
def test_larger_than_every_tile(server: tuple[str, str]) -> None:
    impl, device = server
    if server in (("triton", "cpu"), ("reference", "cpu")):
        pytest.skip("hours under Triton's interpreter; the reference has no tiles")
    inputs, cut, which = latents(1500, 24), (700, 1300), (5000, "mss")
    serve = select.resolve("total_correlation", device, impl)
    got = rows_of(serve, leaves(inputs, device=device), which, cut)
    eager = rows_of(reference.total_correlation, leaves(inputs), which, cut)
    exact = rows_of(reference.total_correlation, leaves(inputs, torch.float64), which, cut)
    for a, b, c in zip(got, eager, exact, strict=True):
        assert_as_good_as_eager(a, b, c, unit=1.0)


@IMPLS
def test_bad_rows(server: tuple[str, str]) -> None:
    impl, device = server
    serve = select.resolve("total_correlation", device, impl)
    z, mu, logvar = (x.to(device) for x in latents(8, 3))
    for first, rows in ((-1, 4), (5, 4), (0, 9)):
        many = z[torch.arange(rows) % 8]
        with pytest.raises(ValueError, match="first must be at least 0"):
            serve(many, mu, logvar, None, False, first)
    with pytest.raises(ValueError, match="z must have the 3 dimensions of mu, got 2"):
        serve(z[:4, :2], mu, logvar, None, False, 0)
    with pytest.raises(ValueError, match=r"z must have the shape of mu, \[8, 3\], got \[4, 3\]"):
        serve(z[:4], mu, logvar, None, False)
    with pytest.raises(ValueError, match="dataset_size must be at least the batch size, 8"):
        serve(z[:4], mu, logvar, 7, False, 4)


@pytest.mark.parametrize("which", ESTIMATORS)
def test_gradients_in_closed_form(which: str) -> None:
    """The closed-form gradients and their own gradients equal autograd's, for any number of recomputed chunks."""
    size, estimator = ESTIMATORS[which]
    settings = size, estimator == "mss"
    inputs = leaves(latents(24, 5, torch.float64))
    weight = torch.linspace(-1, 2, 24, dtype=torch.float64)
    first = torch.autograd.grad(reference.total_correlation(*inputs, *settings), inputs, weight, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    for limit in (1, 500, 10**6):
        made = reference.total_correlation_gradients(weight, *inputs, *settings, limit=limit)
        again = torch.autograd.grad(sum(g.square().sum() for g in made), inputs)
        for a, b in zip([*made, *again], [*first, *second], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_second_derivatives_keep_no_temporary() -> None:
    """Tensors saved for a second derivative take a fraction of one [B, B, D] temporary."""
    batch, dims = 64, 16
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    inputs = leaves(latents(batch, dims, torch.float64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        made = reference.total_correlation_gradients(torch.ones(batch), *inputs, None, False, limit=4 * batch * dims)
    assert sum(kept.values()) < batch * batch * dims / 2
    torch.autograd.grad(sum(g.square().sum() for g in made), inputs)


@IMPLS
def test_public_function_takes_samples_of_some_posteriors(server: tuple[str, str]) -> None:
    """Any rows in any order have the values and gradients that they have among all of the batch."""
    impl, device = server
    inputs = leaves(latents(24, 5, torch.float64), device=device)
    z, mu, logvar = inputs
    rows = torch.tensor([7, 0, 23, 11, 4], device=device)
    weight = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)
    for size in (None, 500):
        some = total_correlation(z[rows], mu, logvar, size, impl=impl)
        among = total_correlation(z, mu, logvar, size, impl=impl)[rows]
        torch.testing.assert_close(some, among, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (some, among)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"z must have the shape of mu, \[24, 5\], got \[5, 5\]"):
        total_correlation(z[rows], mu, logvar, 500, "mss", impl=impl)
    with pytest.raises(ValueError, match=r"z must have the shape of mu, \[5, 5\], got \[24, 5\]"):
        total_correlation(z, mu[rows], logvar[rows], impl=impl)
