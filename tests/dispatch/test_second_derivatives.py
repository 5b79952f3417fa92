"""Test every op's second derivatives: each way to ask gives the right number, or an error that names the op.

`WAYS` lists the ways to ask, and `refusal` says which of them are refused. Every other way must match plain autograd of
the definition in float64.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

from bomkern import ConstraintTable, GoalSet, Minimize, reference, total_correlation
from bomkern.dispatch import select
from tests.support.derivatives import FAMILIES, PROBLEMS, Inputs, Loss, Problem, raw_values
from tests.support.goals import SIX
from tests.support.processes import run_tests
from tests.support.second_derivatives import (
    NAMES,
    by_backward,
    differs,
    directions,
    dual,
    first,
    flat,
    func_pulled,
    func_slope,
    grads_of,
    matrix_of,
    of_all,
    pushed,
    rows,
    size_of,
    slope,
    twice_jacrev,
)
from tests.support.servers import servers
from tests.support.statistics import codes


@dataclass(frozen=True)
class Way:
    """A way to ask for a second derivative: ``ask(loss, inputs)`` must match ``want`` of the definition."""

    want: Callable[[Loss, Inputs], Any]
    ask: Callable[[Loss, Inputs], Any]
    blocks: bool = False  # returns an [N, N] matrix as blocks, one for each pair of inputs
    forward: bool = False  # uses forward mode
    vmap: bool = False  # calls the loss under torch.vmap
    grads: bool = False  # uses ``is_grads_batched``, torch's older vmap
    func: bool = False  # uses torch.func only
    some: bool = False  # asks for some inputs only, so that no refused op may be on the path


LISTS = ("min_goal", "goal_set", "consistency_variance", "latent_statistics")  # ops that take or return lists


def refusal(problem: Problem, impl: str, way: Way) -> tuple[str, bool]:
    """Return the pattern of the expected error, or "" if the way is served.

    The second value says whether a refused way may be served as well.
    """
    found, may, name = [], False, NAMES.get(problem.op, problem.op)
    if way.forward and impl != "reference":
        found.append(f"{name} has no forward-mode derivative")
    if way.vmap and problem.trains:
        found.append("a GoalSet in training mode keeps a record of its step, which torch.vmap has several of")
    if problem.route in ("always", "auto") and not way.forward and not way.func:
        found.append("lazy goals have no second derivative")
        may = problem.route == "auto" or way.some
    if way.grads and impl != "reference" and problem.op in LISTS:
        found.append(f"{name} takes no batched gradients")
    return "|".join(found), may


GOAL_SETS = pytest.mark.parametrize("server", servers("goal_set"))
SERVERS = [
    pytest.param(family, s.values[0], id=f"{family}-{s.id}")
    for family in FAMILIES
    for s in servers(next(p.op for name, p in PROBLEMS.items() if name.split()[0] == family))
]


# Derivatives to ask for.


def third(loss: Loss, inputs: Inputs) -> Inputs:
    made = grads_of(loss(*inputs), inputs, create_graph=True)
    return grads_of(size_of(grads_of(size_of(made), inputs, create_graph=True)), inputs)


def times_directions(loss: Loss, inputs: Inputs) -> Tensor:
    return rows(loss, inputs) @ flat(directions(inputs))


def true(loss: Loss, inputs: Inputs) -> Tensor:
    return torch.ones(1, dtype=torch.float64)


# Ways to ask.


def upstream(ask: Callable[[Loss, Inputs], Any], loss: Loss, inputs: Inputs) -> Any:
    """Ask for the derivative by a parameter on which all inputs depend."""
    given = [x.detach() for x in inputs]
    p = torch.tensor([1.01, 0.98, 1.03], dtype=given[0].dtype, device=given[0].device).requires_grad_()
    return ask(lambda p: loss(*(x * p[k % 3] ** (k % 2 + 1) * p.mean() for k, x in enumerate(given))), (p,))


def chained(ask: Callable[[Loss, Inputs], Any], loss: Loss, inputs: Inputs) -> Any:
    """Ask for the derivative by inputs that depend on one another: each path must count once."""

    def made(*given: Tensor) -> Tensor:
        return loss(*itertools.accumulate(given, lambda before, x: x * (1 + 0.01 * before.mean())))

    return ask(made, inputs)


def between(loss: Loss, inputs: Inputs) -> Inputs:
    """Compute a gradient penalty through an intermediate gradient.

    The inner gradient is by the loss's arguments, the outer one by the inputs that they depend on.
    """
    called = tuple(x * (1 + 0.02 * x) for x in inputs)
    return grads_of(size_of(grads_of(loss(*called), called, create_graph=True)), inputs)


def checkpointed(loss: Loss, inputs: Inputs) -> Inputs:
    return slope(lambda *x: checkpoint(loss, *x, use_reentrant=False), inputs)


def batched_rows(loss: Loss, inputs: Inputs) -> Tensor:
    grads = torch.cat([g.reshape(-1) for g in grads_of(loss(*inputs), inputs, create_graph=True)])
    n, pulls = len(grads), torch.eye(len(grads), dtype=grads.dtype, device=grads.device)
    found = torch.autograd.grad(grads, inputs, pulls, is_grads_batched=True, allow_unused=True)
    parts = [x.new_zeros(n, x.numel()) if r is None else r.reshape(n, -1) for r, x in zip(found, inputs, strict=True)]
    return torch.cat(parts, 1)


def checked(loss: Loss, inputs: Inputs) -> Tensor:
    found = torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    found &= torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)
    return torch.full((1,), float(found), dtype=torch.float64)


def func_then_autograd(loss: Loss, inputs: Inputs) -> Inputs:
    return grads_of(size_of(grad(loss, tuple(range(len(inputs))))(*inputs)), inputs)


def func_vmapped(loss: Loss, inputs: Inputs) -> Any:
    return vmap(lambda *x: func_slope(loss, x))(*(x[None] for x in inputs))


WAYS: dict[str, Way] = {
    "backward": Way(slope, by_backward),
    "backward-inputs": Way(slope, partial(by_backward, named=True)),
    "backward-upstream": Way(partial(upstream, slope), partial(upstream, by_backward)),
    "grad": Way(slope, slope),
    "grad-third": Way(third, third),
    "grad-by-first": Way(partial(slope, by=slice(1)), partial(slope, by=slice(1)), some=True),
    "grad-by-last": Way(partial(slope, by=slice(-1, None)), partial(slope, by=slice(-1, None)), some=True),
    "grad-upstream": Way(partial(upstream, slope), partial(upstream, slope)),
    "grad-chained": Way(partial(chained, slope), partial(chained, slope)),
    "grad-between": Way(between, between),
    "grad-checkpointed": Way(slope, checkpointed),
    "grad-rows": Way(rows, rows),
    "grad-batched": Way(rows, batched_rows, grads=True),
    "hessian": Way(rows, functional.hessian, blocks=True),
    "hessian-batched": Way(rows, partial(functional.hessian, vectorize=True), blocks=True, grads=True),
    "hessian-forward": Way(
        rows,
        partial(functional.hessian, vectorize=True, outer_jacobian_strategy="forward-mode"),
        blocks=True,
        forward=True,
    ),
    "hvp": Way(times_directions, lambda loss, x: functional.hvp(loss, x, directions(x))[1]),
    "vhp": Way(times_directions, lambda loss, x: functional.vhp(loss, x, directions(x))[1]),
    "jvp": Way(pushed, lambda loss, x: functional.jvp(loss, x, directions(x))[1]),
    "gradgradcheck": Way(true, checked),
    "dual": Way(pushed, partial(dual, of_gradient=False), forward=True),
    "dual-of-gradient": Way(times_directions, partial(dual, of_gradient=True), forward=True),
    "func-grad": Way(slope, func_slope, func=True),
    "func-vjp": Way(slope, func_pulled, func=True),
    "func-then-autograd": Way(slope, func_then_autograd, func=True),
    "func-vmap": Way(slope, func_vmapped, func=True, vmap=True),
    "func-jacrev": Way(rows, of_all(twice_jacrev), func=True, blocks=True),
    "func-hessian": Way(rows, of_all(hessian), func=True, blocks=True, forward=True, vmap=True),
    "func-jacfwd": Way(first, of_all(jacfwd), func=True, forward=True, vmap=True),
    "func-jvp": Way(pushed, lambda loss, x: jvp(loss, x, directions(x))[1], func=True, forward=True),
}


def asked(loss: Loss, inputs: Inputs, way: Way) -> Tensor:
    made = way.ask(loss, inputs)
    return flat(matrix_of(made, inputs) if way.blocks else made)


@cache
def wanted(name: str, way: str) -> Tensor:
    return flat(WAYS[way].want(PROBLEMS[name].definition, PROBLEMS[name].leaves()))


def verdict(name: str, server: tuple[str, str], way: str) -> str | None:
    """Return a description of the error, or None."""
    problem, (impl, device) = PROBLEMS[name], server
    refused, may = refusal(problem, impl, WAYS[way])
    try:
        got = asked(problem.loss(impl, device), problem.leaves(device), WAYS[way])
    except Exception as error:
        fits = refused and isinstance(error, RuntimeError) and re.search(refused, str(error))
        return None if fits else f"{type(error).__name__}: {str(error)[:200]}"
    if refused and not may:
        return f"was served, where it should say {refused!r}"
    return differs(got, wanted(name, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "server"), SERVERS)
def test_right_or_refused(family: str, server: tuple[str, str], way: str) -> None:
    names = [name for name in PROBLEMS if name.split()[0] == family]
    found = [f"{name}: {wrong}" for name in names if (wrong := verdict(name, server, way))]
    assert not found, "\n".join(found)


def test_every_problem_has_a_second_derivative() -> None:
    """Every problem has nonzero second derivatives, so a wrong zero is detected.

    With "min" the only goal with a second derivative is not the last one.
    """
    assert all(wanted(name, way).any() for name in PROBLEMS for way in ("grad", "hvp", "grad-upstream"))


@GOAL_SETS
def test_of_a_parameter(server: tuple[str, str]) -> None:
    """The derivative is by one parameter on which both goals depend. No other gradient is asked for."""
    impl, device = server
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), temperature=0.5, impl=impl).to(device).eval()
    p = torch.tensor([0.5, 0.9], device=device, requires_grad=True)
    (got,) = slope(lambda p: goals({"a": p[0] ** 2, "b": p[1] ** 2}).loss, (p,))
    (want,) = slope(lambda p: 0.5 * torch.logsumexp(p**2 / 0.5, 0), (p,))
    assert want.tolist() == pytest.approx([-1.39, 7.03], abs=0.01)
    torch.testing.assert_close(got, want)


@GOAL_SETS
@pytest.mark.parametrize("change", ["params", "temperature", "multipliers"])
def test_settings_that_change_before_the_second(server: tuple[str, str], change: str) -> None:
    """A second derivative uses the settings at the time of the loss.

    Annealing, policies and spill change the settings in place later.
    """
    goals, found = raw_values(5, 6), []
    for (impl, device), factor in ((("reference", "cpu"), 1.0), (server, 3.0)):
        leaves = [x.to(device).requires_grad_() for x in goals]
        held = {
            "params": ConstraintTable(SIX, device).params.double(),
            "temperature": torch.tensor(0.3, dtype=torch.float64, device=device),
            "multipliers": torch.linspace(1, 2, 6, dtype=torch.float64, device=device),
        }
        settings = held["params"], ConstraintTable(SIX).curves, range(6), held["temperature"], 1
        given = held["multipliers"] if change == "multipliers" else None
        loss = select.resolve("goal_set", device, impl)(leaves, *settings, given)[0].square()
        held[change].mul_(factor)
        made = grads_of(loss, leaves, create_graph=True)
        held[change].mul_(factor)
        found.append(flat([made, grads_of(size_of(made), leaves)]))
    assert differs(found[1], found[0]) is None


@pytest.mark.slow
@pytest.mark.parametrize("server", servers("total_correlation"))
def test_total_correlation_in_chunks(server: tuple[str, str]) -> None:
    """The problem exceeds one temporary's limit, and is compared with a single chunk of all rows."""
    impl, device = server
    if impl == "triton" and device == "cpu":
        pytest.skip("minutes in the interpreter")
    inputs = tuple(x.to(device).requires_grad_() for x in codes(420, 50, torch.float64))
    assert 420 * 420 * 50 > 2**23
    whole = slope(lambda *x: reference.total_correlation(*x, None, False, limit=2**30).square().sum(), inputs)
    parts = slope(lambda *x: total_correlation(*x, impl=impl).square().sum(), inputs)
    assert differs(flat(parts), flat(whole).cpu()) is None


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    """Run the ways that ask few times on Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton")
    few = "backward-upstream or grad-third or grad-by or grad-between or vhp or func-grad or dual or jvp"
    run_tests(
        "tests/dispatch/test_second_derivatives.py",
        f"triton-cpu and ({few} or parameter or settings)",
        TRITON_INTERPRET="1",
    )
