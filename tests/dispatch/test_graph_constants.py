"""Test that tables of numbers are on the device early: neither eager calls nor compiled graphs copy them there."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bomkern import (
    Anchored,
    Box,
    ConstraintTable,
    GoalSet,
    Group,
    Lazy,
    Minimize,
    MinimizeHard,
    Upper,
    lazy,
    min_goal_loss,
)
from bomkern.common import graph_constants, host_copy
from bomkern.common.graph_constants import on_device
from bomkern.common.process_group import ALONE
from bomkern.common.torch_internals import TorchDispatchMode
from bomkern.ops import min_goal
from tests.support.graphs import MADE, Graphs

CONSTRAINTS = (Minimize(0.5), Upper(0.25, 2.0), Box(0.0, 1.0))
IMPLS = pytest.mark.parametrize("impl", ["reference", None])
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def forget() -> None:
    graph_constants._made.cache_clear()
    for kept in (vars(graph_constants._traced), graph_constants._captured, min_goal._recent):
        kept.clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    forget()
    yield
    forget()


def goals_of(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(8, device=device, dtype=dtype, requires_grad=True) for _ in CONSTRAINTS]


@DEVICES
@pytest.mark.parametrize("aot", [False, True], ids=["dynamo", "aot"])
@pytest.mark.parametrize("given", [CONSTRAINTS, list(CONSTRAINTS), Minimize(0.5)], ids=["tuple", "list", "one"])
def test_a_compiled_call_builds_no_table(device: str, aot: bool, given: Any) -> None:
    backend = Graphs(aot)
    goals = goals_of(device)
    compiled = torch.compile(lambda *g: min_goal_loss(g, given), fullgraph=True, backend=backend)
    got, want = compiled(*goals), min_goal_loss(goals, given)
    assert not backend.from_the_host(device)
    if device == "cpu":
        torch.testing.assert_close(got, want)
        table = min_goal._packed(given, 3, goals, goals[0].device)[0]
        table[:, 1:3] *= 2  # the graph reads the same tensor as eager calls
        torch.testing.assert_close(compiled(*goals), min_goal_loss(goals, given))
        assert not torch.allclose(compiled(*goals), want)


@DEVICES
def test_a_compiled_goal_set_builds_no_table(device: str) -> None:
    backend = Graphs(aot=True)
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Group(x=Upper(0.1, 1.0), y=MinimizeHard(1.0)), spill=0.5).to(device)
    x, y, z = goals_of(device)
    for reader in (goals, goals.eval()):
        reader = torch.compile(reader, fullgraph=True, backend=backend)
        reader({"a": x, "b": {"x": y, "y": z.mean()}})
    assert not backend.from_the_host(device)


def test_compiled_calls_see_other_constraints() -> None:
    """A graph uses the right table when constraints are passed as arguments or when their list changes."""
    compiled = torch.compile(lambda x, given: min_goal_loss([x], given), fullgraph=True, backend="aot_eager")
    x, some = torch.full((4,), 3.0), [Minimize(1.0)]
    assert compiled(x, (Minimize(1.0),)) == 3 and compiled(x, (Minimize(2.0),)) == 1.5 and compiled(x, some) == 3
    some[0] = Minimize(4.0)
    assert compiled(x, some) == 0.75 and compiled(x.double(), some) == 0.75


@pytest.mark.parametrize("kind", [tuple, list, ConstraintTable])
@IMPLS
def test_compiled_calls_see_other_curves(impl: str | None, kind: Any) -> None:
    compiled = torch.compile(
        lambda x, given: min_goal_loss([x, x], given, impl=impl), fullgraph=True, backend="aot_eager"
    )
    x, pair = torch.rand(4), (Minimize(0.5), MinimizeHard(2.0), Box(0.0, 2.0), Upper(0.1, 1.0))
    for k in range(4):
        given = kind((pair[k], pair[k - 1]))
        torch.testing.assert_close(compiled(x, given), min_goal_loss([x, x], given, impl=impl))


@IMPLS
@pytest.mark.parametrize("given", [CONSTRAINTS, list(CONSTRAINTS), Minimize(0.5)], ids=["tuple", "list", "one"])
def test_a_compiled_call_inside_a_fake_mode(given: Any, impl: str | None) -> None:
    """Fake tensors use no cached table from outside.

    The same function then serves plain tensors, and fake ones again.
    """
    compiled = torch.compile(lambda *g: min_goal_loss(g, given, impl=impl), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with FakeTensorMode():
            goals = goals_of()
            loss = compiled(*goals)
            loss.backward()
            assert type(loss) is FakeTensor and loss.shape == () and goals[0].grad.shape == (8,)  # type: ignore[union-attr]
        goals = goals_of()
        torch.testing.assert_close(compiled(*goals), min_goal_loss(goals, given, impl=impl))


@IMPLS
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, impl: str | None) -> None:
    """The exported program holds the table as a constant, and no call copies it."""

    class Loss(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return min_goal_loss([x, y, z], CONSTRAINTS, impl=impl)

    goals = [x.detach() for x in goals_of()]
    exported = torch.export.export(Loss(), tuple(goals), strict=strict)
    assert exported.constants and not [n for n in exported.graph.nodes if "lift_fresh" in str(n.target)]
    kept = io.BytesIO()
    torch.export.save(exported, kept)
    kept.seek(0)
    for program in (exported, torch.export.load(kept)):
        torch.testing.assert_close(program.module()(*goals), min_goal_loss(goals, CONSTRAINTS))
        torch.testing.assert_close(copy.deepcopy(program.module())(*goals), min_goal_loss(goals, CONSTRAINTS))


class NoTables(TorchFunctionMode):
    """A mode that refuses to make a tensor from the host's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in MADE, func
        return func(*args, **(kwargs or {}))


@DEVICES
@IMPLS
def test_an_eager_call_makes_no_table_again(device: str, impl: str | None) -> None:
    goals, ok = goals_of(device), torch.ones((), dtype=torch.bool, device=device)
    named = GoalSet(
        a=Anchored(0.0, 1.0, moving=True), b=Group(x=Upper(0.1, 1.0), y=Minimize(1.0)), spill=0.5, impl=impl
    )
    named.to(device)
    table = ConstraintTable(CONSTRAINTS, device)

    def step() -> None:
        for given in (CONSTRAINTS, list(CONSTRAINTS), table):
            min_goal_loss(goals, given, impl=impl).backward()
        out = named({"a": goals[0], "b": {"x": goals[1], "y": goals[2].mean()}})
        out.loss.backward()
        named.accept(ok & out.finite)
        named.remeasure({"a": (0.25, goals[0].detach())})
        named["b.y"] = Minimize(2.0)
        table[0] = Minimize(2.0)
        ALONE.shared(out.loss, out.loss, 0.5)

    step()
    with NoTables():
        step()


def test_what_is_written_into_a_table() -> None:
    table, goals = ConstraintTable(CONSTRAINTS, dtype=torch.float64), GoalSet(a=Box(0.0, 1.0), b=Minimize(1.0))
    table[2], goals["a"] = Box(-3.0, 0.1, tail=0.3), Box(-3.0, 0.1, tail=0.3)
    assert tuple(table.params[2].tolist()) == Box(-3.0, 0.1, tail=0.3).ramp
    torch.testing.assert_close(goals.params[0], table.params[2].float())


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.grad(lambda y: call(y).sum())(x)


def in_vmap(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vmap(call)(x.expand(2, -1))


def in_compiled_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.compile(torch.func.grad(lambda y: call(y).sum()), backend="aot_eager")(x)


def in_mode(mode: Callable[[], Any]) -> Callable[..., None]:
    def run(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with mode():
            call(torch.empty(x.shape, dtype=x.dtype))

    return run


FIRST: dict[str, Callable[..., None]] = {
    "grad": in_grad,
    "vmap": in_vmap,
    "compiled grad": in_compiled_grad,
    "inference": in_mode(torch.inference_mode),
    "fake": in_mode(FakeTensorMode),
    "dispatch mode": in_mode(Idle),
    "meta": in_mode(lambda: torch.device("meta")),
    "make_fx": lambda call, x: torch.fx.experimental.proxy_tensor.make_fx(call)(x),
    "make_fx, symbolic": lambda call, x: torch.fx.experimental.proxy_tensor.make_fx(call, tracing_mode="symbolic")(x),
}


@IMPLS
@pytest.mark.parametrize("first", FIRST)
def test_whoever_calls_first_leaves_a_plain_table(first: str, impl: str | None) -> None:
    """After any kind of first call, an ordinary call and all others have first and second gradients."""

    def call(x: Tensor) -> Tensor:
        return min_goal_loss([x, 2 * x], (Minimize(0.5), MinimizeHard(0.25)), impl=impl)

    x = torch.rand(6, dtype=torch.float64)
    FIRST[first](call, x)
    table = on_device((Minimize(0.5).ramp, MinimizeHard(0.25).ramp), x.dtype, x.device)
    assert type(table) is Tensor and not table.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
    given = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(given), given, create_graph=True)
    grad.sum().backward()
    for other in FIRST.values():
        other(call, x)


def test_a_graph_that_is_captured_needs_its_tables_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture requires tables that exist already, and keeps them.

    A CUDA graph reads their memory on every replay, so none may be freed before.
    """
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu = torch.device("cuda", 0)
    assert host_copy.capturing(gpu) and not host_copy.capturing(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"are not on cuda:0 yet.*before the capture"):
        on_device((1.0, 2.0), torch.float32, gpu)
    goals = goals_of()
    min_goal_loss(goals, CONSTRAINTS)
    monkeypatch.setattr(graph_constants, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        min_goal_loss(goals, (Minimize(0.125),) * 3)
    for _ in range(2):
        min_goal_loss(goals, CONSTRAINTS)  # found by identity
        min_goal_loss(goals, list(CONSTRAINTS))  # found by value
    table = min_goal._packed(CONSTRAINTS, 3, goals, goals[0].device)[0]
    assert [x is table for x in graph_constants._captured.values()] == [True]


def test_lazy_goals_are_plain_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host cannot learn during a capture which rows a goal owns."""
    x = torch.rand(6)
    assert isinstance(lazy(torch.square, x), Lazy)
    monkeypatch.setattr(sys.modules["bomkern.lazy_goals.lazy"], "capturing", lambda device: True)
    assert isinstance(lazy(torch.square, x), Tensor)
