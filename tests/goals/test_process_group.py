"""Test statistics and GoalSet with a process_group of 1, 2 and 4 processes against one process with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import bomkern
from bench import ranks
from bomkern import Anchored, Calibrated, GoalSet, Minimize, ShareGuard, StepGuard, Tracking
from bomkern.common import process_group
from tests.support.processes import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
# Policies and history are float32 for goals of any dtype.
ROUNDING = {"torch.float32": 2e-5, "torch.float64": 1e-12}


@pytest.fixture(scope="module")
def truth() -> dict[str, dict[str, Any]]:
    return {str(dtype): ranks.alone(dtype) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("world", [pytest.param(n, marks=[pytest.mark.slow] * (n != 2)) for n in ranks.WORLDS])
def test_any_number_of_processes_is_one(world: int, truth: dict[str, dict[str, Any]]) -> None:
    wrong = []
    for rank, found in enumerate(ranks.on_ranks(world)):
        for dtype, expected in truth.items():
            for name, tensors in expected.items():
                allowed = max(ROUNDING[dtype], 1e-7 if name.startswith("GoalSet") else 0)
                for k, (ours, whole) in enumerate(zip(found[dtype][name], tensors, strict=True)):
                    if not ranks.difference(ours, whole) <= allowed:
                        wrong.append(f"{name}, {dtype}, rank {rank}, part {k}: {ranks.difference(ours, whole):.2g}")
    assert not wrong, "\n".join(wrong)


def test_parts_are_not_the_whole(truth: dict[str, dict[str, Any]]) -> None:
    """Without sharing, the statistics of a part differ from the whole's, so the test above can fail."""
    x, noise = ranks.batch(0, torch.float64)
    half = ranks.encode(ranks.weights(torch.float64), x[:12], noise[:12])
    for name, expected in truth["torch.float64"].items():
        if name in ranks.STATISTICS:
            assert abs(float(ranks.STATISTICS[name](half, None) - expected[0])) > 1e-4, name


def test_shapes_are_not_compared_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing shapes would wait for the device. The steps before the capture have compared them."""
    several = process_group.Ranks()
    several.group = object()
    with pytest.raises(Exception, match="object"):  # communicates with the other processes
        several.check_shape("x", torch.rand(3))
    monkeypatch.setattr(process_group, "capturing", lambda device: True)
    several.check_shape("x", torch.rand(3))


class Model(torch.nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(ranks.weights(torch.float64))
        self.goals = ranks.goal_set(group, spill=0.5)
        self.group = group

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> Any:
        raw = ranks.raw_values(ranks.encode(self.w, x, noise), x, self.group)
        if self.goals.steps == 0:
            self.goals.anchor(baseline={"latent.tc": raw["latent"]["tc"].detach() - 1})
        return self.goals(raw)


def _fit(model: torch.nn.Module, inner: Model, group: Any) -> list[torch.Tensor]:
    guard = StepGuard(torch.optim.Adam(model.parameters(), lr=0.05, fused=True), goals=inner.goals, process_group=group)
    losses = []
    for step in range(5):
        out = model(*ranks.part(group, *ranks.batch(step, torch.float64)))
        guard.zero_grad()
        out.loss.backward()
        guard.step(out.finite)
        losses.append(out.loss.detach())
    return [torch.stack(losses), inner.w.detach()]


def _ddp(group: Any) -> None:
    whole = Model(None)
    expected = _fit(whole, whole, None)
    mine = Model(group)
    ours = _fit(torch.nn.parallel.DistributedDataParallel(mine), mine, group)
    for a, b in zip(ours, expected, strict=True):
        assert ranks.difference(a, b) < 1e-7


def _one_bad_sample(group: Any) -> None:
    """All ranks see a bad sample, and all take the step or none does."""
    goals = GoalSet(a=Minimize(1.0), b=Anchored(0.0, 2.0), spill=0.5, process_group=group)
    bad = torch.tensor([0.5, torch.nan if dist.get_rank() == 1 else 0.5], requires_grad=True)
    out = goals({"a": bad, "b": torch.tensor(0.3)})
    assert not out.finite and not torch.isfinite(out.loss)
    assert goals.history["finite"].tolist() == [0]


def _errors(group: Any) -> None:
    uneven = torch.rand(4 + dist.get_rank(), 3)
    for call in (
        lambda: bomkern.total_correlation(uneven, uneven, uneven, process_group=group),
        lambda: bomkern.gaussian_total_correlation(uneven, process_group=group),
        lambda: bomkern.covariance_penalty(uneven, process_group=group),
        lambda: bomkern.active_units(uneven, process_group=group),
        lambda: bomkern.latent_statistics(uneven, uneven, uneven, process_group=group),
        lambda: GoalSet(a=Minimize(1.0), process_group=group)({"a": uneven[:, 0]}),
    ):
        with pytest.raises(ValueError, match=r"same shape on all ranks of process_group, got \[4.*on rank 0, \[5"):
            call()
    with pytest.raises(ValueError, match="route must be 'auto' or 'never' with a process_group"):
        GoalSet(a=Minimize(1.0), route="always", process_group=group)
    few = torch.rand(2, 5)
    with pytest.raises(ValueError, match=r"more samples than dimensions, got \[2, 5\] of 2 ranks"):
        bomkern.gaussian_total_correlation(few, process_group=group)
    z = torch.rand(4, 3)
    with pytest.raises(ValueError, match="dataset_size must be at least the batch size, 8, got 7"):
        bomkern.total_correlation(z, z, z, 7, process_group=group)


def _parts(group: Any) -> None:
    """The parts and the averaged gradients are those of one process; also of some rows, in any order."""
    code = ranks.encode(ranks.weights(torch.float64), *ranks.batch(0, torch.float64))
    whole = [x.detach().requires_grad_() for x in code]
    own = [x.detach().requires_grad_() for x in ranks.part(group, *whole)]
    count, world = len(own[0]), dist.get_world_size(group)
    some, start = torch.tensor([3, 0, 2]), count * dist.get_rank(group)
    for estimator, rows in (("mws", None), ("mss", None), ("mws", some)):
        z = own[0] if rows is None else own[0][rows]
        options: dict[str, Any] = {"dataset_size": 500, "estimator": estimator, "parts": True}
        ours = bomkern.total_correlation(z, *own[1:], rows=rows, process_group=group, **options)
        expected = bomkern.total_correlation(*whole, **options)
        chosen = [count * r + k for r in range(world) for k in (range(count) if rows is None else rows.tolist())]
        at = torch.arange(count) if rows is None else rows
        for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert ranks.difference(a.detach(), b.detach()[start + at]) < 1e-10
            grads = torch.autograd.grad((k + 1) * a.mean(), own, retain_graph=True)
            wanted = torch.autograd.grad((k + 1) * b[chosen].mean(), whole, retain_graph=True)
            for x, y in zip(grads, wanted, strict=True):  # DistributedDataParallel divides by the number of ranks
                assert ranks.difference(x / world, ranks.part(group, y)[0]) < 1e-10


def _halves(group: Any) -> None:
    """Halves are gathered in float32. Values and gradients have the dtypes that a single process gives."""
    code = ranks.encode(ranks.weights(torch.float32), *ranks.batch(0, torch.float32))
    whole = [x.bfloat16().requires_grad_() for x in code]
    own = [x.detach().requires_grad_() for x in ranks.part(group, *whole)]
    expected = bomkern.total_correlation(*whole)
    ours = bomkern.total_correlation(*own, process_group=group)
    assert ours.dtype == torch.float32
    assert ranks.difference(ours.detach(), ranks.part(group, expected.detach())[0]) < 1e-5
    ours.sum().backward()
    expected.sum().backward()
    for a, b in zip(own, whole, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert ranks.difference(a.grad, ranks.part(group, b.grad)[0]) < 1e-2


def _compiled(group: Any) -> None:
    def step(w: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, goals: GoalSet) -> torch.Tensor:
        raw = ranks.raw_values(ranks.encode(w, x, noise), x, group)
        return goals(raw).loss

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        goals = ranks.goal_set(group)
        goals.anchor(baseline={"latent.tc": 1.0})
        w = ranks.weights(torch.float64).requires_grad_()
        losses = []
        for k in range(3):
            loss = run(w, *ranks.part(group, *ranks.batch(k, torch.float64)), goals)
            loss.backward()
            losses.append(loss.detach())
        found.append((torch.stack(losses), w.grad, goals.history["share"], goals.history["scale"]))
    for a, b in zip(*found, strict=True):
        assert ranks.difference(a, b) < 1e-7


def _twice(group: Any) -> None:
    """Differentiate a gradient penalty on a statistic of the batch."""

    def penalty(group: Any) -> torch.Tensor:
        w = ranks.weights(torch.float64).requires_grad_()
        code = ranks.encode(w, *ranks.part(group, *ranks.batch(0, torch.float64)))
        value = bomkern.covariance_penalty(code.z, True, reduction="batch", process_group=group)
        value = value + bomkern.active_units(code.mu, process_group=group)[0]
        (grad,) = torch.autograd.grad(value, w, create_graph=True)
        if group is not None:  # average the gradient here as DistributedDataParallel averages the parameters' gradients
            grad = bomkern.common.process_group.ranks_of(group).total(grad) / dist.get_world_size(group)
        grad.square().sum().backward()
        return ranks.averaged(w.grad, group)

    assert ranks.difference(penalty(group), penalty(None)) < 1e-10


def _accumulated(group: Any) -> None:
    """Micro-batches on all ranks, with DistributedDataParallel's no_sync, are one step of one process."""

    def train(goals: GoalSet, model: Any, group: Any, splits: int) -> list[torch.Tensor]:
        source, grads = torch.Generator().manual_seed(1), []
        for step in range(5):
            model.zero_grad()
            parts = ranks.part(group, torch.randn(32, 4, generator=source))[0].chunk(splits)
            for k, x in enumerate(parts):
                last = k == splits - 1
                with contextlib.nullcontext() if last else model.no_sync(), goals.accumulate(last=last):
                    y = model(x)
                    loss = goals(dict(zip(goals.names, (y**2).unbind(1), strict=True))).loss
                    (loss / splits).backward()
            goals.accept(torch.tensor(step != 3))
            grads.append(next(model.parameters()).grad.clone())
        return grads

    for policies in (False, True):
        first, second = (Calibrated(2), Tracking(halflife=3)) if policies else (Anchored(0.0, 1.0), Minimize(2.0))
        rules = {"spill": 0.5, "guard": ShareGuard(0.1, 0.3)}
        ours, whole = (
            GoalSet(a=first, b=second, c=Anchored(0.0, 1.0), d=Minimize(2.0), process_group=g, **rules)
            for g in (group, None)
        )
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        expected = train(whole, copy.deepcopy(model), None, 1)
        found = train(ours, torch.nn.parallel.DistributedDataParallel(model), group, 4)
        assert torch.equal(ours.policy_state, whole.policy_state) and ours.steps == whole.steps == 5
        assert ours.history["finite"].tolist() == [1, 1, 1, 0, 1]
        for part in ("raw", "highest", "share", "deficit")[: 2 if policies else 4]:
            assert ranks.difference(ours.history[part], whole.history[part]) < 1e-6
        if not policies:  # which learn from the micro-batches so far
            for a, b in zip([*found, ours.average, ours.params], [*expected, whole.average, whole.params], strict=True):
                assert ranks.difference(a, b) < 1e-6
            assert torch.equal(ours.multipliers, whole.multipliers)


def _copies(group: Any) -> None:
    goals = GoalSet(a=Minimize(1.0), process_group=group)
    assert copy.deepcopy(goals)._ranks.size == 2
    file = io.BytesIO()
    torch.save(goals, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)._ranks.size == 1
    module = bomkern.nn.CovariancePenalty(process_group=group)
    assert "process_group of 2 ranks" in repr(copy.deepcopy(module))
    z = torch.rand(4, 3) + dist.get_rank()
    assert torch.equal(module(z), bomkern.covariance_penalty(z, process_group=group))
    own = dist.new_group([0]), dist.new_group([1])
    assert torch.equal(bomkern.covariance_penalty(z, process_group=own[dist.get_rank()]), bomkern.covariance_penalty(z))
    with pytest.raises(ValueError, match="process_group must be a group that this process is a member of"):
        bomkern.covariance_penalty(z, process_group=own[1 - dist.get_rank()])


CHECKS = (_ddp, _one_bad_sample, _errors, _parts, _halves, _compiled, _twice, _accumulated, _copies)


def _check(group: Any, rank: int) -> list[str]:
    for check in CHECKS:
        check(group)
    return [check.__name__ for check in CHECKS]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    assert on_two_ranks(_check, tmp_path) == [[check.__name__ for check in CHECKS]] * 2


def test_not_a_group() -> None:
    for make in (lambda **g: GoalSet(a=Minimize(1.0), **g), bomkern.nn.ActiveUnits):
        with pytest.raises(TypeError, match=r"process_group must be .*ProcessGroup or None, got str"):
            make(process_group="world")
