"""Test `StepGuard` with `torch.amp.GradScaler`, with wrapped optimizers and with ones that it must refuse."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bomkern import Anchored, Calibrated, GoalSet, StepGuard
from bomkern.common.torch_internals import optimizers
from tests.support.syncs import CountSyncs

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
STEPS = 8


class TwoHeads:
    """Two heads with an optimizer each. The goal of the second is never a bottleneck, so routing leaves it out."""

    def __init__(self, scaler: torch.amp.GradScaler | None = None, fused: bool = True, route: str = "auto") -> None:
        torch.manual_seed(0)
        self.heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
        self.goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1e6), route=route)
        self.optimizers = [torch.optim.AdamW(head.parameters(), lr=0.01, fused=fused) for head in self.heads]
        self.scaler = scaler
        self.guard = StepGuard(*self.optimizers, goals=self.goals, scaler=scaler)

    def backward(self) -> Tensor:
        x = torch.rand(8, 3)
        out = self.goals({name: head(x)[:, 0] ** 2 for name, head in zip("ab", self.heads, strict=True)})
        (out.loss if self.scaler is None else self.scaler.scale(out.loss)).backward()
        return out.finite

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for head in self.heads for p in head.parameters()]


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, **options)


def run(loop: TwoHeads, clip: bool, accumulate: int = 1, direct: bool = False) -> TwoHeads:
    for step in range(STEPS):
        for _ in range(accumulate):
            finite = loop.backward()
        if step == 3:
            next(loop.heads[0].parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        if clip:
            if loop.scaler is not None:
                loop.scaler.unscale_(loop.guard)  # type: ignore[arg-type]
            nn.utils.clip_grad_norm_([p for group in loop.guard.param_groups for p in group["params"]], 0.1)
        step_by = loop.guard.step if loop.scaler is None or direct else partial(loop.scaler.step, loop.guard)
        ok: Any = step_by(finite)
        assert bool(ok) == (step != 3)
        if loop.scaler is not None:
            loop.scaler.update()
        loop.guard.zero_grad()
    return loop


@FUSED
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", ""])
@pytest.mark.parametrize("direct", [True, False], ids=["guard.step", "scaler.step"])
def test_a_scaled_loop_is_the_plain_one(fused: bool, clip: bool, direct: bool) -> None:
    ours, plain = run(TwoHeads(scaler(), fused), clip, 2, direct), run(TwoHeads(None, fused), clip, 2)
    for a, b in zip(ours.values(), plain.values(), strict=True):
        assert torch.equal(a, b)
    assert ours.scaler is not None and ours.scaler.get_scale() == 512.0
    assert ours.guard.state_dict() == {"rejected": 1, "rejected_in_a_row": 0}
    assert ours.goals.history["finite"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0] + [1] * 8  # the last micro-batch


def test_torch_alone_fails_without_the_guard() -> None:
    """The guard is needed: routing leaves the second head without a gradient, which torch's scaler refuses."""
    loop = TwoHeads(scaler(), fused=False)
    loop.backward()
    assert loop.heads[1].weight.grad is None and loop.scaler is not None
    loop.scaler.step(loop.optimizers[0])
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        loop.scaler.step(loop.optimizers[1])
    never = TwoHeads(scaler(), fused=False, route="never")
    never.backward()
    for optimizer in never.optimizers:
        never.scaler.step(optimizer)  # type: ignore[union-attr]


def test_no_host_sync() -> None:
    loop = TwoHeads(scaler())
    with CountSyncs() as counter:
        finite = loop.backward()
        loop.scaler.step(loop.guard, finite)  # type: ignore[union-attr, arg-type]
        loop.scaler.update()  # type: ignore[union-attr]
    assert not counter.seen.keys() - {"_to_copy"}


def test_a_nan_that_is_no_matter_of_scale_leaves_the_scale_alone() -> None:
    loop = TwoHeads(scaler())
    loop.backward()
    loop.scaler.step(loop.guard, torch.tensor(False))  # type: ignore[union-attr, arg-type]
    loop.scaler.update()  # type: ignore[union-attr]
    assert loop.scaler.get_scale() == 1024.0 and int(loop.guard.rejected) == 1  # type: ignore[union-attr]


def test_sparse_gradients_are_unscaled() -> None:
    table, steps = nn.Embedding(4, 2, sparse=True), scaler()
    guard = StepGuard(torch.optim.SGD(table.parameters(), lr=1.0), scaler=steps)
    before = table.weight.detach().clone()
    steps.scale(table(torch.tensor([1, 1])).sum()).backward()
    steps.step(guard)  # type: ignore[arg-type]
    assert torch.allclose(before[1] - table.weight[1], torch.full((2,), 2.0)) and torch.equal(
        before[0], table.weight[0]
    )


def test_without_the_fused_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_unscale", None)
    for a, b in zip(run(TwoHeads(scaler()), False).values(), run(TwoHeads(), False).values(), strict=True):
        assert torch.equal(a, b)


def test_a_disabled_scaler_changes_nothing() -> None:
    ours, plain = run(TwoHeads(scaler(enabled=False)), False), run(TwoHeads(), False)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), plain.values(), strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_unscaling_one_optimizer_is_refused(which: int) -> None:
    loop = TwoHeads(scaler(), route="never")
    finite = loop.backward()
    loop.scaler.unscale_(loop.optimizers[which])  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"call scaler.unscale_\(guard\) instead"):
        loop.scaler.step(loop.guard, finite)  # type: ignore[union-attr, arg-type]
    loop.guard.zero_grad()
    loop.scaler.update()  # type: ignore[union-attr]
    finite = loop.backward()
    assert loop.scaler.step(loop.guard, finite)  # type: ignore[union-attr, arg-type]


def test_a_scaler_that_the_guard_does_not_know_is_refused() -> None:
    net = nn.Linear(3, 1)
    guard, unknown = StepGuard(torch.optim.AdamW(net.parameters(), fused=True)), scaler()
    unknown.scale(net(torch.rand(2, 3)).sum()).backward()
    with pytest.raises(TypeError, match=r"StepGuard\(\.\.\., scaler=scaler\)"):
        unknown.step(guard)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler or None, got str"):
        StepGuard(torch.optim.SGD(net.parameters()), scaler="cuda")  # type: ignore[arg-type]


def test_accept_takes_a_bool_and_names_what_it_does_not_take() -> None:
    for ok in (True, torch.tensor(True), False, torch.tensor(False)):
        goals = GoalSet(a=Calibrated(3))
        goals({"a": torch.tensor([2.0], requires_grad=True)})
        goals.accept(ok)
        assert goals.history["finite"].tolist() == [float(ok)]
        assert (goals.anchors()["a"][1] == 2.0) is bool(ok)
    for bad, got in ((1, "int"), (torch.ones(()), "torch.float32"), (torch.ones(1) > 0, r"torch.bool of shape \[1\]")):
        with pytest.raises(TypeError, match=f"ok must be a bool or a 0-dim bool tensor, got {got}"):
            goals.accept(bad)  # type: ignore[arg-type]


class Accelerated(torch.optim.Optimizer):
    """A wrapper as Accelerate's: it shares the state of an optimizer that it keeps, and steps it."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def in_fabric(optimizer: torch.optim.Optimizer, precision: Any = "32-true") -> Any:
    return Fabric(accelerator="cpu", devices=1, precision=precision).setup_optimizers(optimizer)


@FUSED
@pytest.mark.parametrize("wrap", [Accelerated, lambda x: Accelerated(Accelerated(x)), in_fabric])
def test_wrapped_optimizers(wrap: Any, fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(3, 1)
    guard = StepGuard(wrap(torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)))
    for bad in (False, True):
        before = net.weight.detach().clone()
        net(torch.rand(4, 3)).sum().backward()
        if bad:
            net.weight.grad[0, 0] = torch.nan  # type: ignore[index]
        assert bool(guard.step()) is not bad and torch.equal(net.weight, before) is bad
        guard.zero_grad()
    assert ("fused=True" in caplog.text) is not fused


def test_a_wrapper_with_a_scaler_of_its_own_is_refused() -> None:
    net = nn.Linear(3, 1)
    inner = torch.optim.AdamW(net.parameters(), fused=True)
    wrapped = Accelerated(inner, scaler())
    with pytest.raises(TypeError, match=r"Accelerated steps by a GradScaler of its own\. Give the guard both parts"):
        StepGuard(wrapped)
    StepGuard(wrapped.optimizer, scaler=wrapped.scaler)
    StepGuard(Accelerated(inner, scaler(enabled=False)))


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize("make", [torch.optim.LBFGS, NeedsClosure])
@pytest.mark.parametrize("wrap", [lambda x: x, Accelerated, in_fabric])
def test_an_optimizer_that_needs_a_closure_is_refused(make: Any, wrap: Any) -> None:
    optimizer = make(nn.Linear(3, 1).parameters())
    with pytest.raises(TypeError, match=rf"cannot step {make.__name__}, .* `with goals.one_step\(\): optimizer.step"):
        StepGuard(wrap(optimizer))


def test_the_docstring_says_what_it_is() -> None:
    text = " ".join((inspect.getdoc(StepGuard) or "").split())
    assert "The collective skipping of a bad step on all ranks is ``StepGuard(process_group=)``" in text
