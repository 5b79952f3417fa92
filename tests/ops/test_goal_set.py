"""Test the op goal_set: every implementation against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bomkern import Lower, Minimize, MinimizeHard, Upper, min_goal_loss
from bomkern.common.reductions import REDUCTIONS as CODES
from bomkern.reference import record_parts
from tests.support.goal_set_op import (
    BAD,
    EACH_GROUPING,
    GROUPINGS,
    INF,
    NAN,
    Places,
    call,
    check,
    check_places,
    numbers,
    ramp,
    raw_values,
    run,
)
from tests.support.goals import LAYOUTS, SIX
from tests.support.servers import only_cpu, servers
from tests.support.statistics import shuffled

SERVERS = servers("goal_set")
IMPLS = pytest.mark.parametrize("server", SERVERS)
REDUCTIONS = tuple(CODES)


@IMPLS
@EACH_GROUPING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("batch", [1, 2, 17, 64, 513, 9000])
def test_oracle(server: tuple[str, str], batch: int, mu: float, reduction: str, groups: list[int]) -> None:
    raw = [*raw_values(batch)[:5], torch.tensor(0.31)]
    # For nearly equal goals, the relative error of a weight is the error of their difference over mu.
    check(raw, server, groups=groups, mu=mu, reduction=reduction, slack=4e-6 if mu == 0.05 else 1e-6)


@IMPLS
@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2, 9, 33, 64])
def test_number_of_goals(server: tuple[str, str], count: int, mu: float) -> None:
    constraints = [SIX[k % 6] for k in range(count)]
    raw = raw_values(50, count)
    for groups in (range(count), [k // 3 for k in range(count)], [0] * count):
        check(raw, server, constraints=constraints, groups=groups, mu=mu)
        check(raw, server, constraints=[MinimizeHard(0.2)] * count, groups=groups, mu=mu, reduction="min")
        check(raw, server, constraints=constraints, groups=groups, mu=mu, lay=lambda g: torch.stack(g, 1))


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_mixed_dtypes(server: tuple[str, str], mu: float, reduction: str) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32)
    raw = [x.to(t) for x, t in zip(raw_values(100), kinds, strict=True)]
    raw[4] = torch.tensor(0.25, dtype=torch.bfloat16)
    for groups in GROUPINGS.values():
        check(raw, server, groups=groups, mu=mu, reduction=reduction)
    raw[1] = raw[1].double()
    check(raw, server, groups=GROUPINGS["grouped"], mu=mu, reduction=reduction)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, dtype: torch.dtype) -> None:
    for batch, groups in ((70, "grouped"), (72, "alone"), (3, "one")):
        check(raw_values(batch, dtype=dtype), server, lay=LAYOUTS[layout], groups=GROUPINGS[groups], mu=0.2)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batch_level_and_expanded_goals(server: tuple[str, str], reduction: str) -> None:
    raw = [*raw_values(70)[:4], torch.tensor(0.7), torch.tensor(0.1)]
    expanded = lambda g: [*g[:4], g[4].expand(70), g[5]]  # noqa: E731
    check(raw, server, lay=expanded, mu=0.3, reduction=reduction)
    only = [torch.tensor(0.7), torch.tensor(0.1)]
    for groups in ([0, 1], [0, 0]):
        check(only, server, groups=groups, constraints=SIX[:2], mu=0.3, reduction=reduction)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_ties_go_to_the_first(server: tuple[str, str], mu: float, reduction: str) -> None:
    """Tied goals share the gradient if smoothed.

    The bottleneck is the first of them in any case, and so is the sample that "min" takes.
    """
    raw = [torch.full((40,), x) for x in (0.25, 0.25, 0.25, 0.5, 0.5)]
    raw[0][1::2] = 0.125
    how = {"constraints": [Minimize(0.5)] * 5, "mu": mu, "reduction": reduction}
    check(raw, server, **how)
    (_, bottleneck, record), grads = run(raw, server[0], device=server[1], **how)
    assert bottleneck.unique().tolist() == [3]
    if mu == 0:
        assert record[:5].tolist() == [0, 0, 0, 1, 0] and not any(grads[k].any() for k in (0, 1, 2, 4))
    if reduction == "min":
        assert grads[3].nonzero().flatten().tolist() == [0]


@IMPLS
@EACH_GROUPING
@pytest.mark.parametrize("mu", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("places", BAD)
def test_what_is_not_finite(
    server: tuple[str, str], places: Places, reduction: str, mu: float, groups: list[int]
) -> None:
    check_places(raw_values(33), server, places, groups=groups, mu=mu, reduction=reduction)


@IMPLS
def test_far_away(server: tuple[str, str]) -> None:
    """At 1e4 scales, the loss is 1e4 and the gradient 1 / scale, also where r^2 overflows.

    At score 1 there is no gradient.
    """
    impl, device = server
    for mu in (0.0, 0.1):
        far = [torch.tensor([1e4 * 0.39]), torch.tensor([0.2])]
        (loss, *_), grads = run(
            far, impl, device=device, constraints=(Minimize(0.39),) * 2, mu=mu, pull=torch.ones_like
        )
        assert loss.item() == pytest.approx(1e4, rel=1e-6) and grads[0].item() == pytest.approx(1 / 0.39, rel=1e-6)
        (loss, *_), (grad,) = run(
            [torch.tensor([1e25])], impl, device=device, constraints=(MinimizeHard(1.0),), mu=mu, pull=torch.ones_like
        )
        assert loss.item() == pytest.approx(50 * math.log(10)) and grad.item() == pytest.approx(2e-25)
    at = [torch.tensor([0.5]), torch.tensor([0.5])]
    _, grads = run(at, impl, device=device, constraints=[Upper(0.5, 0.1), Lower(0.5, 0.1)], mu=0.1)
    assert [g.item() for g in grads] == [0, 0]


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [1, 50, 5000])
def test_hard_and_alone_is_min_goal(server: tuple[str, str], batch: int, reduction: str) -> None:
    """The results are bitwise equal on the CPU. Other devices add up in another order."""
    impl, device = server
    leaves = [x.to(device).requires_grad_() for x in raw_values(batch)]
    for lay in (list, lambda g: [torch.stack(g, 1)]):
        loss, bottleneck, record = call(lay(leaves), impl, reduction=reduction)
        other, stats = (
            min_goal_loss(lay(leaves), SIX, reduction=reduction, return_stats=True, impl=impl)
            if lay is list
            else min_goal_loss(lay(leaves)[0], SIX, reduction=reduction, return_stats=True, impl=impl)
        )
        parts = record_parts(record, 6, 6)
        assert torch.equal(bottleneck, stats.bottleneck) and torch.equal(parts["share"], stats.share)
        assert bool(parts["finite"]) == bool(stats.finite)
        close = {"rtol": 0, "atol": 0} if impl in ("cpu", "reference") else {"rtol": 2e-6, "atol": 1e-6}
        torch.testing.assert_close(loss, other, **close)
        torch.testing.assert_close(parts["level"], stats.level, **close)
        grads = [torch.autograd.grad(x, leaves, ramp(x), materialize_grads=True) for x in (loss, other)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@IMPLS
@settings(max_examples=40)
@given(
    rows=numbers,
    reduction=st.sampled_from(REDUCTIONS),
    mu=st.sampled_from([0.0, 0.01, 0.5, 10.0]),
    seed=st.integers(0, 9),
)
def test_properties(server: tuple[str, str], rows: list[list[float]], reduction: str, mu: float, seed: int) -> None:
    impl, device = server
    x = torch.tensor(rows, device=device)
    columns = list(x.unbind(1))
    for groups in GROUPINGS.values():
        goals = groups[-1] + 1
        none, bottleneck, record = call(columns, impl, groups=groups, mu=mu, reduction="none")
        reduced, _, other = call(columns, impl, groups=groups, mu=mu, reduction=reduction)
        parts = record_parts(other, goals, 6)
        assert float(parts["share"].sum()) == pytest.approx(1, abs=1e-5)
        if reduction != "none":
            assert torch.equal(parts["loss"], reduced)
            whole = {"mean": none.mean(), "sum": none.sum(), "min": none.max()}[reduction]
            torch.testing.assert_close(reduced, whole, rtol=1e-5, atol=1e-5)
        # The loss lies between the worst deficit and mu log G above it. A smaller mu brings it nearer to the worst
        # deficit.
        hard, first, _ = call(columns, impl, groups=groups, reduction="none")
        slack = 1e-5 * (1 + hard.abs().max().item())
        assert torch.equal(bottleneck, first)
        assert (none >= hard - slack).all() and (none <= hard + mu * math.log(goals) + slack).all()
        # Permuted samples give permuted results.
        order = shuffled(len(x), seed, device)
        again, places, same = call(list(x[order].unbind(1)), impl, groups=groups, mu=mu, reduction="none")
        assert torch.equal(again, none[order]) and torch.equal(places, bottleneck[order])
        torch.testing.assert_close(same, record, rtol=1e-5, atol=1e-5)


@IMPLS
@settings(max_examples=20)
@given(rows=numbers, mu=st.sampled_from([0.0, 0.3]), k=st.integers(0, 5), copies=st.integers(1, 5))
def test_a_group_of_copies_is_its_member(
    server: tuple[str, str], rows: list[list[float]], mu: float, k: int, copies: int
) -> None:
    impl, device = server
    raw = list(torch.tensor(rows).unbind(1))
    many = [*raw[:k], *[raw[k]] * copies, *raw[k + 1 :]]
    constraints = [*SIX[:k], *[SIX[k]] * copies, *SIX[k + 1 :]]
    groups = [*range(k), *[k] * copies, *range(k + 1, 6)]
    one, grads = run(raw, impl, device=device, mu=mu)
    all_of_them, others = run(many, impl, device=device, constraints=constraints, groups=groups, mu=mu)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(all_of_them[0], one[0], **close)
    for part in ("share", "level", "deficit"):
        a, b = record_parts(all_of_them[2], 6, 5 + copies)[part], record_parts(one[2], 6, 6)[part]
        # Rounding may decide which of several equal goals is the bottleneck.
        ties = mu == 0 and copies > 1
        if not (ties and part == "share"):
            torch.testing.assert_close(a, b, **close)
    if copies == 1:
        assert all(torch.equal(a, b) for a, b in zip(others, grads, strict=True))
    elif mu > 0:
        torch.testing.assert_close(sum(others[k : k + copies]), grads[k], **close)


@IMPLS
@pytest.mark.parametrize("groups", [GROUPINGS["alone"], GROUPINGS["grouped"]], ids=["alone", "grouped"])
def test_goes_to_hard_with_mu(server: tuple[str, str], groups: list[int]) -> None:
    impl, device = server
    raw = raw_values(200)
    hard, hard_grads = run(raw, impl, device=device, groups=groups)
    before = INF
    for mu in (1.0, 0.1, 0.01, 1e-3, 1e-6, 1e-30, 1e-45):
        soft, grads = run(raw, impl, device=device, groups=groups, mu=mu)
        apart = (soft[2] - hard[2]).abs().max().item()
        assert apart <= before
        before = apart
    assert apart < 1e-6
    for a, b in zip(grads, hard_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for mu in (-1.0, NAN):
        assert torch.equal(run(raw, impl, device=device, groups=groups, mu=mu)[0][2], hard[2])


@IMPLS
@EACH_GROUPING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_gradcheck(server: tuple[str, str], mu: float, reduction: str, groups: list[int]) -> None:
    impl, device = server
    raw = [x.double().add(0.05).to(device).requires_grad_() for x in raw_values(7)[:5]]
    raw.append(torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True))
    assert torch.autograd.gradcheck(lambda *g: call(g, impl, groups=groups, mu=mu, reduction=reduction)[0], raw)


@EACH_GROUPING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_second_derivative_of_the_reference(mu: float, reduction: str, groups: list[int]) -> None:
    """The weights of a smooth maximum depend on the deficits."""
    raw = [x.double().add(0.05).requires_grad_() for x in raw_values(5)]
    how: dict[str, Any] = {"groups": groups, "mu": mu, "reduction": reduction}
    assert torch.autograd.gradgradcheck(lambda *g: call(g, "reference", **how)[0], raw)
    if mu and groups != GROUPINGS["one"]:
        grads = torch.autograd.grad(call(raw, "reference", **how)[0].sum(), raw, create_graph=True)
        mixed = torch.autograd.grad(grads[0].sum(), raw[5], allow_unused=True)[0]
        assert mixed.abs().max() > 0


@only_cpu("goal_set")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mu", [0.0, 0.2])
def test_same_bits_at_any_number_of_threads(mu: float, reduction: str) -> None:
    raw = [*raw_values(50_000)[:5], torch.tensor(0.3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = run(raw, "cpu", groups=GROUPINGS["grouped"], mu=mu, reduction=reduction)
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
