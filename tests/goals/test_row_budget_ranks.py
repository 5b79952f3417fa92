"""Test `Spill(budget=)` with a process_group of two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bomkern import GoalSet, Minimize, Spill, lazy
from tests.support.processes import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
BATCH = 12  # samples of a rank
WEIGHTS = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64) / 7


def make(group: Any, budget: float | None, look: int | None = None, **options: Any) -> GoalSet:
    spill = Spill(0.5, budget=budget, look=look)
    goals = GoalSet(a=Minimize(1.0), b=Minimize(2.0), c=Minimize(0.5), spill=spill, process_group=group, **options)
    goals.double().multipliers.copy_(WEIGHTS)
    return goals


def together(x: Tensor) -> Tensor:
    """Return the values of both ranks, [2, ...]."""
    both = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(both, x.contiguous())
    return torch.stack(both)


def same(x: Tensor) -> None:
    first, second = together(x.detach())
    assert torch.equal(first, second) or bool((first.isnan() == second.isnan()).all())


def the_formula(group: Any, rank: int, reduction: str, masked: bool) -> None:
    """The loss is the weighted sum of means over the rows that both ranks took, which differ."""
    goals = make(group, 0.7, reduction=reduction, optional=["b"] if masked else [])
    differ = 0
    for step in range(6):
        goals.multipliers.copy_(WEIGHTS)
        generator = torch.Generator().manual_seed(100 * step + rank)
        raw = {n: torch.rand(BATCH, generator=generator, dtype=torch.float64).requires_grad_() for n in "abc"}
        known = torch.rand(BATCH, generator=generator) < (0.3 if rank else 0.8)
        if step == 4 and rank:
            known[:] = False
        out = goals(raw, mask={"b": known} if masked else None)
        grads = torch.autograd.grad(out.loss, list(raw.values()))
        loss = torch.zeros((), dtype=torch.float64)
        samples = 2 * BATCH
        for k, (x, grad, scale) in enumerate(zip(raw.values(), grads, (1.0, 2.0, 0.5), strict=True)):
            rows = grad != 0
            n = min(BATCH, math.ceil(0.7 * BATCH * float(WEIGHTS[k]) - 1e-5))
            there = int(known.sum()) if masked and k == 1 else BATCH
            assert int(rows.sum()) == min(n, there)
            both = together(rows)
            differ += not torch.equal(both[0], both[1])
            total = together(torch.where(rows, x.detach(), 0)).sum() / scale
            count = both.sum()
            assert int(out.rows[k]) == int(count)
            loss += WEIGHTS[k] * total / count
            factor = samples if reduction == "sum" else 1
            torch.testing.assert_close(grad[rows], torch.full_like(grad[rows], 2 * factor * WEIGHTS[k] / scale / count))
            assert float(out["raw"][k]) == pytest.approx(float(total * scale / count))
        torch.testing.assert_close(out.loss.detach(), loss * (samples if reduction == "sum" else 1))
        same(out.loss)
        same(out.record)
        same(goals.multipliers)
    assert differ


def enough_is_all(group: Any, rank: int) -> None:
    ours, exact = make(group, 100.0), make(group, None)
    for step in range(3):
        x = torch.rand(3, BATCH, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
        one, other = (goals(dict(zip("abc", x, strict=True))) for goals in (ours, exact))
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.record, other.record)


def looks(group: Any, rank: int, masked: bool) -> None:
    """Every second step the record is that of all rows of both ranks."""
    goals, exact = (make(group, budget, look, optional=["b"]) for budget, look in ((0.5, 2), (None, None)))
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.rand(3, BATCH, generator=generator, dtype=torch.float64)
        mask = {"b": torch.rand(BATCH, generator=generator) < 0.5} if masked else None
        for each in (goals, exact):
            each.multipliers.copy_(WEIGHTS)
        raw = {name: lazy(torch.sin, x[k]) for k, name in enumerate("abc")}
        one, other = goals(raw, mask), exact(dict(zip("abc", x.sin(), strict=True)), mask)
        for part in ("level", "deficit", "raw"):
            assert torch.allclose(one[part], other[part]) == (step % 2 == 0), part
        assert torch.equal(one.rows, other.rows) == (step % 2 == 0)
        same(one.record)
        same(goals.average)


def no_further_gather(group: Any, rank: int) -> None:
    """The counts of the other rank are known without a gather."""
    ours, exact, counts = make(group, 0.7), make(group, None), []
    x = torch.rand(3, BATCH, dtype=torch.float64)
    for goals in (exact, ours):
        gathers: list[int] = []
        original = goals._ranks.gather
        goals._ranks.gather = lambda t, seen=gathers, do=original: (seen.append(t.numel()), do(t))[1]  # type: ignore
        try:
            for _ in range(2):
                goals(dict(zip("abc", x, strict=True)))
        finally:
            del goals._ranks.gather
        counts.append(len(gathers))
    assert counts[1] == counts[0] == 2  # shapes were compared before


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.decode, self.judge = nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor, goals: GoalSet, wrap: Any, mask: Any) -> Tensor:
        z = self.encode(x)
        y = wrap(self.decode, z)
        return goals({"a": wrap(_error, y, x), "b": wrap(_judged(self.judge), y), "c": z.square().mean(1)}, mask).loss


def _judged(judge: nn.Module) -> Any:
    def judged(y: Tensor) -> Tensor:
        return judge(y)[:, 0].square()

    return judged


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def data_parallel(group: Any, rank: int, masked: bool) -> None:
    """Lazy goals under DistributedDataParallel give the gradients of plain ones, equal on both ranks."""
    found = []
    for wrap in (lazy, lambda fn, *args: fn(*args)):
        goals = make(group, 0.6, look=2, optional=["b"] if masked else [])
        model = DistributedDataParallel(Net())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(5):
            x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
            known = torch.arange(BATCH) % 3 > 0
            if step == 2 and rank:  # a goal that one rank lacks
                known[:] = False
            optimizer.zero_grad()
            model(x, goals, wrap, {"b": known} if masked else None).backward()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
        for p in model.parameters():
            same(p)
    torch.testing.assert_close(*found)


def fully_sharded(group: Any, rank: int) -> None:
    """Lazy goals under FSDP2, where every function is a module of its own, give the gradients of plain ones."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    found = []
    for wrap in (lazy, lambda fn, *args: fn(*args)):
        goals, model = make(group, 0.6, look=2), Net()
        for module in (model.encode, model.decode, model.judge):
            fully_shard(module)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)
            optimizer.zero_grad()
            model(x, goals, wrap, None).backward()
            optimizer.step()
        parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        found.append([p.detach().clone() for p in parameters])
    torch.testing.assert_close(*found)


def in_expectation(group: Any, rank: int) -> None:
    """The mean of 2,000 draws of the loss is that of all rows, within 3.5 of its standard errors."""
    x = torch.rand(3, BATCH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    raw = dict(zip("abc", x, strict=True))
    exact, goals, losses = make(group, None)(raw).loss, make(group, 0.5), []
    for _ in range(2000):
        goals.multipliers.copy_(WEIGHTS)
        losses.append(goals(raw).loss)
    drawn = torch.stack(losses) / exact
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean()) - 1) < 3.5 * error < 0.02


def _check(group: Any, rank: int, whole: bool) -> None:
    for reduction in ("mean", "sum"):
        for masked in (False, True):
            the_formula(group, rank, reduction, masked)
    enough_is_all(group, rank)
    no_further_gather(group, rank)
    for masked in (False, True):
        data_parallel(group, rank, masked)
        looks(group, rank, masked)
    if whole:
        fully_sharded(group, rank)
        in_expectation(group, rank)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_draw_apart_and_agree(tmp_path: Path, whole: bool) -> None:
    assert len(on_two_ranks(_check, tmp_path, whole)) == 2
