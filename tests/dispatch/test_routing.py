"""Test branch routing: goals without a share get undefined gradients, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import GoalSet, Group, Minimize, min_goal_loss
from bomkern.dispatch import select
from tests.support.routing import (
    EACH_REDUCTION,
    EACH_WAY,
    IMPLS,
    NAMES,
    SET_IMPLS,
    Branches,
    Goals,
    check_same,
    gradients,
    grouped_goals,
    named_goals,
    plain_goals,
    samples,
)

COMPILED = pytest.mark.skipif(select.extension is None, reason="not compiled")


# Equal gradients.


@IMPLS
@EACH_WAY
@EACH_REDUCTION
def test_gradients_are_the_same_to_the_bit(server: tuple[str, str], make: Any, reduction: str) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    owned = {id(make): None}
    for level in ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 3.0), (0.0, 5.0, 5.0, 0.0), (1.0, 1.0, 1.0, 1.0)):
        routed = gradients(make(server, reduction, route="always"), net, x, level=level)
        plain = gradients(make(server, reduction, route="never"), net, x, level=level)
        check_same(routed, plain, sum(g is None for g in routed))
        owned[level] = sum(g is None for g in routed)  # type: ignore[index]
    # Two of the four heads have no share, with a weight and a bias each. A group's heads have both or none.
    assert owned[(0.0, 0.0, 0.0, 3.0)] == (4 if make is grouped_goals else 6)  # type: ignore[index]


@IMPLS
@EACH_WAY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_mixed(server: tuple[str, str], make: Any, dtype: torch.dtype) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)

    def bend(raw: list[Tensor]) -> list[Tensor]:
        return [raw[0].to(dtype), raw[1], raw[2].to(dtype), raw[3].to(dtype)]

    routed, plain = (gradients(make(server, route=r), net, x, bend) for r in ("always", "never"))
    check_same(routed, plain, 4)


@IMPLS
@EACH_WAY
@EACH_REDUCTION
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_samples_that_are_not_finite(
    server: tuple[str, str], make: Any, reduction: str, bad: float, place: int
) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)

    def bend(raw: list[Tensor]) -> list[Tensor]:
        at = torch.tensor([k == 1 for k in range(8)], device=device) if place < 3 else torch.tensor(True, device=device)
        return [torch.where(at, bad, value) if k == place else value for k, value in enumerate(raw)]

    routed, plain = (gradients(make(server, reduction, route=r), net, x, bend) for r in ("always", "never"))
    check_same(routed, plain, sum(g is None for g in routed))


@IMPLS
@EACH_WAY
def test_what_only_an_unowned_branch_reaches_is_left_alone(server: tuple[str, str], make: Any) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    unowned, owned = net.heads[2].weight, net.heads[0].weight
    make(server, route="always")(net(x)).backward()
    assert unowned.grad is None and owned.grad is not None and owned.grad.any()
    unowned.grad = torch.full_like(unowned, 3.0)
    make(server, route="always")(net(x)).backward()
    assert (unowned.grad == 3).all()
    unowned.grad = None
    make(server, route="never")(net(x)).backward()
    assert unowned.grad is not None and not unowned.grad.any()


@IMPLS
def test_auto_routes_on_the_cpu_alone(server: tuple[str, str]) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    plain_goals(server)(net(x)).backward()
    assert (net.heads[2].weight.grad is None) == (device == "cpu")


@IMPLS
@EACH_WAY
@pytest.mark.parametrize("batch", [1, 3, 40, 2000])
def test_batches_of_any_size(server: tuple[str, str], make: Any, batch: int) -> None:
    if server[0] == "triton" and server[1] == "cpu" and batch > 40:
        pytest.skip("the interpreter takes long")
    device = server[1]
    net, x = Branches().to(device), samples(batch, device)
    for level in ((0.1, 0.1, 0.1, 0.1), (0.0, 0.0, 9.0, 0.0)):
        routed, plain = (gradients(make(server, route=r), net, x, level=level) for r in ("always", "never"))
        check_same(routed, plain, sum(g is None for g in routed))


@IMPLS
def test_sixty_four_goals(server: tuple[str, str]) -> None:
    leaves = [torch.full((2,), float(k), device=server[1]).requires_grad_() for k in range(64)]
    for owner in (63, 0, 31, 32):
        raw = [leaf * (100 if k == owner else 1) + (1 if k == owner else 0) for k, leaf in enumerate(leaves)]
        grads = torch.autograd.grad(plain_goals(server, route="always")(raw), leaves, allow_unused=True)
        assert [k for k, g in enumerate(grads) if g is not None] == [owner if owner else 63]


@IMPLS
def test_a_share_of_one_sample_in_many_is_a_share(server: tuple[str, str]) -> None:
    batch = 100 if server[0] == "triton" and server[1] == "cpu" else 10_000
    low, high = torch.zeros(batch, device=server[1]), torch.ones(batch, device=server[1])
    low[batch // 2] = 2
    raw = [low.requires_grad_(), high.requires_grad_()]
    for make in (plain_goals(server, route="always"), _pair(server, route="always")):
        grad = torch.autograd.grad(make(raw), low, allow_unused=True)[0]
        assert grad is not None and int(grad.count_nonzero()) == 1


def _pair(server: tuple[str, str], **how: Any) -> Goals:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), impl=server[0], **how).to(server[1])
    return lambda raw: goals({"a": raw[0], "b": raw[1]}).loss


@SET_IMPLS
@pytest.mark.parametrize("how", [{"temperature": 0.3}, {"spill": 0.5}], ids=["temperature", "spill"])
def test_where_all_have_a_share_nothing_is_left_out(server: tuple[str, str], how: dict[str, Any]) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    for make in (named_goals, grouped_goals):
        routed, plain = (gradients(make(server, route=r, **how), net, x) for r in ("always", "never"))
        check_same(routed, plain, 0)


# Branches that backward visits.


class Counted(torch.autograd.Function):
    """An identity function that counts the backward passes with a gradient, and accepts None on request."""

    seen: list[Any]

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any], takes_none: bool) -> Tensor:
        ctx.seen = seen
        if takes_none:
            ctx.set_materialize_grads(False)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.seen.append(None if grad is None else bool(grad.any()))
        return grad, None, None


@IMPLS
@EACH_WAY
def test_the_graph_of_a_goal_without_a_share_is_not_computed(server: tuple[str, str], make: Any) -> None:
    device = server[1]
    x = samples(device=device).requires_grad_()
    levels = (1.0, 1.0, 0.0, 0.0)

    def backward(route: str, takes_none: bool) -> tuple[list[list[Any]], list[Any]]:
        seen: list[list[Any]] = [[] for _ in NAMES]
        hooked: list[Any] = ["not called"] * 4
        raw = []
        for k, level in enumerate(levels):
            value = Counted.apply(x.square().sum(1), seen[k], takes_none) * 0.01 + level
            value.register_hook(lambda grad, k=k: hooked.__setitem__(k, None if grad is None else bool(grad.any())))
            raw.append(value if k < 3 else value.mean())
        make(server, route=route)(raw).backward()
        return seen, hooked

    seen, hooked = backward("always", True)
    assert [any(s) for s in seen] == [True, make is grouped_goals, False, False]
    assert not any(b is not None for s in seen[2:] for b in s)
    assert hooked[0] is True and hooked[2:] == [None, None]  # autograd calls a hook even without a gradient
    seen, _ = backward("always", False)  # autograd makes zeros for a function that does not accept None
    assert seen[2] in ([], [False]) and seen[3] in ([], [False])
    seen, hooked = backward("never", True)
    assert seen[2:] == [[False], [False]] and hooked[2:] == [False, False]


@IMPLS
def test_an_infinite_derivative_without_a_share_is_not_computed(server: tuple[str, str]) -> None:
    x = torch.zeros(4, device=server[1]).requires_grad_()
    raw = [1 + x, x.sqrt()]  # sqrt has an infinite derivative at 0
    assert torch.autograd.grad(plain_goals(server, route="never")(raw), x)[0].isnan().all()
    raw = [1 + x, x.sqrt()]
    assert (torch.autograd.grad(plain_goals(server, route="always")(raw), x)[0] == 0.25).all()


@IMPLS
def test_materialize_gives_zeros(server: tuple[str, str]) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    for make, which in (
        (plain_goals, [2]),
        (plain_goals, (2,)),
        (named_goals, ["c"]),
        (named_goals, "c"),
        (grouped_goals, ["q"]),
    ):
        routed = gradients(make(server, route="always", materialize=which), net, x)
        plain = gradients(make(server, route="never"), net, x)
        check_same(routed, plain, 0 if make is grouped_goals else 2)
        assert net.heads[2].weight.grad is not None and not net.heads[2].weight.grad.any()


def test_materialize_is_no_pattern() -> None:
    goals = GoalSet(re=Minimize(1.0), recon=Minimize(1.0), materialize="recon", route="always")
    leaves = {"re": torch.zeros(2).requires_grad_(), "recon": torch.ones(2).requires_grad_()}
    goals(leaves).loss.backward()
    assert leaves["re"].grad is None


@pytest.mark.parametrize("which", [[4], [-1], ["a"], [1, 9]])
def test_unknown_indices_are_named(which: Any) -> None:
    with pytest.raises(ValueError, match=r"materialize must hold indices of goals, 0 to 3, got"):
        min_goal_loss([torch.rand(2) for _ in range(4)], materialize=which)


def test_unknown_names_are_named() -> None:
    for which, name in ((["a", "e"], "'e'"), ("ab", "'ab'"), ([0], "0"), (["p.a"], "'p.a'")):
        with pytest.raises(ValueError, match=rf"materialize must name goals \(a, b\), got {name}"):
            GoalSet(a=Minimize(1.0), b=Group(a=Minimize(1.0)), materialize=which)


@pytest.mark.parametrize("route", ["sometimes", "", None, True, 1])
def test_bad_routes_are_named(route: Any) -> None:
    message = "route must be one of 'auto', 'always', 'never', got"
    with pytest.raises(ValueError, match=message):
        min_goal_loss([torch.rand(2)], route=route)
    with pytest.raises(ValueError, match=message):
        GoalSet(a=Minimize(1.0), route=route)


# Ways to call backward.
