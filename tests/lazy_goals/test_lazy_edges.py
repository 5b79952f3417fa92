"""Test unusual uses of lazy goals: used twice, with odd functions and with odd arguments."""

from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bomkern import Lazy, lazy, min_goal_loss
from bomkern.lazy_goals.cost import LOOK_EVERY, statistics_of
from tests.support.lazy_problem import Wrap, error, plain, size
from tests.support.lazy_rows import DOUBLE, ONE, check, linear, rivals, rows, step_alone

# Used twice.


@pytest.mark.parametrize("first", ["tensors", "never", "inner", "value", "no_grad"])
@pytest.mark.parametrize("then", ["always", "never", "auto"])
def test_a_lazy_that_was_evaluated_before(first: str, then: str) -> None:
    net = linear()
    net = nn.Sequential(net, nn.Dropout(0.3))

    def goals(wrap: Wrap) -> list[Any]:
        hidden = wrap(net, rows())
        goal, other = wrap(size, hidden), wrap(error, hidden, rows())
        if wrap is lazy and first == "tensors":
            Lazy.tensors([goal])
        elif wrap is lazy and first == "inner":
            Lazy.tensors([hidden])
        elif wrap is lazy and first == "never":
            min_goal_loss([goal], route="never")
        elif wrap is lazy and first == "value":
            _ = goal.value
        elif wrap is lazy:
            with torch.no_grad():
                assert not Lazy.tensors([goal])[0].requires_grad
                min_goal_loss([goal], route="never")
        return [goal, other, rivals()]

    check(goals, net.parameters(), route=then)


@pytest.mark.parametrize("routes", [("always", "always"), ("always", "never"), ("never", "always")])
def test_two_losses_of_the_same_lazies(routes: tuple[str, str]) -> None:
    net = linear()

    def grads(wrap: Wrap) -> tuple[Tensor, ...]:
        hidden = wrap(net, rows())
        one, other = wrap(size, hidden), wrap(error, hidden, rows())
        first = min_goal_loss([one, rivals()], ONE, route=routes[0])
        second = min_goal_loss([other, one, rivals()], ONE, route=routes[1])
        return torch.autograd.grad(first + 2 * second, list(net.parameters()))  # type: ignore[operator]

    for a, b in zip(grads(lazy), grads(plain), strict=True):
        assert torch.allclose(a, b)


def test_value_stays_without_gradient() -> None:
    for route in ("always", "never"):
        goal = lazy(size, rows().requires_grad_())
        min_goal_loss([goal], ONE, route=route).backward()  # type: ignore[union-attr]
        assert not goal.value.requires_grad and goal.value.grad is None


def test_retained_graphs_and_losses_used_twice() -> None:
    net = linear()
    want = torch.autograd.grad(min_goal_loss([size(net(rows())), rivals()], ONE), net.weight)[0]
    loss = step_alone(lambda v: size(net(v)), rows())
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.allclose(net.weight.grad, 2 * want)
    (got,) = torch.autograd.grad(loss + 3 * loss, net.weight)
    assert torch.allclose(got, 4 * want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    """A second derivative is refused, because it would treat the score's slope as a constant."""
    net, x = linear(), rows().requires_grad_()
    for constraint in (ONE, None):
        loss = min_goal_loss([lazy(lambda v: size(net(v)).sigmoid(), x)], constraint, route="always")
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="lazy goals have no second derivative"):
            grad.square().sum().backward()


def test_inside_function_transforms_it_is_a_call() -> None:
    net, x = linear(), rows()

    def loss(x: Tensor, wrap: Wrap) -> Tensor:
        return min_goal_loss([wrap(lambda v: size(net(v)), x), x.square().sum(1)], ONE, route="always")  # type: ignore[return-value]

    assert torch.allclose(torch.func.grad(loss)(x, lazy), torch.func.grad(loss)(x, plain))


def test_nothing_is_kept_while_the_lazy_lives() -> None:
    net, kept = linear(), []

    def fn(v: Tensor) -> Tensor:
        hidden = net(v)
        kept.append(weakref.ref(hidden))
        return size(hidden)

    goal = lazy(fn, rows())
    gc.collect()
    gc.disable()
    try:
        loss = min_goal_loss([goal, rivals()], ONE, route="always")
        loss.backward()  # type: ignore[union-attr]
        del loss
        assert all(ref() is None for ref in kept) and goal.graph is None
    finally:
        gc.enable()


# Functions.


def test_goals_without_gradient() -> None:
    net = linear()

    def goals(wrap: Wrap) -> list[Any]:
        return [wrap(lambda v: size(v.detach()) / 9, rows()), wrap(lambda v: size(net(v)), rows()), rivals(high=0.6)]

    for route in ("always", "never", "auto"):
        check(goals, net.parameters(), route=route)
    loss = step_alone(lambda v: size(v), rows())
    loss.requires_grad_().backward()
    assert not step_alone(size, rows(), route="never").requires_grad


def test_a_goal_without_gradient_where_it_does_not_pay() -> None:
    net = linear()
    for fn in (size, net):
        statistics = statistics_of(fn)
        # a check is due in this step
        statistics.checked, statistics.owned, statistics.full_steps = True, 1.0, LOOK_EVERY - 1

    def goals(wrap: Wrap) -> list[Any]:
        return [wrap(size, rows() / 9), wrap(size, wrap(net, rows())), rivals(high=0.6)]

    try:
        check(goals, net.parameters(), steps=1, route="auto")
    finally:
        statistics_of(size).owned = torch.nan


def test_functions_of_every_kind() -> None:
    net = linear()

    class Unhashable:
        def __eq__(self, other: object) -> bool:
            return True

        def __call__(self, v: Tensor) -> Tensor:
            return size(net(v))

    class Owner:
        def goal(self, v: Tensor) -> Tensor:
            return size(net(v))

    bound = Owner()
    makers: list[Any] = [
        lambda: Unhashable(),
        lambda: bound.goal,
        lambda: partial(lambda by, v: size(net(v) * by), 2.0),
        lambda: lambda v: size(net(v)),  # another function in every step
        lambda: nn.Sequential(net, nn.Flatten(1), nn.LazyLinear(1, dtype=DOUBLE), nn.Flatten(0)),
        lambda: torch.compile(lambda v: size(net(v)), backend="aot_eager", dynamic=True),
    ]
    for make in makers:
        check(lambda wrap, make=make: [wrap(make(), rows()), rivals()], net.parameters())
    check(lambda wrap: [wrap(torch.sum, wrap(net, rows()), 1), rivals()], net.parameters())


def test_methods_of_one_module_are_joined_and_known_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = linear(), 0

        def code(self, v: Tensor) -> Tensor:
            self.calls += 1
            return self.net(v)

        def noise(self, v: Tensor) -> Tensor:
            return size(v + torch.randn_like(v))

    two = Two()
    for _ in range(2):
        two.calls = 0
        one, other = lazy(two.code, rows()), lazy(two.code, rows().flip(0))
        min_goal_loss([lazy(size, one), lazy(two.noise, other), rivals()], ONE, route="always")
    assert two.calls == 2  # one call without a graph and one with a graph, each for both goals
    code, noise = statistics_of(two.code), statistics_of(two.noise)
    assert noise.draws and not code.draws and code is not statistics_of(two)


def test_functions_that_do_other_things() -> None:
    seen: list[int] = []
    net = linear()

    def counts(v: Tensor) -> Tensor:
        seen.append(len(v))
        return size(net(v))

    for _ in range(2):
        seen.clear()
        step_alone(counts, rows())
    assert len(seen) == 2 and seen[0] == 16 and 0 < seen[1] < 16

    def changes(v: Tensor) -> Tensor:
        return size(net(v)) * (1 + len(seen))

    with pytest.raises(ValueError, match=r"rows of .*changes depend on one another"):
        step_alone(changes, rows())
        seen.append(1)
        goal = lazy(changes, rows())
        _ = goal.value
        seen.append(1)
        min_goal_loss([goal], ONE, route="always")  # evaluates all rows, but with other results


@pytest.mark.parametrize("dtype", [DOUBLE, torch.int64])
def test_writing_into_an_argument_is_refused(dtype: torch.dtype) -> None:
    def writes(v: Tensor, w: Tensor) -> Tensor:
        w += 1
        return size(v)

    with pytest.raises(ValueError, match=r"writes changes its arguments in place"):
        step_alone(writes, rows(), torch.zeros(16, 2, dtype=dtype))

    def writes_into_its_own(v: Tensor) -> Tensor:
        v = v * 2
        v.clamp_(min=-1)
        return size(v)

    x = rows().requires_grad_()
    check(lambda wrap: [wrap(writes_into_its_own, x), rivals()], [x])


def test_what_a_lazy_returns_between() -> None:
    net, table = linear(), nn.Embedding(4, 4).double()

    def goals(wrap: Wrap) -> list[Any]:
        complex_, whole = wrap(lambda v: torch.fft.fft(net(v)), rows()), wrap(lambda v: v.argmax(1), rows())
        nothing, flags = wrap(lambda v: v[:, :0], rows()), wrap(lambda v: v > 0, rows())
        return [
            wrap(lambda z: z.abs().sum(1) / 8, complex_),
            wrap(lambda labels: size(table(labels)) / 3, whole),
            wrap(lambda a, b, on: a.sum(1) + size(net(b) * on), nothing, rows(), flags),
            rivals(high=0.6),
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(goals, [*net.parameters(), *table.parameters()])
    with pytest.raises(TypeError, match=r"goals\[0\] must be float16"):
        step_alone(lambda v: v.argmax(1), rows())


def test_closures() -> None:
    """A closure over a tensor with a graph works. A closure over rows is refused."""
    net, scale, x = linear(), nn.Parameter(torch.tensor(2.0, dtype=DOUBLE)), rows()
    check(lambda wrap: [wrap(lambda v, t: size(net(v) * t * scale), x, scale * 2), rivals()], [scale, net.weight])
    for batch in (2, 16):
        with pytest.raises((RuntimeError, ValueError), match=r"fails for \d+ of its rows"):
            other = rows(batch)
            step_alone(lambda v, other=other: size(v * other), rows(batch))


def test_arguments() -> None:
    net, unused, base = linear(), rows().requires_grad_(), rows().requires_grad_()
    views = [base.t().contiguous().t(), base[:, :1].expand(16, 4), base[:1].expand(16, 4), base.unbind(1)[0], base]
    base.grad = torch.zeros_like(base)
    for view in views:
        check(
            lambda wrap, v=view: [wrap(lambda a, b: a.reshape(len(a), -1).norm(dim=1), v, unused), rivals()],
            [base, unused],
        )
    check(lambda wrap: [wrap(lambda a, b: size(net(a)) + size(b), base, base), rivals()], [base])
    assert not base.grad.any()
    labels, mask = torch.arange(16) % 4, torch.arange(16) % 2 == 0
    check(
        lambda wrap: [
            wrap(lambda a, y: F.cross_entropy(net(a), y, reduction="none"), base, labels),
            wrap(lambda a, m: torch.where(m, size(net(a)), 0.1), base, mask),
            rivals(),
        ],
        [base, *net.parameters()],
    )
    for batch in (1, 2, 3):
        few = rows(batch)
        check(lambda wrap, x=few: [wrap(lambda v: size(F.dropout(net(v))), x), x.abs().sum(1) * 0.01], [net.weight])
    with pytest.raises(ValueError, match=r"must hold at least one sample, got B = 0"):
        min_goal_loss([lazy(lambda v: v.sum(1), rows()[:0])], ONE)


def test_gradient_accumulates_over_batches() -> None:
    net = linear()
    for wrap in (plain, lazy):
        net.zero_grad()
        for part in rows(32).chunk(2):
            min_goal_loss([wrap(lambda v: size(net(v)), part), rivals()], ONE, route="always").backward()  # type: ignore[union-attr]
        if wrap is plain:
            want = net.weight.grad
    assert torch.allclose(net.weight.grad, want)
