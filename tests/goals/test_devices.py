"""Test a `GoalSet` on devices that are neither the CPU nor CUDA, with the meta device in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bomkern import (
    Anchored,
    Calibrated,
    GoalSet,
    Group,
    Minimize,
    ShareGuard,
    StepGuard,
    Tracking,
    diagnose,
    lazy,
    min_goal_loss,
    total_correlation,
)
from bomkern.common import devices, process_group
from bomkern.common.host_copy import HostCopy, capturing
from bomkern.dispatch.routing import routes
from bomkern.report import write_report

META = torch.device("meta")


class NoDouble(TorchDispatchMode):
    """Refuse float64 on the meta device, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_meta and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return out


def goal_set(**how: Any) -> GoalSet:
    goals = {"a": Calibrated(3), "b": Tracking(3.0), "c": Anchored("floor", "baseline", moving=True)}
    return GoalSet(goals, d=Group(x=Minimize(1.0), y=Calibrated(3, 0.9)), **how)


def raw_on(device: torch.device) -> dict[str, Any]:
    a, b, c, x, y = torch.rand(5, 4, device=device, requires_grad=True).unbind()
    return {"a": a, "b": b, "c": c, "d": {"x": x, "y": y}}


def test_the_mode_refuses() -> None:
    with NoDouble():
        torch.ones(2, dtype=torch.float64)
        for make in (
            lambda: torch.ones(2, dtype=torch.float64, device=META),
            lambda: torch.ones(2, device=META).double(),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()


@pytest.mark.parametrize("how", [{}, {"spill": 0.5}, {"guard": ShareGuard(0.1, 0.3), "temperature": 0.1}])
def test_no_float64_is_made_on_a_device_without_it(how: dict[str, Any]) -> None:
    with NoDouble():
        with META:
            goals = goal_set(**how)
        goals.anchor(floor={"c": 0.25}, baseline={"c": torch.tensor([2.0])})
        for _ in range(2):
            goals(raw_on(META)).loss.backward()
            goals.accept(torch.ones((), dtype=torch.bool, device=META))
        goals.remeasure({"c": (torch.rand(3, device=META), 2.0)})
        goals["a"] = Minimize(2.0)
        goals.state_dict()
        assert "on meta" in str(goals)
        x = torch.rand(4, 3, device=META, requires_grad=True)
        min_goal_loss([x[:, 0], x[:, 1]], [Minimize(1.0), Minimize(2.0)]).backward()
        for estimator in ("mws", "mss"):
            total_correlation(x, x, x, 100, estimator, impl="reference").sum().backward()


def test_anchors_of_several_ranks_keep_their_digits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank gathers float32 tensors, and the agreed number has more digits than one of them."""
    ranks, sent = process_group.Ranks(), []
    ranks.size = 2
    other = 0.7
    parts = [float(torch.tensor(other)), other - float(torch.tensor(other))]

    def gather(x: Tensor) -> Tensor:
        sent.append(x)
        return torch.stack([x, torch.tensor(parts)]) if x.shape == (2,) else torch.stack([x, x])

    monkeypatch.setattr(ranks, "gather", gather)
    goals = GoalSet(a=Anchored("floor", 100.0))
    goals.anchoring.ranks = ranks
    goals.anchor(floor={"a": 0.1})
    assert sent and all(x.dtype == torch.float32 for x in sent)
    assert goals.anchoring._known["a"]["ideal"] == pytest.approx(0.4, rel=1e-13)
    goals = GoalSet(a=Anchored("floor", 100.0))
    goals.anchoring.ranks = ranks
    with pytest.raises(ValueError, match="the ideal of a must be finite, got inf"):
        goals.anchor(floor={"a": float("inf")})


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_what_stays_on_the_host_heeds_no_default_device(tmp_path: Path) -> None:
    """The history, the diagnosis and the page of a run are on the host, whatever torch's default device is."""
    with default_device("meta"):
        goals = goal_set(spill=0.5).to_empty(device="cpu")
        goals.anchor(floor={"c": 0.25}, baseline={"c": 2.0})
        with torch.device("cpu"):
            batches = [raw_on(torch.device("cpu")) for _ in range(300)]
        for raw in batches:
            goals(raw)
        assert goals.history["raw"].isfinite().all() and int(goals.history.steps[-1]) == goals.steps == 300
        assert goals.monitor.take_mean().steps == 300
        assert "the gradient went to" in str(diagnose(goals.history))
        write_report(tmp_path / "report.html", goals.history, diagnose(goals.history))
        again = goal_set(spill=0.5).to_empty(device="cpu")
        again.load_state_dict(goals.state_dict())
        assert str(again) == str(goals)
        other = GoalSet({"c": Anchored(0.0, 1.0), "a": Calibrated(3)}, spill=0.5).to_empty(device="cpu")
        other.load_state_dict(goals.state_dict())
        assert other.anchors()["a"] == goals.anchors()["a"]
        with torch.device("cpu"):
            x = torch.rand(6, 3, requires_grad=True)
        few = GoalSet(a=Minimize(1.0), b=Minimize(1.0), route="always").to_empty(device="cpu")
        few({"a": lazy(lambda x: x.square()[:, 0], x), "b": x[:, 1]})


def test_other_devices_are_not_taken_for_cuda() -> None:
    for kind in ("mps", "xpu", "hpu", "privateuseone", "meta"):
        device = torch.device(kind)
        assert not capturing(device) and not routes("auto", device)
        assert devices.widest_float(device) == torch.float32
    assert routes("auto", torch.device("cpu")) and devices.widest_float(torch.device("cuda")) == torch.float64


class Elsewhere:
    """A tensor on a device that this machine lacks, as far as a copy to the host reads it."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.device, self.copied = values, torch.device("mps"), 0

    def cpu(self) -> Tensor:
        self.copied += 1
        return self.values.clone()


def test_a_copy_from_another_device_is_plain() -> None:
    source: Any = Elsewhere(torch.rand(3))
    copied = HostCopy(source)
    assert torch.equal(copied.wait(), source.values) and source.copied == 1


def test_other_devices_have_their_own_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Module:
        @staticmethod
        def get_rng_state(*device: Any) -> Tensor:
            calls.append(("get", *device))
            return torch.zeros(1)

        @staticmethod
        def set_rng_state(*arguments: Any) -> None:
            calls.append(("set", *arguments))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(torch, "mps", Module)
    before = torch.get_rng_state()
    for kind in ("mps", "xpu"):
        device = torch.device(kind)
        devices.set_rng_state(device, devices.rng_state(device))
    state, xpu = torch.zeros(1), torch.device("xpu")
    assert calls == [("get",), ("set", state), ("get", xpu), ("set", state, xpu)]
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_elsewhere_are_checked_by_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused check of a GradScaler exists on the CPU and on CUDA alone."""
    from bomkern.common.torch_internals import optimizers

    def missing(*arguments: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(optimizers, "_unscale", missing)
    weight = torch.nn.Parameter(torch.ones(3, device=META))
    weight.grad = torch.ones(3, device=META)
    guard = StepGuard(torch.optim.SGD([weight], 0.1, fused=False))
    assert guard._found_inf(None).is_meta
