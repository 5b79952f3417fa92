"""Test the harness: it refuses wrong results, counts launches, syncs and memory, and batches calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness, machine, rounds, step
from bench.loss_section import plain_loss
from bench.ops import bench_step
from bench.ops.bench_gaussian_kl import CASE, plain
from bench.ops.bench_min_goal import CASES
from bench.report import page
from bomkern import Anchored, GoalSet

SIZE = (("B", 64), ("D", 8))
ON_CPU = pytest.mark.skipif(machine.DEVICE != "cpu", reason="of the resident memory of a CPU")


def test_a_wrong_value_is_not_timed() -> None:
    harness.check(CASE, plain, SIZE, backward=True)
    with pytest.raises(AssertionError):
        harness.check(CASE, lambda mu, logvar: plain(mu, logvar) * 1.001, SIZE, backward=False)


def test_a_wrong_gradient_is_not_timed() -> None:
    def wrong(mu: Tensor, logvar: Tensor) -> Tensor:
        value = plain(mu, logvar)
        return value + 0.01 * (mu.sum(1) - mu.detach().sum(1))  # the value is right, the gradient is not

    harness.check(CASE, wrong, SIZE, backward=False)
    with pytest.raises(AssertionError):
        harness.check(CASE, wrong, SIZE, backward=True)


def test_a_nan_is_not_timed() -> None:
    with pytest.raises(AssertionError):
        harness.check(CASE, lambda mu, logvar: plain(mu, logvar) * torch.nan, SIZE, backward=False)


@pytest.mark.parametrize("call", [1e-6, 1e-4, 5e-3, 0.4, 3.0])
def test_rounds_fit_their_budget(call: float) -> None:
    calls, times = rounds.planned(call)
    assert calls * call >= rounds.ROUND or calls == 500
    assert times >= (2 if call > rounds.SLOW else 3)
    assert times <= 3 or calls * times * call <= 1.01 * rounds.BUDGET


@ON_CPU
def test_peak_memory_sees_what_is_let_go_again() -> None:
    def step() -> None:
        torch.ones(2**24).add(1)  # two tensors of 64 MiB

    found = machine.peak_bytes(step)
    assert found is not None and found == pytest.approx(2 * 2**26, rel=0.05)
    small = machine.peak_bytes(lambda: None)
    assert small is not None and small < 2**20


@ON_CPU
def test_launches_and_syncs_are_counted() -> None:
    x = torch.rand(8)
    assert machine.counted(lambda: x.view(2, 4).t().detach()) == {"launches": 0, "syncs": 0}
    assert machine.counted(lambda: (x + 1).sum().item()) == {"launches": 2, "syncs": 1}
    assert machine.counted(lambda: torch.isnan(x).any().__bool__())["syncs"] == 1


@ON_CPU
def test_a_goal_set_never_waits_and_plain_code_does() -> None:
    names = [f"goal{k}" for k in range(9)]
    raw = {name: torch.rand(16).requires_grad_() for name in names}
    goals = GoalSet({name: Anchored(0.0, 1.0) for name in names})
    anchors = dict.fromkeys(names, (0.0, 1.0))
    ours = machine.counted(lambda: goals(raw).loss.backward())
    theirs = machine.counted(lambda: plain_loss(raw, anchors, {}).backward())
    # Two checks for each goal and two for the loss, and one number for the log from each.
    assert ours["syncs"] == 0 and theirs["syncs"] == 2 * 9 + 2 + 9 + 1
    assert ours["launches"] < theirs["launches"] / 5


def test_plain_loss_is_the_minimum_and_refuses_nan() -> None:
    raw = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 3.0])}
    log: dict[str, float] = {}
    assert plain_loss(raw, {"a": (0.0, 1.0), "b": (0.0, 1.0)}, log).item() == pytest.approx(2)
    assert log["loss"] == pytest.approx(2) and log.keys() == {"a", "b", "loss"}
    with pytest.raises(ValueError, match="b is not finite"):
        plain_loss({**raw, "b": torch.tensor([0.0, torch.nan])}, {"a": (0.0, 1.0), "b": (0.0, 1.0)}, {})


def test_ceilings_are_rates() -> None:
    assert machine.ceiling("bytes") > 1e9 and machine.ceiling("flops") > 1e9  # type: ignore[operator]
    assert set(machine.described()) >= {"device", "name", "threads", "simd", "torch", "bomkern"}
    with pytest.raises(KeyError):
        machine.ceiling("furlongs")


class FakeEvent:
    """A device event for a machine without a GPU."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = 3

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 2.0


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_is_timed_three_ways(monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    """Time a call on the host, by events and by replaying a graph, with CUDA replaced by stubs."""
    replays, capturing = [], []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    @contextmanager
    def capture(graph: Any) -> Iterator[None]:
        capturing.append(1)
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    once_more = [] if captures else [RuntimeError("previous error during capture")]

    def synchronize() -> None:
        if once_more and capturing:
            raise once_more.pop()

    monkeypatch.setattr(machine, "synchronize", synchronize)
    found = rounds.of_a_gpu([lambda: None, lambda: None], 4)
    assert found["event_us"] == pytest.approx(500) and 0 < found["host_us"] < 500
    if captures:
        assert found["graph_us"] == pytest.approx(500) and len(replays) == 11
    else:
        assert found["graph_us"] is None and found["no_graph_because"].endswith("capturing") and not once_more


def test_inputs_rotate_past_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.rand(2**18).requires_grad_(),)  # 1 MiB
    assert harness.rotating(x) == [x]
    monkeypatch.setattr(harness, "DEVICE", "cuda")

    class Properties:
        L2_cache_size = 5 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    sets = harness.rotating(x)
    assert len(sets) == 11 and sets[0] is x
    assert all(torch.equal(y, x[0]) and y.requires_grad and y is not x[0] for (y,) in sets[1:])


def test_every_default_peer_is_found() -> None:
    size = (("K", 9), ("B", 8))
    for name in ("eager", "bomkern"):
        harness.check(CASES["anchored"], harness.peer(CASES["anchored"], name, size), size, backward=True)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> step.Run:
    """Return a fresh run of eight small samples, not one that was trained for a while; no step runs a compiler."""
    monkeypatch.setattr(step, "SIZE", 32)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    step.data.cache_clear()
    run = step.Run("bomkern", 8)
    monkeypatch.setattr(step, "started", lambda: run)
    bench_step.expected.cache_clear()
    return run


def test_the_page_has_words_for_every_variant() -> None:
    assert set(page.STEPS) == set(step.VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("variant", step.VARIANTS)
def test_the_variants_of_a_step_agree(variant: str, begun: step.Run) -> None:
    """Each variant passes its check and takes a whole step. Variants that can be cut also take it in parts."""
    if variant in bench_step.WALKS_MANY:
        pytest.importorskip("torchjd")
    run = step.Run(variant, 8, begun)
    bench_step.check(run)
    before = [p.detach().clone() for p in run.parameters]
    run.whole()
    assert any(not torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    if variant not in (*bench_step.WALKS_MANY, "bomkern lazy"):
        run.in_parts(clock := step.Clock())
        assert set(clock.seconds) == set(page.PARTS) and all(x > 0 for x in clock.seconds.values())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "weighted sum"])
def test_a_wrong_step_is_not_timed(variant: str, begun: step.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = step.eager_values
    monkeypatch.setattr(step, "eager_values", lambda *given: [1.05 * x for x in right(*given)])
    with pytest.raises(AssertionError):
        bench_step.check(step.Run(variant, 8, begun))


@pytest.mark.slow
def test_a_step_in_parts_is_the_same_step(begun: step.Run) -> None:
    """Cutting the graph changes no gradient."""
    whole, cut = (step.Run("bomkern routed", 8, begun) for _ in range(2))
    whole.whole()
    cut.in_parts(step.Clock())
    for a, b in zip(whole.parameters, cut.parameters, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
