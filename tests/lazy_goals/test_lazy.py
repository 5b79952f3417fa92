"""Test that lazy goals have the gradient of the plain computation, and build graphs for owned rows only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import Anchored, GoalSet, Group, Lazy, Minimize, lazy, min_goal_loss
from tests.support.lazy_problem import REDUCTIONS, SCALES, Problem, Wrap, check, error, of_list, plain, size


def of_set(**how: Any) -> Callable[[list[Any]], Tensor]:
    names = "abcd"
    goals = GoalSet({n: Anchored(0.0, c.scale) for n, c in zip(names, SCALES, strict=True)}, **how)  # type: ignore[attr-defined]
    return lambda raw: goals.double().eval()(dict(zip(names, raw, strict=True))).loss


@pytest.mark.parametrize("route", ["always", "auto", "never"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_those_of_the_plain_computation(reduction: str, route: str) -> None:
    check(Problem(), of_list(reduction, route))
    check(Problem(), of_set(reduction=reduction, route=route))


@pytest.mark.parametrize("how", [{"temperature": 0.3}, {"spill": 0.5}], ids=["temperature", "spill"])
@pytest.mark.parametrize("route", ["always", "auto"])
def test_rules_that_give_every_goal_a_share(how: dict[str, Any], route: str) -> None:
    check(Problem(), of_set(**how, route=route))


def test_a_group_of_lazies_and_tensors() -> None:
    goals = GoalSet(a=Group(u=Minimize(1.0), v=Minimize(1.3)), b=Minimize(0.4), route="always").double()
    check(Problem(), lambda raw: goals({"a": {"u": raw[0], "v": raw[3]}, "b": raw[2]}).loss)


def test_one_lazy_as_two_goals_and_half_rows() -> None:
    problem = Problem(dtype=torch.float32)

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        one = wrap(error, wrap(problem.decoder, z), problem.x)
        return [one, one, wrap(lambda a: size(a).bfloat16(), z), z.square().mean(1)]

    check(problem, of_list("mean"), goals, near=1e-2)


def test_arguments_that_are_no_rows() -> None:
    problem = Problem()

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        labels = torch.arange(24) % 5
        mask = problem.x > 0

        def chosen(
            z: Tensor, factor: float, scale: Tensor, labels: Tensor, mask: Tensor, words: tuple[str, ...]
        ) -> Tensor:
            assert words == ("a",)
            return factor * scale * (z.gather(1, labels[:, None])[:, 0].square() + (z[:, :5] * mask).square().sum(1))

        first = wrap(chosen, z, 2.0, torch.tensor(0.5, dtype=torch.float64), labels, mask, ("a",))
        return [first, *problem.goals(wrap)[1:]]

    check(problem, of_list(), goals)


def test_layouts() -> None:
    net = nn.Conv2d(3, 4, 3, padding=1).double().to(memory_format=torch.channels_last)
    problem = Problem()
    problem.net = net
    image = torch.rand(24, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        expanded = z[:, :1].expand(24, 3)
        both = wrap(net, image), wrap(net, image.flip(3))
        return [wrap(size, both[0]), wrap(size, both[1]), wrap(size, expanded), wrap(size, z.t().contiguous().t())]

    check(problem, of_list(), goals)


# Evaluated rows.


def test_lazies_of_one_network_are_one_call_of_the_rows_that_are_needed() -> None:
    problem, rows = Problem(), []
    problem.step(lazy, of_list())  # tried on first use
    problem.decoder.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    raw = problem.goals(lazy)
    loss, stats = min_goal_loss(raw, SCALES, return_stats=True, route="always")  # type: ignore[misc]
    loss.backward()
    owned = [(stats.bottleneck == k).sum().item() for k in range(3)]
    assert rows == [48, sum(owned)] and 0 < rows[1] < 24


def test_the_graph_holds_owned_rows_alone() -> None:
    problem = Problem()
    problem.step(lazy, of_list("min"))
    held = {}
    for wrap in (plain, lazy):
        kept: list[int] = []

        def pack(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            of_list("min")(problem.goals(wrap))
        held[wrap] = sum(kept)
    assert held[lazy] < held[plain]


def test_walked_says_which_part_of_the_backward_is_left() -> None:
    problem = Problem()
    goals = GoalSet({n: Anchored(0.0, 1.0) for n in "abcd"}, reduction="min", route="always").double()
    out = goals(dict(zip("abcd", problem.goals(lazy), strict=True)))
    assert out.walked is not None and 0 < out.walked < 0.1
    goals.route = "never"
    assert goals(dict(zip("abcd", problem.goals(lazy), strict=True))).walked == 1
    assert goals(dict(zip("abcd", problem.goals(plain), strict=True))).walked is None


def test_auto_stops_where_it_does_not_pay_and_starts_again_where_it_does() -> None:
    problem, calls = Problem(), []
    fn = problem.decoder
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1e9)).double()

    def step() -> float:
        z = problem.encoder(problem.x)
        calls.clear()
        hook = fn.register_forward_pre_hook(lambda _, x: calls.append(len(x[0])))
        out = goals({"a": lazy(error, lazy(fn, z), problem.x), "b": size(z)})
        hook.remove()
        out.loss.backward()
        assert out.walked is not None
        return out.walked

    step()
    for _ in range(40):  # goal a owns every row
        walked = step()
    assert walked == 1 and calls == [24]
    goals["a"] = Minimize(1e9)
    goals["b"] = Minimize(1.0)
    for _ in range(200):
        walked = step()
    assert walked < 0.1 and calls == [24]


def test_value_and_tensors() -> None:
    problem = Problem(nn.Dropout(0.3))
    torch.manual_seed(3)
    z = problem.encoder(problem.x)
    one, other = lazy(problem.decoder, z), lazy(problem.decoder, z.roll(1, 0))
    seen = one.value
    assert not seen.requires_grad and one.value is seen
    first, second, third = Lazy.tensors([one, other, z])
    assert torch.equal(first, seen) and first.requires_grad and third is z
    assert second.shape == first.shape and repr(one) == "lazy(Sequential, 24 rows)"


def test_looking_at_a_value_first_changes_nothing() -> None:
    problem = Problem(nn.Dropout(0.3))

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        recon = wrap(problem.decoder, z)
        if wrap is lazy:
            _ = recon.value
        return [wrap(error, recon, problem.x), z.square().mean(1), wrap(size, recon), size(z)]

    for route in ("always", "never"):
        check(problem, of_list(route=route), goals)
