"""Test properties of the bottleneck rule for any input: order of goals, units, layouts and threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bomkern import Constraint, Minimize, Upper, min_goal_loss
from bomkern.reference import record_parts
from tests.fuzz.cases import LAYOUTS, laid_out
from tests.support.constraints import arguments, kinds
from tests.support.goal_set_op import call as goal_set
from tests.support.goal_set_op import run as run_goal_set
from tests.support.goals import REDUCTIONS
from tests.support.properties import Server, drawn, few, seeds, small
from tests.support.servers import only_cpu, servers
from tests.support.statistics import leaves, shuffled

RULE = pytest.mark.parametrize("server", servers("min_goal"))


def constraints_of(count: int, seed: int, unit: float = 1.0) -> list[Constraint]:
    """Return constraints of all kinds in turn, with varying arguments in units of raw values."""
    spread = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.3
    every = list(kinds().values())
    made: list[Constraint] = []
    for k, s in enumerate((spread * unit).tolist()):
        kind = every[k % len(every)]
        made.append(kind(**arguments(kind, s, 0.25 * unit, 0.3)))
    return made


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
    """Multiplying raw values and the numbers of all six constraints by a power of two gives the same bits.

    It divides the gradient by that power.
    """
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
    """A satisfied goal changes nothing at any position, in the rule and, with multiplier 0, in a weighted sum.

    It gets no gradient.
    """
    impl, device = server
    batch, count = small(server, batch, count)
    at = min(where, count)
    x = [c.abs() + 1.0 for c in drawn((count, batch), seed).unbind(0)]  # no deficit is below 0
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
    """Each goal has its own layout, and a 0-dim goal counts for all samples.

    Results are bitwise those of contiguous [B] goals.
    """
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
