"""Test min_goal_loss: every implementation against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import (
    Box,
    ConstraintTable,
    Lower,
    MinGoalStats,
    Minimize,
    MinimizeHard,
    Upper,
    min_goal_loss,
)
from tests.support.goals import LAYOUTS, REDUCTIONS, SIX, grad_of, leaf
from tests.support.servers import servers
from tests.support.tolerances import assert_as_good_as_eager

IMPLS = pytest.mark.parametrize("server", servers("min_goal"))


def run(
    goals: list[Tensor] | Tensor, constraints: object, reduction: str, impl: str | None
) -> tuple[Tensor, MinGoalStats]:
    loss, stats = min_goal_loss(goals, constraints, reduction=reduction, return_stats=True, impl=impl)  # type: ignore[arg-type]
    weight = torch.arange(1, loss.numel() + 1, dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weight).sum().backward()
    return loss, stats


def check_against_oracle(
    raw: list[Tensor], constraints: object, reduction: str, server: tuple[str, str], lay: object
) -> None:
    """Compare loss, gradients and stats of ``server`` with float64, on goals laid out by ``lay``.

    The bottlenecks must be equal.
    """
    impl, device = server
    ours = [leaf(x, x.dtype, device) for x in raw]
    eager = [leaf(x, torch.float32, "cpu") for x in raw]
    exact = [leaf(x, torch.float64, "cpu") for x in raw]
    loss, stats = run(lay(ours), constraints, reduction, impl)  # type: ignore[operator]
    loss32, stats32 = run(eager, constraints, reduction, "reference")
    loss64, stats64 = run(exact, constraints, reduction, "reference")
    assert loss.dtype == (torch.float64 if any(x.dtype == torch.float64 for x in raw) else torch.float32)
    assert_as_good_as_eager(loss, loss32, loss64)
    assert torch.equal(stats.bottleneck.cpu(), stats64.bottleneck)
    assert_as_good_as_eager(stats.share, stats32.share, stats64.share)
    # A GPU adds scores up in a tree; Triton's interpreter adds them one by one.
    one_by_one = impl == "triton" and device == "cpu"
    assert_as_good_as_eager(stats.level, stats32.level, stats64.level, slack=1e-5 if one_by_one else 1e-6)
    assert bool(stats.finite) == bool(stats64.finite)
    for x, x32, x64 in zip(ours, eager, exact, strict=True):
        assert grad_of(x).dtype == x.dtype
        # A half gradient is the float32 gradient, rounded once.
        slack = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(x.dtype, 1e-6)
        assert_as_good_as_eager(grad_of(x), grad_of(x32), grad_of(x64), slack)


def as_is(goals: list[Tensor]) -> list[Tensor]:
    return goals


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 64, 513, 20_000])
@pytest.mark.parametrize("scored", [False, True], ids=["raw", "scores"])
def test_oracle(server: tuple[str, str], reduction: str, batch: int, scored: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    raw = [torch.rand(batch, generator=generator) * 1.3 + 1e-3 for _ in range(5)] + [torch.tensor(0.31)]
    check_against_oracle(raw, None if scored else SIX, reduction, server, as_is)


@IMPLS
@pytest.mark.parametrize("count", [1, 2, 9, 33, 64])
def test_number_of_goals(server: tuple[str, str], count: int) -> None:
    raw = list(torch.rand(count, 50))
    constraints = [SIX[k % 6] for k in range(count)]
    check_against_oracle(raw, constraints, "mean", server, as_is)
    check_against_oracle(raw, MinimizeHard(0.2), "mean", server, as_is)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mixed_dtypes(server: tuple[str, str], reduction: str) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32)
    raw = [(torch.rand(100) * 1.3).to(t) for t in kinds]
    raw[4] = torch.tensor(0.25, dtype=torch.bfloat16)
    check_against_oracle(raw, SIX, reduction, server, as_is)
    raw[1] = raw[1].double()
    check_against_oracle(raw, SIX, reduction, server, as_is)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, dtype: torch.dtype) -> None:
    raw = [(torch.rand(70) * 1.3).to(dtype) for _ in range(6)]
    check_against_oracle(raw, SIX, "mean", server, LAYOUTS[layout])


@IMPLS
def test_batch_level_and_expanded_goals(server: tuple[str, str]) -> None:
    raw = [torch.rand(70) * 1.3 for _ in range(4)] + [torch.tensor(0.7), torch.tensor(0.1)]
    check_against_oracle(raw, SIX, "mean", server, lambda g: [*g[:4], g[4].expand(70), g[5]])
    only = [torch.tensor(0.7), torch.tensor(0.1)]
    check_against_oracle(only, SIX[:2], "none", server, as_is)


@IMPLS
def test_one_sample_vector(server: tuple[str, str]) -> None:
    impl, device = server
    scores = torch.tensor([0.5, 0.2, 0.9], device=device, requires_grad=True)
    loss = min_goal_loss(scores, impl=impl)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(-math.log(0.2))
    assert scores.grad.tolist() == pytest.approx([0, -5, 0])  # type: ignore[union-attr]


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ties_go_to_the_first(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    x = torch.full((40, 5), 0.25, device=device)
    x[:, 3:] = 0.5
    x[1::2, 0] = 0.125
    x.requires_grad_()
    loss, stats = min_goal_loss(x, Minimize(0.5), reduction=reduction, return_stats=True, impl=impl)
    loss.sum().backward()
    assert stats.bottleneck.unique().tolist() == [3]
    owners = x.grad.nonzero().tolist()  # type: ignore[union-attr]
    assert owners == ([[0, 3]] if reduction == "min" else [[b, 3] for b in range(40)])
    assert stats.share.tolist() == [0, 0, 0, 1, 0]


@IMPLS
def test_scores_whose_logarithms_are_the_same(server: tuple[str, str]) -> None:
    """The lower of two scores is the worse one, even if their logarithms round to the same number."""
    impl, device = server
    high = torch.tensor([1e4, 0.7, 3.0])
    x = torch.stack([high, high.nextafter(torch.tensor(0.0)), high], 1).to(device).requires_grad_()
    loss, stats = min_goal_loss(x, reduction="sum", return_stats=True, impl=impl)
    loss.backward()
    assert stats.bottleneck.tolist() == [1, 1, 1]
    assert x.grad.nonzero().tolist() == [[b, 1] for b in range(3)]  # type: ignore[union-attr]


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scored", [False, True], ids=["raw", "scores"])
def test_nan_is_the_worst_there_is(server: tuple[str, str], reduction: str, scored: bool) -> None:
    impl, device = server
    x = torch.rand(33, 6) * 0.5 + 0.1
    x[7, 2] = x[7, 4] = x[20, 5] = math.nan
    x[3, 1] = -1.0 if scored else math.inf  # an infeasible goal comes earlier, but NaN is worse
    x = leaf(x, torch.float32, device)
    loss, stats = min_goal_loss(x, None if scored else SIX[:1] * 6, reduction=reduction, return_stats=True, impl=impl)
    loss.sum().backward()
    assert stats.bottleneck[[3, 7, 20]].tolist() == [1, 2, 5] and not bool(stats.finite)
    per_sample = min_goal_loss(x, None if scored else SIX[:1] * 6, reduction="none", impl=impl)
    assert per_sample.isnan().nonzero().flatten().tolist() == [7, 20] and per_sample[3].item() == math.inf
    assert x.grad.isfinite().all() and (x.grad[[3, 7, 20]] == 0).all()  # type: ignore[union-attr,index]
    if reduction == "none":
        assert torch.equal(loss.isnan(), per_sample.isnan())
    else:
        assert loss.isnan()
    if reduction == "min":
        assert stats.share.tolist() == [0, 0, 1, 0, 0, 0]  # the first NaN has the share
    assert stats.level.isnan().nonzero().flatten().tolist() == [2, 4, 5]


@IMPLS
@pytest.mark.parametrize(
    ("constraint", "raw"),
    [
        (None, 0.0),
        (None, -0.5),
        (None, math.inf),
        (None, -math.inf),
        (Minimize(0.5), math.inf),
        (Minimize(0.5), -math.inf),
        (Minimize(1e-3), 3e38),
        (MinimizeHard(0.5), math.inf),
        (Upper(0.0, 1.0), math.inf),
        (Lower(0.0, 1.0), -math.inf),
        (Box(0.0, 1.0), -math.inf),
    ],
)
def test_infeasible(server: tuple[str, str], constraint: object, raw: float) -> None:
    impl, device = server
    x = torch.full((20, 3), 0.4, device=device)
    x[11, 1] = raw
    x.requires_grad_()
    loss, stats = min_goal_loss(x, constraint, return_stats=True, impl=impl)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == math.inf and not bool(stats.finite) and int(stats.bottleneck[11]) == 1
    assert (x.grad[11] == 0).all() and x.grad.isfinite().all()  # type: ignore[index,union-attr]


@IMPLS
def test_infinity_on_the_satisfied_side_is_satisfied(server: tuple[str, str]) -> None:
    impl, device = server
    goals = [torch.tensor([-math.inf, 0.0], device=device), torch.tensor([math.inf, 0.0], device=device)]
    loss = min_goal_loss(goals, [Upper(0.0, 1.0), Lower(0.0, 1.0)], reduction="none", impl=impl)
    assert loss.tolist() == [0, 0]


@IMPLS
def test_far_away_and_satisfied(server: tuple[str, str]) -> None:
    """At 1e4 scales, the loss is 1e4 and the gradient 1/scale, where log(exp(.)) would overflow.

    At score 1 there is no gradient.
    """
    impl, device = server
    x = torch.tensor([1e4 * 0.39], device=device, requires_grad=True)
    loss = min_goal_loss([x], Minimize(0.39), impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(1e4, rel=1e-6) and x.grad.item() == pytest.approx(1 / 0.39, rel=1e-6)  # type: ignore[arg-type]
    far = torch.tensor([1e25], device=device, requires_grad=True)
    loss = min_goal_loss([far], MinimizeHard(1.0), impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(50 * math.log(10)) and far.grad.item() == pytest.approx(2e-25)  # type: ignore[arg-type]
    at = [torch.tensor([0.5], device=device, requires_grad=True) for _ in range(2)]
    min_goal_loss(at, [Upper(0.5, 0.1), Lower(0.5, 0.1)], impl=impl).backward()
    assert [grad_of(a).item() for a in at] == [0, 0]


@IMPLS
@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), min_size=1, max_size=40),
    reduction=st.sampled_from(REDUCTIONS),
    order=st.randoms(use_true_random=False),
)
def test_properties(server: tuple[str, str], rows: list[list[float]], reduction: str, order: object) -> None:
    impl, device = server
    x = torch.tensor(rows, device=device)
    loss, stats = min_goal_loss(x, SIX, reduction=reduction, return_stats=True, impl=impl)
    none = min_goal_loss(x, SIX, reduction="none", impl=impl)
    assert float(stats.share.sum()) == pytest.approx(1, abs=1e-5)
    # The loss is bitwise the largest of the single goals' deficits.
    alone = torch.stack([min_goal_loss([x[:, k]], SIX[k], reduction="none", impl=impl) for k in range(6)], 1)
    assert torch.equal(none, alone.amax(1)) and torch.equal(alone.argmax(1), _first_max(alone))
    assert torch.equal(stats.bottleneck, _first_max(alone))
    # Permuted samples give permuted outputs. An added satisfied goal changes nothing.
    rows_order = list(range(len(rows)))
    order.shuffle(rows_order)  # type: ignore[attr-defined]
    assert torch.equal(min_goal_loss(x[rows_order], SIX, reduction="none", impl=impl), none[rows_order])
    more = torch.cat([x, torch.full_like(x[:, :1], -9.0)], 1)
    assert torch.equal(
        min_goal_loss(more, [*SIX, Upper(0.0, 1.0)], reduction=reduction, impl=impl), loss.clamp(min=0)
    ) or (none.min() < 0)
    # Multiplying raw values and scales by a power of two gives the same bits.
    scaled = min_goal_loss(x * 4, Minimize(2.0), reduction=reduction, impl=impl)
    assert torch.equal(scaled, min_goal_loss(x, Minimize(0.5), reduction=reduction, impl=impl))


def _first_max(d: Tensor) -> Tensor:
    return (d == d.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    raw = [leaf(torch.rand(7) + 0.05, torch.float64, device) for _ in range(5)]
    raw.append(leaf(torch.tensor(0.6), torch.float64, device))
    assert torch.autograd.gradcheck(lambda *g: min_goal_loss(list(g), SIX, reduction=reduction, impl=impl), raw)
    assert torch.autograd.gradcheck(lambda *g: min_goal_loss(list(g), reduction=reduction, impl=impl), raw)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_beyond_its_dtype_is_infinite(server: tuple[str, str], reduction: str) -> None:
    """The gradient is infinite for batch-level and per-sample goals, so that a GradScaler sees it.

    It is no error.
    """
    impl, device = server
    for dtypes, number in (((torch.float16, torch.float32), 1e-6), ((torch.float32, torch.float64), 1e-40)):
        for batch_level in (False, True):
            score = leaf(torch.tensor(number) if batch_level else torch.full((5,), number), dtypes[0], device)
            other = torch.full((5,), 0.5, dtype=dtypes[1], device=device)
            loss = min_goal_loss([score, other], reduction=reduction, impl=impl)
            loss.sum().backward()
            assert loss.isfinite().all() and score.grad.amin() == -math.inf  # type: ignore[union-attr]


@IMPLS
def test_only_what_needs_a_gradient_gets_one(server: tuple[str, str]) -> None:
    impl, device = server
    raw = [torch.rand(9, device=device) for _ in range(6)]
    raw[2][4] = 100.0  # the worst goal of its sample, because routing leaves others out
    raw[2].requires_grad_()
    min_goal_loss(raw, SIX, impl=impl).backward()
    assert [x.grad is not None for x in raw] == [k == 2 for k in range(6)]
    with torch.no_grad():
        assert not min_goal_loss(raw, SIX, impl=impl).requires_grad


@IMPLS
def test_stats_have_no_gradient_and_no_influence(server: tuple[str, str]) -> None:
    impl, device = server
    x = torch.rand(50, 6, device=device, requires_grad=True)
    for reduction in REDUCTIONS:
        loss, stats = min_goal_loss(x, SIX, reduction=reduction, return_stats=True, impl=impl)
        assert torch.equal(loss, min_goal_loss(x, SIX, reduction=reduction, impl=impl))
        assert isinstance(stats, MinGoalStats) and not any(s.requires_grad for s in stats)
        assert stats.bottleneck.dtype == torch.int64 and stats.finite.dtype == torch.bool


def test_table_in_float32_serves_float64_goals_only_if_it_is_float64() -> None:
    x = torch.rand(4, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="params must be"):
        min_goal_loss(x, ConstraintTable([Minimize(1.0), Minimize(2.0)]))
    min_goal_loss(x, ConstraintTable([Minimize(1.0), Minimize(2.0)], dtype=torch.float64))


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_below_the_rounding_of_one_has_its_tangent_at_the_edge(
    server: tuple[str, str], dtype: torch.dtype
) -> None:
    """If 1 - tail rounds to 1, the tangent starts at the edge.

    The edge itself is then past the seam, and the inner side would give log(0) and 0 / 0.
    """
    impl, device = server
    tail = 1e-20
    x = torch.tensor([1.0, 0.5], dtype=dtype, device=device, requires_grad=True)
    loss = min_goal_loss([x], Box(-1.0, 1.0, tail), reduction="none", impl=impl)
    loss.sum().backward()
    want = torch.tensor([1 - math.log(tail), -math.log(0.5)], dtype=dtype)
    torch.testing.assert_close(loss.detach().cpu(), want)
    torch.testing.assert_close(grad_of(x).cpu(), torch.tensor([1 / tail, 2.0], dtype=dtype))
