"""Test lazy goals in PyTorch: random numbers, gradients inside, autocast, bad input, compile."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bomkern
from bomkern import Anchored, GoalSet, Lazy, Minimize, Spill, lazy, min_goal_loss
from bomkern.lazy_goals.cost import statistics_of
from tests.support.lazy_problem import REDUCTIONS, Problem, Wrap, check, error, of_list, plain, size

# Random numbers, gradients inside, autocast.


def noisy(a: Tensor) -> Tensor:
    a = a + 0.1 * torch.randn_like(a) * torch.rand(len(a), 1, dtype=a.dtype)
    a = a * torch.empty_like(a).bernoulli_(0.8) + torch.rand(5, dtype=a.dtype)
    return size(nn.functional.dropout(a, 0.2) * torch.bernoulli(torch.full_like(a, 0.5)))


def test_random_numbers_are_the_same_both_times() -> None:
    problem = Problem(nn.Dropout(0.4))

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        recon, swap = wrap(problem.decoder, z), wrap(problem.decoder, z.roll(1, 0))
        if wrap is plain:  # one call, as for the lazy goals
            torch.manual_seed(7)
            recon, swap = problem.decoder(torch.cat([z, z.roll(1, 0)])).chunk(2)
        return [wrap(error, recon, problem.x), wrap(noisy, swap), z.square().mean(1), size(z)]

    for _ in range(2):
        states = []
        for wrap in (plain, lazy):
            problem.step(wrap, of_list(), goals)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
        check(problem, of_list(), goals)
    assert statistics_of(noisy).draws


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda a: size(a[torch.randperm(len(a))]), "drew"),
        (lambda a: size(a) + torch.poisson(a.abs()).sum(1), "poisson, which cannot be repeated"),
    ],
)
def test_draws_that_cannot_be_repeated_are_refused(fn: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        min_goal_loss([lazy(fn, torch.rand(12, 3, requires_grad=True)), torch.rand(12)], Minimize(1.0))


def test_gradients_inside() -> None:
    problem = Problem(nn.Tanh())

    def penalty(x: Tensor, code: Tensor) -> Tensor:
        with torch.enable_grad():
            inside = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(problem.judge(inside).sum(), inside, create_graph=True)
            (outer,) = torch.autograd.grad(problem.decoder(code).sum(), code, create_graph=True)
        return slope.square().sum(1) + outer.square().sum(1)

    def goals(wrap: Wrap) -> list[Any]:
        z = problem.encoder(problem.x)
        return [wrap(penalty, problem.x, z), *problem.goals(wrap)[1:]]

    check(problem, of_list(), goals)


def test_autocast_is_as_it_was_when_lazy_was_called() -> None:
    problem, seen = Problem(dtype=torch.float32), []
    z = problem.encoder(problem.x)
    with torch.autocast("cpu", torch.bfloat16):
        _ = problem.decoder(z)  # puts the decoder's weights into autocast's cache
        recon = lazy(problem.decoder, z)
        inside = lazy(lambda a: seen.append(a.dtype) or size(a), recon)
        loss = min_goal_loss([inside, size(z) * 1e-3], Minimize(1.0), route="always")
    outside = min_goal_loss([lazy(size, recon), size(z) * 1e-3], Minimize(1.0), route="always")
    assert seen[-1] == torch.bfloat16
    for found in (loss, outside):
        problem.zero_grad()
        found.backward(retain_graph=True)  # type: ignore[union-attr]
        assert all(p.grad is not None and p.grad.any() for p in problem.decoder.parameters())


# Refused and accepted uses.


def test_rows_that_depend_on_one_another_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of Sequential depend on one another .* BatchNorm"):
        Problem(nn.BatchNorm1d(16)).step(lazy, of_list())
    for middle in (nn.BatchNorm1d(16).eval(), nn.GroupNorm(4, 16), nn.LayerNorm(16)):
        check(Problem(middle), of_list())
    with pytest.raises(RuntimeError, match="centred fails for"):

        def centred(a: Tensor) -> Tensor:
            return size(a - torch.zeros(12, 1))

        min_goal_loss([lazy(centred, torch.rand(12, 3)), torch.rand(12)], Minimize(1.0))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda x: lazy(3, x), TypeError, "fn must be a function, got int"),
        (lambda x: lazy(size), ValueError, "at least one argument must have rows"),
        (lambda x: lazy(error, x, x[:5]), ValueError, "argument 1 has 5 rows, argument 0 has 12"),
        (lambda x: lazy(lambda a: a.mean(), x), ValueError, "must return a row for each of 12"),
        (lambda x: lazy(lambda a: (a, a), x), TypeError, "must return a tensor, got tuple"),
        (lambda x: lazy(lambda a: a, x), ValueError, r"is a goal: it must return \[n\]"),
        (lambda x: lazy(partial(lambda b, a: a[:, 0] / b, 0), x), ZeroDivisionError, ""),
    ],
)
def test_bad_input_is_named(make: Any, kind: type[Exception], message: str) -> None:
    def fail(a: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(kind, match=message):
        goal = make(torch.rand(12, 3))
        min_goal_loss([lazy(fail, torch.rand(12, 3)) if kind is ZeroDivisionError else goal, torch.rand(12)])


def test_samples_that_are_not_finite_and_goals_that_own_nothing() -> None:
    problem = Problem()
    problem.x[3] = torch.nan
    problem.x[5] = torch.inf
    z = problem.encoder(problem.x.nan_to_num(0, 0, 0)).detach().requires_grad_()
    loss = min_goal_loss([lazy(error, lazy(problem.decoder, z), problem.x), size(z)], Minimize(1.0), route="always")
    loss.backward()  # type: ignore[union-attr]
    assert all(p.grad.isfinite().all() for p in problem.decoder.parameters())  # type: ignore[union-attr]
    idle = min_goal_loss([lazy(size, z * 1e-9), size(z)], Minimize(1.0), route="always")
    (grad,) = torch.autograd.grad(idle, z)
    assert grad.any()


def test_without_gradient() -> None:
    problem = Problem()
    want = of_list()(problem.goals(plain))
    with torch.no_grad():
        found = of_list()(problem.goals(lazy))
    assert not found.requires_grad and torch.equal(found, want)


def test_a_goal_alone_and_second_derivatives() -> None:
    problem = Problem()
    goals = GoalSet({n: Anchored(0.0, 1.0) for n in "abcd"}, route="always").double()

    def alone(raw: list[Any]) -> Tensor:
        with goals.only("c"):
            return goals(dict(zip("abcd", raw, strict=True))).loss

    check(problem, alone)
    loss = of_list()(problem.goals(lazy))
    (grad,) = torch.autograd.grad(loss, problem.encoder.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative|differentiated twice|once_differentiable"):
        grad.sum().backward()


def test_under_compile() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 4, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return min_goal_loss([lazy(size, x), lazy(error, x, x.detach() * 0)], Minimize(1.0))  # type: ignore[return-value]

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (got,), (want,) = torch.autograd.grad(found, x), torch.autograd.grad(loss(x), x)
    assert torch.allclose(got, want)


def test_no_graph_outlives_its_step() -> None:
    problem = Problem()
    gc.collect()
    gc.disable()
    try:
        raw = problem.goals(lazy)
        gone = [weakref.ref(raw[3])]
        loss = of_list()(raw)
        loss.backward()
        gone += [weakref.ref(loss.grad_fn)]
        del raw, loss
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()


@given(st.data())
def test_any_small_graph(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    x = torch.randn(batch, 3, dtype=torch.float64, requires_grad=True)
    nets = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double() for _ in range(2)]
    choices = [(data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3 + k))) for k in range(4)]
    ends = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    scales = [Minimize(data.draw(st.sampled_from([0.3, 1.0, 3.0]))) for _ in ends] + [Minimize(1.0)]
    reduction = data.draw(st.sampled_from(REDUCTIONS))

    def grads(wrap: Wrap) -> list[Tensor]:
        made: list[Any] = [x]
        for net, source in choices:
            made.append(wrap(nets[net], made[min(source, len(made) - 1)]))
        goals = [wrap(size, made[end]) for end in ends] + [x.square().sum(1)]
        loss = min_goal_loss(goals, scales, reduction=reduction, route="always").sum()  # type: ignore[union-attr]
        leaves = [x, *nets[0].parameters(), *nets[1].parameters()]
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))

    for a, b in zip(grads(lazy), grads(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_package_offers_it() -> None:
    assert bomkern.lazy is lazy and bomkern.Lazy is Lazy


def test_a_function_that_says_that_its_rows_are_independent_is_not_checked() -> None:
    calls: list[int] = []

    def said(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.square().mean(1)

    said.independent_rows = True  # type: ignore[attr-defined]
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=Spill(0.5, budget=0.5))
    x = torch.rand(40, 3, requires_grad=True)
    goals({"a": lazy(said, x), "b": x.mean(1)}).loss.backward()
    assert calls == [10]  # budget times weight times batch
