"""Compare 1, 2 and 4 processes that share a batch with one that has all of it, and count the numbers they exchange.

    python -m bench.ranks

starts gloo processes on the CPU, each with its part of the batch, and runs every case below in float32 and float64. It
averages the gradients as DistributedDataParallel does, compares losses and gradients with those of one process, and
writes bench/results/ranks.json. tests/goals/test_process_group.py checks that the differences are rounding alone.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch import distributed as dist

import bomkern
from bench import machine
from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, ShareGuard, Tracking
from bomkern.common import process_group
from bomkern.common.reductions import REDUCTIONS

RESULTS = Path(__file__).resolve().parent / "results" / "ranks.json"
WORLDS = (1, 2, 4)
BATCH, INPUTS, DIMS, STEPS = 24, 7, 5, 6


class Code(NamedTuple):
    """The encoded samples of one rank."""

    z: Tensor
    mu: Tensor
    logvar: Tensor


def batch(step: int, dtype: torch.dtype, size: int = BATCH, dims: int = DIMS) -> tuple[Tensor, Tensor]:
    """Return inputs [B, P] and noise [B, D], the same in every process."""
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(size, INPUTS + dims, generator=generator, dtype=torch.float64) * 0.7
    return values[:, :INPUTS].to(dtype), values[:, INPUTS:].to(dtype)


def weights(dtype: torch.dtype, dims: int = DIMS) -> Tensor:
    """Return the encoder's weights, [P, 2 D]."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(INPUTS, 2 * dims, generator=generator, dtype=torch.float64) * 0.4).to(dtype)


def encode(w: Tensor, x: Tensor, noise: Tensor) -> Code:
    mu, logvar = (x @ w).chunk(2, 1)
    return Code(mu + torch.exp(logvar / 2) * noise, mu, logvar)


def _sum_of_fields(s: bomkern.LatentStatistics) -> Tensor:
    by_sample = (s.kl + s.logvar_mean + 2 * s.logvar_square).mean()
    by_column = (s.z_mean.square() + s.z_variance + s.mu_mean.square() + 3 * s.mu_variance).sum()
    return by_sample + by_column + s.active + s.effective


STATISTICS: dict[str, Callable[[Code, Any], Tensor]] = {
    "total_correlation": lambda c, group: bomkern.total_correlation(*c, process_group=group).mean(),
    "total_correlation, mws": lambda c, group: bomkern.total_correlation(*c, 500, process_group=group).mean(),
    "total_correlation, mss": lambda c, group: bomkern.total_correlation(*c, 500, "mss", process_group=group).mean(),
    "gaussian_total_correlation": lambda c, group: bomkern.gaussian_total_correlation(c.z, process_group=group),
    "covariance_penalty": lambda c, group: bomkern.covariance_penalty(c.z, process_group=group).square().mean(),
    "covariance_penalty, normalize": lambda c, group: (
        bomkern.covariance_penalty(c.z, True, process_group=group).square().mean()
    ),
    "covariance_penalty, batch": lambda c, group: bomkern.covariance_penalty(
        c.z, reduction="batch", process_group=group
    ),
    "covariance_penalty, normalize, batch": lambda c, group: bomkern.covariance_penalty(
        c.z, True, reduction="batch", process_group=group
    ),
    "active_units": lambda c, group: (
        lambda a, e: a + 2 * e  # both are statistics of the whole batch
    )(*bomkern.active_units(c.mu, process_group=group)),
    "latent_statistics": lambda c, group: _sum_of_fields(bomkern.latent_statistics(*c, process_group=group)),
}

# The arguments of a GoalSet beside its goals.
RULES: dict[str, dict[str, Any]] = {
    **{f"GoalSet, {reduction}": {"reduction": reduction} for reduction in REDUCTIONS},
    "GoalSet, temperature": {"temperature": 0.5},
    "GoalSet, spill": {"spill": 0.5},
    "GoalSet, guard": {"guard": ShareGuard(0.1, 0.4, rate=0.05, halflife=2.0)},
}


def goal_set(group: Any, **rule: Any) -> GoalSet:
    """Return a GoalSet with goals by sample and of the batch, and with fixed, calibrated and tracked scales."""
    return GoalSet(
        {
            "recon": Calibrated(3),
            "kl": Calibrated(4, statistic=0.8),
            "latent": Group(tc=Anchored("baseline", 6.0), spread=Minimize(2.0)),
            "idle": Tracking(halflife=3.0),
            "moving": Anchored(0.0, 3.0, moving=True),
        },
        process_group=group,
        **rule,
    )


def raw_values(code: Code, x: Tensor, group: Any) -> dict[str, Any]:
    active, effective = bomkern.active_units(code.mu, process_group=group)
    return {
        "recon": (code.z.sum(1) - x.sum(1)).square(),
        "kl": bomkern.gaussian_kl(code.mu, code.logvar),
        "latent": {
            "tc": bomkern.total_correlation(*code, 500, "mss", process_group=group),
            "spread": bomkern.covariance_penalty(code.z, process_group=group),
        },
        "idle": 1 - (active + effective) / 2,
        "moving": code.mu.square().mean(1),
    }


def statistic(name: str, group: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return value and gradient of a statistic, averaged over the ranks."""
    w = weights(dtype).requires_grad_()
    value = STATISTICS[name](encode(w, *part(group, *batch(0, dtype))), group)
    value.backward()
    return [averaged(value.detach(), group), averaged(w.grad, group)]


def training(name: str, group: Any, dtype: torch.dtype) -> list[Tensor]:
    """Take some training steps, and return the losses, the final weights and the history."""
    goals = goal_set(group, **RULES[name])
    w = weights(dtype).requires_grad_()
    losses = []
    for step in range(STEPS):
        x, noise = part(group, *batch(step, dtype))
        raw = raw_values(encode(w, x, noise), x, group)
        if step == 0:
            goals.anchor(baseline={"latent.tc": raw["latent"]["tc"].detach() - 1})
        loss = goals(raw).loss.mean()
        (grad,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= 0.02 * averaged(grad, group)
        goals.remeasure({"moving": (raw["moving"].detach() * 0, raw["moving"].detach() * 2)})
        losses.append(averaged(loss.detach(), group))
    history = goals.history
    records = [history[name].flatten() for name in ("share", "level", "deficit", "raw", "highest", "ideal", "scale")]
    return [torch.stack(losses), w.detach(), torch.cat([*records, history["loss"], history["finite"]])]


def part(group: Any, *whole: Tensor) -> list[Tensor]:
    """Return this rank's samples, all of them without a group."""
    if group is None:
        return list(whole)
    return [x.chunk(dist.get_world_size(group))[dist.get_rank(group)] for x in whole]


def averaged(x: Tensor, group: Any) -> Tensor:
    """Average a tensor over the ranks, as DistributedDataParallel does."""
    if group is not None:
        dist.all_reduce(x, group=group)
        x /= dist.get_world_size(group)
    return x


class Counted:
    """Count the numbers that collectives exchange on this rank: those a gather receives and those a sum sends."""

    def __init__(self) -> None:
        self.numbers = 0
        process_group._all_gather = self.wrap(process_group._all_gather, lambda out, x: out.numel() - x.numel())
        process_group._reduce_scatter = self.wrap(process_group._reduce_scatter, lambda out, x: x.numel() - out.numel())
        process_group.dist.all_reduce = self.wrap(process_group.dist.all_reduce, lambda x: 2 * x.numel())

    def wrap(self, call: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def counted(*tensors: Tensor, group: Any = None) -> Any:
            self.numbers += count(*tensors)
            return call(*tensors, group=group)

        return counted


def cases(group: Any, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    statistics = {name: statistic(name, group, dtype) for name in STATISTICS}
    return {**statistics, **{name: training(name, group, dtype) for name in RULES}}


SCALE = {"batch": 2048, "dims": 64, "calls": 5}


def scaling(group: Any) -> dict[str, dict[str, float]]:
    """Return seconds of forward and backward on a large batch, and the numbers exchanged, by statistic."""
    counted, figures = Counted(), {}
    torch.set_num_threads(1)
    x, noise = part(group, *batch(0, torch.float32, SCALE["batch"], SCALE["dims"]))
    w = weights(torch.float32, SCALE["dims"]).requires_grad_()
    for name in ("total_correlation", "covariance_penalty", "latent_statistics"):
        seconds = []
        for _ in range(SCALE["calls"]):
            code = Code(*(t.detach().requires_grad_() for t in encode(w, x, noise)))
            if group is not None:
                dist.barrier(group)
            counted.numbers, begun = 0, time.perf_counter()
            STATISTICS[name](code, group).backward()
            seconds.append(time.perf_counter() - begun)
        figures[name] = {"seconds": sorted(seconds)[len(seconds) // 2], "numbers": counted.numbers}
    return figures


def _worker(rank: int, world: int, folder: str, work: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    group = dist.group.WORLD
    try:
        if work == "scaling":
            result: Any = scaling(group)
        else:
            result = {str(dtype): cases(group, dtype) for dtype in (torch.float32, torch.float64)}
        torch.save(result, f"{folder}/{work}{world}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_ranks(world: int, work: str = "cases") -> list[Any]:
    """Run ``work`` on ``world`` processes, and return each one's result."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, folder, work), nprocs=world)
        return [torch.load(f"{folder}/{work}{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def alone(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    return cases(None, dtype)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest finite value of ``b``; where both are NaN they are equal."""
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0, (a - b).abs().double())
    return float(apart.max() / b[b.isfinite()].abs().max().clamp(min=1e-30))


def main() -> None:
    results: dict[str, Any] = {
        "command": "python -m bench.ranks",
        "machine": machine.name(),
        "cores": os.cpu_count(),
        "worlds": list(WORLDS),
        "batch": BATCH,
        "scale": SCALE,
        "differences": {},
        "scaling": {},
    }
    truth = {str(dtype): alone(dtype) for dtype in (torch.float32, torch.float64)}
    for world in WORLDS:
        each = on_ranks(world)
        for dtype, expected in truth.items():
            for name, tensors in expected.items():
                worst = max(difference(a, b) for rank in each for a, b in zip(rank[dtype][name], tensors, strict=True))
                results["differences"].setdefault(name, {}).setdefault(dtype.removeprefix("torch."), []).append(worst)
        for name, numbers in on_ranks(world, "scaling")[0].items():
            results["scaling"].setdefault(name, []).append(numbers)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["differences"].items():
        print(f"{name:38}", *(f"{dtype} " + " ".join(f"{x:.1e}" for x in values) for dtype, values in row.items()))
    for name, runs in results["scaling"].items():
        print(name, *(f"{run['seconds'] * 1e3:.1f} ms {run['numbers']:,} numbers" for run in runs), sep="  ")


if __name__ == "__main__":
    main()
