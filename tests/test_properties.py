"""Laws that hold whatever the input: of goals in any order, of units, of layouts, of threads. Each op's own file has
those that one op alone has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import (
    Box,
    BoxAsymmetric,
    Constraint,
    Lower,
    Minimize,
    MinimizeHard,
    Upper,
    consistency_variance,
    covariance_penalty,
    gaussian_kl,
    gaussian_total_correlation,
    min_goal_loss,
    total_correlation,
)
from bomkern._records import record_parts
from tests.conftest import servers
from tests.fuzz.cases import LAYOUTS, laid_out
from tests.statistics_helpers import OPS, Inputs, codes, leaves, only_cpu, run, shuffled
from tests.test_goal_set_op import call as goal_set
from tests.test_goal_set_op import run as run_goal_set
from tests.test_min_goal import REDUCTIONS

Server = tuple[str, str]
SERVERS = {op: servers(op) for op in (*OPS, "min_goal", "goal_set", "total_correlation")}
RULE = pytest.mark.parametrize("server", SERVERS["min_goal"])
few = settings(max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def small(server: Server, *sizes: int) -> tuple[int, ...]:
    """Sizes that Triton's interpreter gets through."""
    return tuple(min(n, 6) for n in sizes) if server == ("triton", "cpu") else sizes


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constraints_of(count: int, seed: int, unit: float = 1.0) -> list[Constraint]:
    """All six kinds in turn, with numbers of their own, in units of raw values."""
    spread = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.3
    made: list[Constraint] = []
    for k, s in enumerate((spread * unit).tolist()):
        kinds = (
            lambda s: Minimize(s, 0.25 * unit),
            lambda s: MinimizeHard(s),
            lambda s: Upper(0.5 * unit, s),
            lambda s: Lower(0.5 * unit, s),
            lambda s: Box(-s, s + unit),
            lambda s: BoxAsymmetric(-s, 0.25 * unit, s + unit, 0.3),
        )
        made.append(kinds[k % 6](s))
    return made


# The rule.


@RULE
@few
@given(batch=st.integers(1, 70), count=st.integers(1, 14), seed=seeds, reduction=st.sampled_from(REDUCTIONS))
def test_goals_permuted_permute_what_is_told_of_them(
    server: Server, batch: int, count: int, seed: int, reduction: str
) -> None:
    impl, device = server
    batch, count = small(server, batch, count)
    x, constraints = drawn((batch, count), seed), constraints_of(count, seed)
    order = shuffled(count, seed, "cpu").tolist()
    plain, moved = leaves((x,), device=device)[0], leaves((x[:, order],), device=device)[0]
    loss, stats = min_goal_loss(plain, constraints, reduction=reduction, return_stats=True, impl=impl)
    turned, told = min_goal_loss(
        moved, [constraints[k] for k in order], reduction=reduction, return_stats=True, impl=impl
    )
    assert torch.equal(loss, turned)
    places = torch.tensor(order, device=device)
    assert torch.equal(places[told.bottleneck], stats.bottleneck)
    assert torch.equal(told.share, stats.share[places])
    torch.testing.assert_close(told.level, stats.level[places], rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in ((loss, plain), (turned, moved))]
    assert torch.equal(grads[1], grads[0][:, order])


@RULE
@few
@given(batch=st.integers(1, 70), count=st.integers(1, 14), seed=seeds, mu=st.sampled_from([0.0, 0.3]))
def test_goals_permuted_in_a_goal_set(server: Server, batch: int, count: int, seed: int, mu: float) -> None:
    impl, device = server
    batch, count = small(server, batch, count)
    x, constraints = drawn((count, batch), seed).unbind(0), constraints_of(count, seed)
    order = shuffled(count, seed, "cpu").tolist()
    (loss, bottleneck, record), grads = run_goal_set(x, impl, device=device, constraints=constraints, mu=mu)
    (turned, told, moved), others = run_goal_set(
        [x[k] for k in order], impl, device=device, constraints=[constraints[k] for k in order], mu=mu
    )
    close: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(turned, loss, **close)
    places = torch.tensor(order, device=device)
    assert torch.equal(places[told], bottleneck)
    parts, again = (record_parts(r, count, count) for r in (record, moved))
    for name in ("share", "level", "deficit", "raw", "highest", "ideal", "slope"):
        torch.testing.assert_close(again[name], parts[name][places], **close)
    for k, grad in zip(order, others, strict=True):
        torch.testing.assert_close(grad, grads[k], **close)


@RULE
@few
@given(batch=st.integers(1, 70), count=st.integers(1, 14), power=st.integers(-20, 20), seed=seeds)
def test_units_of_raw_values_do_not_matter(server: Server, batch: int, count: int, power: int, seed: int) -> None:
    """Raw values and the numbers of all six constraints times a power of two: the same bits, the gradient over it."""
    impl, device = server
    batch, count = small(server, batch, count)
    unit = 2.0**power
    x = drawn((batch, count), seed)
    found = []
    for scale in (1.0, unit):
        (leaf,) = leaves((x * scale,), device=device)
        loss, stats = min_goal_loss(leaf, constraints_of(count, seed, scale), return_stats=True, impl=impl)
        found.append((loss, *stats, torch.autograd.grad(loss, leaf)[0] * scale))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@RULE
@few
@given(batch=st.integers(1, 300), count=st.integers(1, 14), seed=seeds)
def test_reductions_are_of_the_largest_deficits(server: Server, batch: int, count: int, seed: int) -> None:
    impl, device = server
    batch, count = small(server, batch, count)
    x, constraints = drawn((batch, count), seed).to(device), constraints_of(count, seed)
    alone = torch.stack(
        [min_goal_loss([x[:, k]], constraints[k], reduction="none", impl=impl) for k in range(count)], 1
    )
    worst = alone.amax(1)
    every = {r: min_goal_loss(x, constraints, reduction=r, return_stats=True, impl=impl) for r in REDUCTIONS}
    assert torch.equal(every["none"][0], worst) and torch.equal(every["min"][0], worst.max())
    torch.testing.assert_close(every["sum"][0].double(), worst.double().sum(), rtol=1e-6, atol=1e-6 * batch)
    torch.testing.assert_close(every["mean"][0].double(), worst.double().mean(), rtol=1e-6, atol=1e-6)
    for reduction, (_, stats) in every.items():
        assert float(stats.share.sum()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(stats.bottleneck, every["none"][1].bottleneck)
        if reduction == "min":
            assert stats.share.sort().values.tolist() == [0.0] * (count - 1) + [1.0]


@RULE
@few
@given(
    batch=st.integers(1, 70),
    count=st.integers(1, 10),
    where=st.integers(0, 10),
    seed=seeds,
    reduction=st.sampled_from(REDUCTIONS),
)
def test_a_satisfied_goal_changes_nothing(
    server: Server, batch: int, count: int, where: int, seed: int, reduction: str
) -> None:
    """Wherever it stands, in the rule and, with a multiplier of 0, in a weighted sum; it gets no gradient."""
    impl, device = server
    batch, count = small(server, batch, count)
    at = min(where, count)
    x = [c.abs() + 1.0 for c in drawn((count, batch), seed).unbind(0)]  # no deficit below 0
    constraints: list[Constraint] = [Minimize(0.5 + k) for k in range(count)]
    more = [*x[:at], torch.full((batch,), -3.0), *x[at:]]
    others = [*constraints[:at], Upper(0.0, 1.0), *constraints[at:]]
    results = []
    for raw, given_constraints in ((x, constraints), (more, others)):
        goals = leaves(tuple(raw), device=device)
        loss, stats = min_goal_loss(
            list(goals), given_constraints, reduction=reduction, return_stats=True, impl=impl, route="never"
        )
        results.append((loss, stats, torch.autograd.grad(loss.sum(), goals)))
    (loss, stats, grads), (same, told, others_grads) = results
    assert torch.equal(loss, same) and not others_grads[at].any() and told.share[at] == 0
    kept = [k for k in range(count + 1) if k != at]
    assert torch.equal(told.share[kept], stats.share)
    torch.testing.assert_close(told.level[kept], stats.level, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(others_grads[k], grads[i]) for i, k in enumerate(kept))
    shift = torch.where(stats.bottleneck >= at, 1, 0)
    assert torch.equal(told.bottleneck, stats.bottleneck + shift)
    weights = [1.0 / (k + 1) for k in range(count)]
    pair = [
        goal_set(
            [g.to(device) for g in raw],
            impl,
            constraints=given_constraints,
            multipliers=multipliers,
            reduction=reduction,
        )[0]
        for raw, given_constraints, multipliers in (
            (x, constraints, weights),
            (more, others, [*weights[:at], 0.0, *weights[at:]]),
        )
    ]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@RULE
@few
@given(
    batch=st.integers(2, 70),
    layouts=st.lists(st.sampled_from(["batch-level", *LAYOUTS]), min_size=2, max_size=9),
    seed=seeds,
    reduction=st.sampled_from(REDUCTIONS),
)
def test_layouts_of_goals(server: Server, batch: int, layouts: list[str], seed: int, reduction: str) -> None:
    """Each goal has its own, a 0-dim one stands for all samples: the bits are those of contiguous [B] goals."""
    impl, device = server
    (batch,), layouts = small(server, batch), [*layouts, "plain"]
    columns = drawn((len(layouts), batch), seed).unbind(0)
    constraints = constraints_of(len(layouts), seed)
    laid = [c[0] if how == "batch-level" else laid_out(c, how) for c, how in zip(columns, layouts, strict=True)]
    laid = [x.to(device).detach().requires_grad_() for x in laid]
    plain = [x.detach().resolve_neg().expand(batch).clone(memory_format=torch.contiguous_format) for x in laid]
    plain = [x.requires_grad_() for x in plain]
    results = []
    for goals in (laid, plain):
        loss, stats = min_goal_loss(goals, constraints, reduction=reduction, return_stats=True, impl=impl)
        pull = torch.linspace(1, 2, loss.numel(), device=device).reshape(loss.shape)
        results.append((loss, *stats, torch.autograd.grad(loss, goals, pull, materialize_grads=True)))
    for a, b in zip(results[0][:-1], results[1][:-1], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0][-1], results[1][-1], strict=True):
        whole = a if a.shape == b.shape else b.sum()
        assert torch.equal(a, b) if a.shape == b.shape else torch.allclose(a, whole, rtol=1e-5, atol=1e-6)


# The statistics.

EACH = pytest.mark.parametrize(
    ("name", "server"), [pytest.param(name, p.values[0], id=f"{name}-{p.id}") for name in OPS for p in SERVERS[name]]
)


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
    """Each input has its own layout and dtype: the bits are those of contiguous inputs, gradients too."""
    impl, device = server
    batch, dims = small(server, batch, dims)
    call, make = CALLS[name]
    inputs = [x.to(t) for x, t in zip(make(batch, dims), dtypes, strict=False)]
    laid = [laid_out(x, how) for x, how in zip(inputs, layouts, strict=False)]
    if device != "cpu":  # strides kept
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
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype != torch.float32 else 1e-4, atol=1e-4)


@EVERY
@few
@given(batch=st.integers(2, 12), channels=st.integers(1, 9), side=st.integers(1, 3))
def test_channels_last(name: str, server: Server, batch: int, channels: int, side: int) -> None:
    """Codes of a convolution: its pixels as samples, one pixel of each image, and 1 x 1 maps flattened."""
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
    """Of any shape, in float32."""
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
    """z -> a z + c, mu -> a mu + c, logvar -> logvar + 2 log |a|, another a and c for each; of a single row as well."""
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
    roll = first % batch  # MSS knows neighbours: a rotation of the batch keeps them
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
    """Another first row, from which differences are taken; the parts and their gradients go round with it."""
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
@given(batch=st.integers(1, 40), blocks=st.integers(1, 6), size=st.integers(1, 6), where=st.floats(0.05, 0.95))
def test_kl_is_least_at_its_prior(server: Server, batch: int, blocks: int, size: int, where: float) -> None:
    """0 at the standard normal, where the gradient is 0; with a block prior no mean is nearer than 0."""
    impl, device = server
    zero = torch.zeros(batch, blocks * size)
    (value,), grads = run(gaussian_kl, leaves((zero, zero), device=device), impl)
    assert not value.any() and not any(g.any() for g in grads)
    least = -1 / (size - 1) if size > 1 else -1.0
    rho = least + where * (1 - least)
    block = lambda mu, logvar, impl: gaussian_kl(mu, logvar, size, rho, impl=impl)  # noqa: E731
    (value,), (grad, _) = run(block, leaves((zero, zero), device=device), impl)
    (away,), _ = run(block, leaves((zero + 0.5, zero), device=device), impl)
    assert not grad.any() and (value >= -1e-5 * blocks * size).all() and (away > value).all()
    # What D log-variances of 0 cost is what the correlations cost: -log det of the prior, and its inverse's diagonal.
    matrix = torch.full((size, size), rho, dtype=torch.float64).fill_diagonal_(1)
    want = blocks * (torch.logdet(matrix) + torch.linalg.inv(matrix).trace() - size) / 2
    assert value.double().cpu().tolist() == pytest.approx([want.item()] * batch, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("server", SERVERS["consistency_variance"])
@few
@given(count=st.integers(2, 16), batch=st.integers(1, 30), dims=st.integers(1, 20), seed=seeds)
def test_gradients_of_views_cancel(server: Server, count: int, batch: int, dims: int, seed: int) -> None:
    """All views moved alike change nothing, so their gradients add up to 0; of equal views each is exactly 0."""
    impl, device = server
    batch, dims = small(server, batch, dims)
    x = drawn((count, batch, dims), seed)
    (value,), (grad,) = run(consistency_variance, leaves((x,), device=device), impl)
    assert grad.sum(0).abs().max() <= 1e-6 * (1 + count * grad.abs().max().item())
    (same,), (none,) = run(consistency_variance, leaves((x[:1].expand(x.shape),), device=device), impl)
    assert not same.any() and not none.any() and (value > 0).all()


@only_cpu("min_goal")
@settings(max_examples=6)
@given(batch=st.integers(1, 40_000), count=st.integers(1, 12), threads=st.integers(1, 5), seed=seeds)
def test_same_bits_of_the_rule(batch: int, count: int, threads: int, seed: int) -> None:
    x, constraints = leaves(drawn((count, batch), seed).unbind(0)), constraints_of(count, seed)
    before, results = torch.get_num_threads(), []
    try:
        for used in (1, 1, threads):
            torch.set_num_threads(used)
            found = []
            for reduction in REDUCTIONS:
                loss, stats = min_goal_loss(list(x), constraints, reduction=reduction, return_stats=True, impl="cpu")
                found += [loss, *stats, *torch.autograd.grad(loss.sum(), x, materialize_grads=True)]
            soft, grads = run_goal_set(x, "cpu", constraints=constraints, mu=0.3)
            results.append([*found, *soft, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
