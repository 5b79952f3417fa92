"""Test that a `GoalSet` step replayed as a graph equals an eager step: the graph holds no number from the host.

The tests imitate a CUDA graph: they record the ops of a step, and run them again on the same memory.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bomkern import GoalSet, Minimize, ShareGuard
from bomkern.goals import monitor, rule_state
from tests.support.goal_sets import EACH_RULE, RULES, every_policy
from tests.support.graphs import Graphs
from tests.support.syncs import CountSyncs

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
STEPS, END = 9, 4  # `every_policy` calibrates during the first END steps
BUFFERS = ("params", "policy_state", "log_nudge", "guard_share", "average", "multipliers")


class Capture(TorchDispatchMode):
    """Record every op and the tensors it made; raise on an op for which the host would wait, as CUDA does."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in CountSyncs.syncs:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def batches(count: int = STEPS) -> list[Tensor]:
    return list(torch.rand(count, 7, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8)[:, None])


def raw_of(x: Tensor) -> dict[str, Any]:
    names = ("max", "quantile", "hard", "tracking", "moving")
    return {**dict(zip(names, x, strict=False)), "both": {"a": x[5], "b": x[6]}}


def step(goals: GoalSet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step and return its loss and gradient; every third step is rejected, by its number."""
    leaf = x.detach().requires_grad_()
    loss = goals(raw_of(leaf)).loss.sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    goals.accept((goals.monitor.place[0] % 3 != 0).logical_and(loss.isfinite()))
    return loss.detach(), grad


def assert_same(ours: GoalSet, theirs: GoalSet) -> None:
    for name in BUFFERS:
        torch.testing.assert_close(ours.get_buffer(name), theirs.get_buffer(name), msg=name)
    assert ours.history.steps.tolist() == theirs.history.steps.tolist() and ours.steps == theirs.steps
    for part in ("share", "level", "deficit", "raw", "ideal", "scale", "loss", "finite"):
        torch.testing.assert_close(ours.history[part], theirs.history[part], msg=part)


def captured(goals: GoalSet, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Capture, tuple[Tensor, Tensor]]:
    """Capture a step of `goals` on the memory of x, without changing any state."""
    before = {name: buffer.clone() for name, buffer in goals.named_buffers()}
    with monkeypatch.context() as patch:
        for module in (monitor, rule_state):
            patch.setattr(module, "capturing", lambda device: True)
        with Capture() as graph:
            made = step(goals, x)
    for name, buffer in goals.named_buffers():
        buffer.copy_(before[name])
    return graph, made


@EACH_RULE
@pytest.mark.parametrize("warm", [1, END + 1], ids=["calibrating", "calibrated"])
def test_replays_are_eager_steps(rule: str, warm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration ends at its step, whenever the capture was.

    Rejected steps are taken back, and the history holds every step.
    """
    ours, theirs = (every_policy(**RULES[rule], route="never") for _ in range(2))
    x = torch.empty(7, 8)
    for k, batch in enumerate(batches()):
        x.copy_(batch)
        if k < warm:
            step(ours, x)
        else:
            if k == warm:
                graph, made = captured(ours, x, monkeypatch)
            graph.replay()
        want = step(theirs, batch)
        if k >= warm:
            torch.testing.assert_close(made, want)
    assert_same(ours, theirs)


def test_replays_go_on_from_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (every_policy(route="never") for _ in range(2))
    x = torch.empty(7, 8)
    for k, batch in enumerate(batches()):
        step(theirs, batch)
        x.copy_(batch)
        if k == 1:
            saved = copy.deepcopy(theirs.state_dict())
        step(ours, x)
    graph, _ = captured(ours, x, monkeypatch)
    ours.load_state_dict(saved)
    for batch in batches()[2:]:
        x.copy_(batch)
        graph.replay()
    assert_same(ours, theirs)


def test_a_replayed_step_is_rejected_after_a_look_at_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    goals = GoalSet(a=Minimize(1.0), route="never")
    x = torch.ones(4)
    goals({"a": x})
    with Capture() as graph, monkeypatch.context() as patch:
        patch.setattr(monitor, "capturing", lambda device: True)
        goals({"a": x})
    goals.monitor.place.fill_(1)
    assert len(goals.history) == 1
    graph.replay()
    goals.monitor.reject(torch.tensor(False))
    assert goals.history["finite"].tolist() == [1, 0]


# The parts of compiled steps that Inductor puts into CUDA graphs.


def test_inductor_is_told_what_no_graph_can_replay() -> None:
    """Every op that calls the host by a handle is tagged as unsafe for CUDA graphs."""
    called = [
        op
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("bomkern::")
        for op in [getattr(getattr(torch.ops.bomkern, name[9:].partition(".")[0]), name.partition(".")[2] or "default")]
        if any(argument.name == "handle" for argument in op._schema.arguments)
    ]
    assert called and all(torch.Tag.cudagraph_unsafe in op.tags for op in called)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_compiled_step_has_no_number_of_the_host(device: str) -> None:
    """The graphs copy nothing from the host, and no step compiles a new one."""
    torch._dynamo.reset()
    goals, backend = every_policy(guard=ShareGuard(0.1, 0.3), spill=0.5).to(device), Graphs(aot=True)
    compiled = torch.compile(lambda x: goals(raw_of(x)).loss, fullgraph=True, dynamic=True, backend=backend)
    with torch._inductor.config.patch("triton.cudagraphs", True):
        for _ in range(END + 2):
            compiled(torch.rand(7, 8, device=device, requires_grad=True))
    assert not backend.from_the_host(device)
    # forward and backward, and both again if the previous step left something to take back
    assert len(backend.seen) <= 4


@pytest.mark.slow
def test_inductor_leaves_the_host_out_of_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor finds the ops that no CUDA graph can hold, and calls them between graphs or makes no graph."""
    from torch._inductor import compile_fx

    found = []
    ask = compile_fx.get_first_incompatible_cudagraph_node
    monkeypatch.setattr(
        compile_fx, "get_first_incompatible_cudagraph_node", lambda gm: found.append(ask(gm)) or found[-1]
    )
    torch._dynamo.reset()
    goals, x = every_policy(spill=0.5), batches(1)[0]
    options = {"triton.cudagraphs": True, "graph_partition": False, "fx_graph_cache": False}
    compiled = torch.compile(lambda x: goals(raw_of(x)).loss, fullgraph=True, options=options)
    for training in (True, False):
        goals.train(training)
        compiled(x)
    assert [str(node.target) if node else None for node in found] == ["bomkern.goal_set_notice.default", None]


# On a GPU.


@NEEDS_GPU
@EACH_RULE
def test_cuda_graph_replays_are_eager_steps(rule: str) -> None:
    ours, theirs = (every_policy(**RULES[rule]).to("cuda") for _ in range(2))
    x, side = torch.empty(7, 8, device="cuda"), torch.cuda.Stream()
    for k, batch in enumerate(batches()):
        x.copy_(batch)
        if k == 0:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(ours, x)
            torch.cuda.current_stream().wait_stream(side)
        if k == 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = step(ours, x)
        want = step(theirs, batch.cuda())
        if k:
            graph.replay()
            torch.testing.assert_close(made, want)
    assert_same(ours, theirs)


@NEEDS_GPU
@pytest.mark.slow
def test_cuda_graph_trees_replay_eager_steps() -> None:
    """Replay steps in mode reduce-overhead, past the end of the ring, which the host empties between the graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, theirs = (every_policy(spill=0.5).to("cuda") for _ in range(2))
    compiled = torch.compile(lambda x: ours(raw_of(x)).loss, fullgraph=True, mode="reduce-overhead")
    for batch in batches(monitor.ROWS + END):
        torch.compiler.cudagraph_mark_step_begin()
        leaf, other = (batch.cuda().requires_grad_() for _ in range(2))
        loss, want = compiled(leaf), theirs(raw_of(other)).loss
        loss.backward(), want.backward()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(leaf.grad, other.grad)
    assert_same(ours, theirs)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
