"""Test `min_goal_loss(mask=)`: every implementation against a loop that leaves out what is absent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Constraint, MinGoalStats, Minimize, lazy, min_goal_loss
from bomkern.nn import MinGoalLoss
from bomkern.reference import deficit
from tests.support.goals import SIX
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
REDUCTIONS = ("mean", "sum", "none", "min")
NAN = math.nan


def drawn(batch: int, scores: bool) -> tuple[Tensor, Tensor]:
    """Return values [B, 6] with NaN, infinity or 0 wherever the mask is False, and the mask."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.rand(batch, 6, generator=generator, dtype=torch.float64) * (1.2 if scores else 1.5) + 1e-3
    mask = torch.rand(batch, 6, generator=generator) < 0.6
    mask[::4] = False
    mask[:, 3] = False
    bad = torch.tensor([NAN, math.inf, 0.0, -1.0, 1e-45], dtype=torch.float64).repeat(batch * 6)[: batch * 6].view_as(x)
    return torch.where(mask, x, bad), mask


def by_loops(x: Tensor, mask: Tensor, constraints: tuple[Constraint, ...] | None, reduction: str) -> dict[str, Any]:
    leaf = x.detach().clone().requires_grad_()
    losses: list[Tensor] = []
    bottleneck, some, levels = [], [], [[] for _ in range(6)]
    for b in range(len(x)):
        own = {}
        for k in range(6):
            if not mask[b, k]:
                continue
            if constraints is None:
                own[k] = -leaf[b, k].log()
            else:
                one = constraints[k]
                own[k] = deficit(leaf[b, k], torch.tensor(one.ramp).double(), torch.tensor(one.curve))
            levels[k].append(min(math.exp(-own[k].item()), 1.0))
        worst = max(own, key=lambda k: own[k].item()) if own else -1
        bottleneck.append(worst)
        losses.append(own[worst] if own else leaf.new_zeros(()))
        if own:
            some.append(b)
    every = torch.stack(losses)
    at = max(some, key=lambda b: every[b].item())
    loss = {"mean": every.sum() / len(some), "sum": every.sum(), "none": every, "min": every[at]}[reduction]
    takers = [bottleneck[at]] if reduction == "min" else [bottleneck[b] for b in some]
    return {
        "loss": loss.detach(),
        "grad": torch.autograd.grad(loss.sum(), leaf)[0],
        "bottleneck": torch.tensor(bottleneck),
        "share": torch.tensor([takers.count(k) / len(takers) for k in range(6)]).double(),
        "level": torch.tensor([sum(v) / len(v) if v else NAN for v in levels]).double(),
    }


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scores", [False, True])
def test_absent_entries_are_left_out(server: tuple[str, str], scores: bool, reduction: str) -> None:
    impl, device = server
    for batch in (2, 15):
        x, mask = drawn(batch, scores)
        constraints = None if scores else SIX
        want = by_loops(x, mask, constraints, reduction)
        columns = [*mask.t()[:3], torch.tensor(False), *mask.t()[4:]]
        for dtype in (torch.float32, torch.float64):
            matrix = x.to(device, dtype).requires_grad_()
            goals: Any
            for goals, given in ((matrix, mask.to(device)), (list(matrix.unbind(1)), [m.to(device) for m in columns])):
                options: dict[str, Any] = {"reduction": reduction, "impl": impl, "return_stats": True}
                loss, stats = min_goal_loss(goals, constraints, mask=given, **options)
                (grad,) = torch.autograd.grad(loss.sum(), matrix)
                assert isinstance(stats, MinGoalStats) and loss.dtype == dtype and bool(stats.finite)
                close: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6, "equal_nan": True}
                torch.testing.assert_close(loss.detach().cpu().double(), want["loss"], **close)
                torch.testing.assert_close(grad.cpu().double(), want["grad"], **close)
                assert not grad.cpu()[~mask].any() and torch.equal(stats.bottleneck.cpu(), want["bottleneck"])
                torch.testing.assert_close(stats.share.cpu().double(), want["share"], **close)
                torch.testing.assert_close(stats.level.cpu().double(), want["level"], **close)


@IMPLS
def test_bad_entries_that_are_there_still_count(server: tuple[str, str]) -> None:
    impl, device = server
    for values, loss in (
        ([0.0, 0.5], math.inf),
        ([-1.0, 0.5], math.inf),
        ([NAN, 0.5], NAN),
        ([math.inf, 0.5], math.inf),
    ):
        x = torch.tensor([values, [0.5, NAN]], device=device, requires_grad=True)
        mask = torch.tensor([[True, True], [True, False]], device=device)
        got, stats = min_goal_loss(x, mask=mask, reduction="none", return_stats=True, impl=impl)
        got.sum().backward()
        assert got[0].item() == loss or (got[0].isnan() and math.isnan(loss))
        assert got[1].item() == pytest.approx(math.log(2)) and not bool(stats.finite)
        assert x.grad.tolist() == [[0, 0], [-2, 0]]


@IMPLS
@pytest.mark.parametrize("scores", [False, True])
def test_all_present_is_no_mask(server: tuple[str, str], scores: bool) -> None:
    impl, device = server
    x = (torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) + 1e-2).to(device)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"reduction": reduction, "return_stats": True, "impl": impl}
        plain, stats = min_goal_loss(x, None if scores else SIX, **options)
        masked, others = min_goal_loss(x, None if scores else SIX, mask=torch.ones_like(x, dtype=torch.bool), **options)
        torch.testing.assert_close(masked, plain)
        for a, b in zip(others, stats, strict=True):
            torch.testing.assert_close(a, b)


@IMPLS
def test_the_level_of_what_beats_its_ideal_is_1(server: tuple[str, str]) -> None:
    impl, device = server
    raw = torch.tensor([[-4.0, 0.5], [0.0, -1e30]], device=device)
    for mask in (None, torch.ones(2, 2, dtype=torch.bool, device=device)):
        _, stats = min_goal_loss(raw, (Minimize(0.5),) * 2, mask=mask, return_stats=True, impl=impl)
        assert stats.level.tolist() == pytest.approx([1, (1 + math.exp(-1)) / 2])
        scores = torch.tensor([[3.0, 0.5], [0.2, 1.0]], device=device)
        _, stats = min_goal_loss(scores, mask=mask, return_stats=True, impl=impl)
        assert stats.level.tolist() == pytest.approx([0.6, 0.75])


def test_lazy_goals_modules_and_one_sample() -> None:
    weight, x = torch.tensor(2.0, requires_grad=True), torch.tensor([1.0, 2.0, 5.0])
    mask = [torch.tensor([True, True, False]), None]
    other = torch.tensor([3.0, 0.0, 0.0])
    for route in ("auto", "always", "never"):
        goals = [lazy(lambda v: v * weight, x), other]
        loss = min_goal_loss(goals, (Minimize(1.0),) * 2, mask=mask, reduction="none", route=route)
        assert loss.tolist() == [3, 4, 0]
        assert torch.autograd.grad(loss.sum(), weight)[0].item() == 2
    module = MinGoalLoss([Minimize(1.0)] * 2, reduction="none")
    assert module([x, other], mask=mask).tolist() == [3, 2, 0]
    assert min_goal_loss(torch.tensor([NAN, 0.5]), mask=torch.tensor([False, True])).item() == pytest.approx(
        math.log(2)
    )


def test_compiled_and_differentiated_twice() -> None:
    x = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, True, True], [True, True, False]])
    constraints = (SIX[1], SIX[0], SIX[3])
    plain = min_goal_loss(x, constraints, mask=mask)
    fast = torch.compile(lambda x: min_goal_loss(x, constraints, mask=mask), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), plain)
    (grad,) = torch.autograd.grad(plain, x)
    torch.testing.assert_close(torch.autograd.grad(fast(x), x)[0], grad)
    assert torch.autograd.gradgradcheck(lambda x: min_goal_loss(x, constraints, mask=mask), x)
    assert torch.autograd.gradgradcheck(lambda x: min_goal_loss(x, mask=mask, reduction="sum"), x)
    in_func = torch.func.grad(lambda x: min_goal_loss(x, constraints, mask=mask))(x.detach())
    torch.testing.assert_close(in_func, grad)

    def penalty(x: Tensor, mask: Tensor) -> Tensor:
        return torch.func.grad(lambda x: min_goal_loss(x, constraints, mask=mask))(x).square().sum()

    (once,) = torch.autograd.grad(min_goal_loss(x, constraints, mask=mask), x, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), x)
    torch.testing.assert_close(torch.func.grad(penalty)(x.detach(), mask), twice)
    rows = torch.func.vmap(lambda x, m: min_goal_loss(x[None], constraints, mask=m[None]))(x.detach(), mask)
    torch.testing.assert_close(rows, min_goal_loss(x, constraints, mask=mask, reduction="none").detach())


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 2), TypeError, "mask must be torch.bool, got torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"mask must have shape \[3, 2\], got \[2, 3\]"),
        (torch.ones(3, 2, dtype=torch.bool, device="meta"), ValueError, "mask is on meta, the goals on cpu"),
        ([None], ValueError, "mask must have one entry for each of the 2 goals, got 1"),
        ([None, torch.ones(2, dtype=torch.bool)], ValueError, r"mask\[1\] must have shape \[3\] or \[\], got \[2\]"),
        ([None, torch.ones(3)], TypeError, r"mask\[1\] must be torch.bool"),
        ([None, 1], TypeError, r"mask\[1\] must be a bool tensor or None, got int"),
        ("all", TypeError, r"mask must be a bool tensor \[B, K\] or a sequence of K, got str"),
    ],
)
def test_invalid_masks_are_named(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        min_goal_loss(torch.rand(3, 2), mask=mask)
