"""Test the three parts of the KL term: every implementation against the formula, whose temporary is B x B x D."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import KLParts, total_correlation
from bomkern.dispatch import select
from tests.support.servers import servers
from tests.support.tolerances import assert_as_good_as_eager
from tests.support.total_correlation import ESTIMATORS, Latents, latents, leaves

IMPLS = pytest.mark.parametrize("server", servers("total_correlation"))
LOG_2PI = math.log(2 * math.pi)
NAMES = (*KLParts._fields, "grad z", "grad mu", "grad logvar")


def log_normal(x: Tensor, mean: Tensor | float, logvar: Tensor) -> Tensor:
    return -0.5 * ((x - mean).square() * torch.exp(-logvar) + logvar + LOG_2PI)


def formula(z: Tensor, mu: Tensor, logvar: Tensor, size: int | None, estimator: str) -> KLParts:
    """Return the parts as Chen et al. (2018) write them."""
    batch = len(z)
    weights = torch.full((batch, batch), 1 / batch if size is None else 1 / (size * batch), dtype=torch.float64)
    if estimator == "mss" and size is not None:
        others = batch - 1
        for b in range(batch):
            weights[b] = 1 / others
            weights[b, (b + 1) % batch] = (size - others) / (size * others)
            weights[b, b] = 1 / size
    each, log_weights = log_normal(z[:, None], mu, logvar), weights.log().to(z.dtype)
    log_q = (each.sum(2) + log_weights).logsumexp(1)
    marginals = (each + log_weights[:, :, None]).logsumexp(1).sum(1)
    posterior, prior = (log_normal(z, *p).sum(1) for p in ((mu, logvar), (0.0, torch.zeros_like(z))))
    return KLParts(posterior - log_q, log_q - marginals, marginals - prior)


def run(call: Callable[..., KLParts], inputs: Latents, *options: Any) -> list[Tensor]:
    """Return the parts, and the gradients under fixed weights, which differ from part to part and sample to sample."""
    parts = call(*inputs, *options)
    weights = [torch.linspace(-1 + k, 2 - k, len(part)).to(part) for k, part in enumerate(parts)]
    loss = torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum()
    return [*(part.detach() for part in parts), *torch.autograd.grad(loss, inputs)]


def by(impl: str) -> Callable[..., KLParts]:
    return lambda *arguments: total_correlation(*arguments, parts=True, impl=impl)


def check(inputs: Latents, server: tuple[str, str], which: str, unit: float = 1.0, slack: float = 1e-6) -> None:
    """Compare with the formula in float64, at most twice the error of the formula in float32.

    The first and the last part are differences of sums over D, each of which may have two roundings of its size.
    """
    impl, device = server
    got = run(by(impl), leaves(inputs, device=device), *ESTIMATORS[which])
    eager, exact = (run(formula, leaves(inputs, dtype), *ESTIMATORS[which]) for dtype in (torch.float32, torch.float64))
    wide = inputs[0].dtype == torch.float64
    size = log_normal(*(x.double() for x in inputs)).sum(1).abs().max().item()
    for name, a, b, c, x in zip(NAMES, got, eager, exact, [*got[:3], *inputs], strict=True):
        assert a.dtype == x.dtype, name
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(a.dtype, slack)
        terms = unit
        if name in ("mutual_information", "dimension_wise_kl"):
            rounding, terms = slack if wide else 2 * torch.finfo(a.dtype).eps, max(unit, size)
        try:
            assert_as_good_as_eager(a, c if wide else b, c, rounding, terms)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
@pytest.mark.parametrize(("batch", "dims"), [(1, 1), (1, 6), (2, 3), (7, 1), (33, 5), (70, 17), (130, 130)])
def test_oracle(server: tuple[str, str], batch: int, dims: int, which: str) -> None:
    if which == "mss" and batch == 1:
        pytest.skip("one sample has no strata")
    check(latents(batch, dims), server, which)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(server: tuple[str, str], dtype: torch.dtype) -> None:
    check(latents(40, 6, dtype), server, "mss", slack=1e-13 if dtype == torch.float64 else 1e-6)


@IMPLS
@pytest.mark.parametrize("far", [False, True])
def test_extremes(server: tuple[str, str], far: bool) -> None:
    """Log-variances from -30 to 20, or samples 30 deviations away, where terms underflow."""
    z, mu, _ = latents(60, 8)
    if far:
        check((torch.full_like(z, 30), mu, torch.zeros_like(z)), server, "plain", unit=30**2 / 2 * 8)
    else:
        check((z, mu, torch.linspace(-30, 20, 480).reshape(8, 60).t().contiguous()), server, "plain")


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
def test_the_parts_sum_to_the_divergence_from_the_prior(server: tuple[str, str], which: str) -> None:
    """Whatever the weights: they are in two parts each, with opposite signs."""
    impl, device = server
    for batch, dims in ((1, 1), (1, 5), (2, 1), (9, 7)):
        if which == "mss" and batch == 1:
            continue
        z, mu, logvar = (x.to(device) for x in latents(batch, dims, torch.float64))
        parts = total_correlation(z, mu, logvar, *ESTIMATORS[which], parts=True, impl=impl)
        total = (log_normal(z, mu, logvar) - log_normal(z, 0.0, torch.zeros_like(z))).sum(1)
        torch.testing.assert_close(torch.stack(parts).sum(0), total, rtol=1e-12, atol=1e-12)


@IMPLS
@pytest.mark.parametrize("part", KLParts._fields)
def test_a_part_alone(server: tuple[str, str], part: str) -> None:
    """A part has its gradient if no other part is used, also under a negated gradient, which is a view."""
    impl, device = server
    ours, theirs = leaves(latents(12, 4, torch.float64), device=device), leaves(latents(12, 4, torch.float64))
    weight = torch.linspace(-1, 2, 12, dtype=torch.float64)
    value, want = getattr(by(impl)(*ours), part), getattr(formula(*theirs, None, "mws"), part)
    torch.testing.assert_close(value.detach().cpu(), want.detach(), rtol=1e-11, atol=1e-11)
    exact = torch.autograd.grad(want, theirs, weight, materialize_grads=True)
    for grad in (weight.to(device), torch._neg_view(-weight.to(device))):
        got = torch.autograd.grad(value, ours, grad, retain_graph=True, materialize_grads=True)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-11)


@IMPLS
@pytest.mark.parametrize("which", ESTIMATORS)
def test_total_correlation_is_the_same_to_the_bit(server: tuple[str, str], which: str) -> None:
    impl, device = server
    inputs = leaves(latents(70, 9), device=device)
    alone = total_correlation(*inputs, *ESTIMATORS[which], impl=impl)
    part = total_correlation(*inputs, *ESTIMATORS[which], parts=True, impl=impl).total_correlation
    assert torch.equal(alone, part)
    grads = [torch.autograd.grad(x.square().sum(), inputs) for x in (alone, part)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@IMPLS
def test_samples_of_some_posteriors(server: tuple[str, str]) -> None:
    """Rows in any order have the parts and gradients that they have among all of the batch."""
    impl, device = server
    inputs = leaves(latents(24, 5, torch.float64), device=device)
    z, mu, logvar = inputs
    for order in ([7, 0, 23, 11, 4], torch.arange(23, -1, -1).tolist()):
        rows = torch.tensor(order, device=device)
        weight = torch.linspace(-1, 2, len(rows), dtype=torch.float64, device=device)
        some = total_correlation(z[rows], mu, logvar, 500, parts=True, rows=rows, impl=impl)
        among = [part[rows] for part in total_correlation(z, mu, logvar, 500, parts=True, impl=impl)]
        for k, (a, b) in enumerate(zip(some, among, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            grads = [torch.autograd.grad((x * weight * (k + 1)).sum(), inputs, retain_graph=True) for x in (a, b)]
            torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@IMPLS
def test_nan_stays_in_its_row(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(latents(40, 6), device=device)
    with torch.no_grad():
        inputs[0][3, 2] = torch.nan
    for part in by(impl)(*inputs):
        assert part.isnan().nonzero().tolist() == [[3]]


@IMPLS
def test_every_element_is_written(server: tuple[str, str]) -> None:
    impl, device = server
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for batch, dims in ((1, 1), (33, 5), (70, 33)):
            assert all(x.isfinite().all() for x in run(by(impl), leaves(latents(batch, dims), device=device)))
    finally:
        torch.use_deterministic_algorithms(False)


@IMPLS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(server: tuple[str, str], backend: str) -> None:
    impl, device = server
    torch._dynamo.reset()
    compiled = torch.compile(by(impl), fullgraph=True, backend=backend)
    ours, theirs = leaves(latents(24, 6), device=device), leaves(latents(24, 6), device=device)
    for a, b in zip(run(compiled, ours, 500), run(by(impl), theirs, 500), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(select.extension is None, reason="not compiled")
@pytest.mark.parametrize("first", [None, 5])
@pytest.mark.parametrize("which", ["plain", "mss"])
def test_opcheck(which: str, first: int | None) -> None:
    size, estimator = ESTIMATORS[which]
    z, *posteriors = leaves(latents(9, 4))
    z = z if first is None else z.detach()[first : first + 4].requires_grad_()
    settings = (size, estimator == "mss", first)
    torch.library.opcheck(torch.ops.bomkern.total_correlation.parts, (z, *posteriors, *settings))
    plain = [x.detach() for x in (z, *posteriors)]
    _, _, *kept = torch.ops.bomkern.total_correlation.parts(*plain, *settings)
    pull = (torch.rand(len(z)), *plain, *kept, *settings, [True, False, True], torch.rand(len(z), dtype=torch.float64))
    torch.library.opcheck(torch.ops.bomkern.total_correlation_backward.default, pull)
    with pytest.raises(ValueError, match=r"grad_log_q must have shape \[\d\], got \[2\]"):
        torch.ops.bomkern.total_correlation_backward(*pull[:-1], torch.rand(2))


def test_the_names() -> None:
    parts = total_correlation(*latents(5, 3), parts=True)
    assert type(parts) is bomkern.KLParts and KLParts.__module__ == "bomkern"
    assert type(pickle.loads(pickle.dumps(parts))) is KLParts
    assert isinstance(total_correlation(*latents(5, 3), parts=False), Tensor)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"parts": 1}, TypeError, "^parts must be True or False"),
    ({"rows": torch.arange(4)}, ValueError, "^rows must be None without parts=True"),
    ({"parts": True, "z": torch.rand(3, 3)}, ValueError, "^rows must be given for 3 of 4 samples"),
    ({"parts": True, "rows": [0, 1, 2, 3]}, TypeError, "^rows must be an int64 tensor, got list: write"),
    ({"parts": True, "rows": torch.rand(4)}, TypeError, "^rows must be an int64 tensor, got torch.float32: write"),
    ({"parts": True, "rows": torch.arange(3)}, ValueError, r"^rows must have shape \[4\].*got \[3\]"),
    (
        {"parts": True, "rows": torch.arange(4), "estimator": "mss", "dataset_size": 9},
        ValueError,
        "^rows must be None for estimator 'mss'",
    ),
    ({"parts": True, "mu": torch.rand(4, 2)}, ValueError, "^mu must have the shape of z"),
]


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize(("change", "error", "names"), BAD)
def test_bad_input_is_named(impl: str | None, change: dict[str, Any], error: type[Exception], names: str) -> None:
    given: dict[str, Any] = {name: torch.rand(4, 3) for name in ("z", "mu", "logvar")}
    with pytest.raises(error, match=names):
        total_correlation(**{**given, "impl": impl, **change})


class Size:
    def __index__(self) -> int:
        return 500


SIZES = (
    *(kind(500) for kind in (numpy.int32, numpy.int64, numpy.uint16, numpy.array)),
    *(torch.tensor(500, dtype=dtype) for dtype in (torch.int16, torch.int32, torch.int64)),
    Size(),
)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{type(size).__name__}-{getattr(size, 'dtype', '')}")
def test_the_size_is_of_any_integer_type(size: Any) -> None:
    inputs = latents(9, 3)
    assert torch.equal(total_correlation(*inputs, size, "mss"), total_correlation(*inputs, 500, "mss"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (500.0, "got float: write int"),
        (numpy.float32(500), "got float32: write int"),
        (torch.tensor(500.0), "got a tensor of float: write int"),
        (True, "got bool: write len"),
        (numpy.bool_(True), "got bool.*: write len"),
        (torch.tensor(True), "got a tensor of bool: write len"),
        (torch.tensor([500]), "got Tensor: write .item"),
        ("500", "got str: write len"),
    ],
)
def test_a_size_that_is_no_integer(size: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^dataset_size must be an integer or None, {message}"):
        total_correlation(*latents(9, 3), size)


@IMPLS
def test_mss_of_a_last_batch_of_one_says_what_to_do(server: tuple[str, str]) -> None:
    impl, device = server
    one = [x.to(device) for x in latents(1, 3)]
    for parts in (False, True):
        with pytest.raises(ValueError, match=r"at least 2 samples for estimator 'mss', got 1: .*drop_last=True"):
            total_correlation(*one, 500, "mss", parts=parts, impl=impl)
    if impl in ("cpu", "cuda"):  # as a compiled graph calls it
        with pytest.raises(ValueError, match=r"at least 2 samples for estimator 'mss', got 1: .*drop_last=True"):
            torch.ops.bomkern.total_correlation(*one, 500, True)
