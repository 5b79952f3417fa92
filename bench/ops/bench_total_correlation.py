"""Time total_correlation against eager PyTorch, torch.compile, KeOps and bare exponentials, and measure its memory.

One exponential is one element of the textbook formula's B x B x D array, in each direction.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bench.harness import BOTH, OURS, PEERS, Case, Function, Size, about, in_turn, measure, sizes_and, sizes_at, slowest
from bench.machine import DEVICE, ROOT
from bench.regimes import CODES, codes
from bench.report.write import SHOWN

SIZES = [{"B": 512, "D": 128}]
LARGE = [{"B": 1024, "D": 128}]
# Further sizes, to fit the growth of the cost.
BATCHES = [{"B": batch, "D": 32} for batch in (128, 256, 512, 1024)]
DIMS = [{"B": 512, "D": dims} for dims in (16, 64)]
if DEVICE == "cuda":
    LARGE += [{"B": batch, "D": dims} for batch in (4096, 16384) for dims in (64, 128, 256)]
MEMORY_SIZE, MEMORY_LIMIT_MB = {"B": 16384, "D": 64}, 400
NOT_CPU = bomkern.info()["ops"]["total_correlation"]["cpu"]["cpu"]


def textbook(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Compute total correlation in plain PyTorch: [B, D] x 3 -> [B]."""
    batch, dims = z.shape
    log_density = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))  # [B, B, D]
    joint = log_density.sum(2).logsumexp(1)
    marginals = log_density.logsumexp(1).sum(1)
    return joint - marginals + (dims - 1) * math.log(batch)


@functools.cache
def keops() -> Function:
    """Return the same in KeOps: vectors of length D in the joint, D as a batch dimension in the marginals."""
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except Exception as error:  # the import looks for compilers and drivers
        pytest.skip(f"pykeops cannot be imported ({error}); pip install 'bomkern[bench]'")
    if DEVICE == "cuda" and not pykeops.config.gpu_available:
        pytest.skip("KeOps finds no CUDA libraries; install a CUDA toolkit")
    pykeops.set_verbose(False)

    def estimate(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        batch, dims = z.shape
        precision = torch.exp(-logvar)
        z_i, mu_j, precision_j = LazyTensor(z[:, None]), LazyTensor(mu[None]), LazyTensor(precision[None])
        logdet_j = LazyTensor(logvar.sum(1)[None, :, None])
        joint = (-0.5 * (((z_i - mu_j) ** 2 * precision_j).sum(-1) + logdet_j)).logsumexp(dim=1)  # [B, 1]

        z_i = LazyTensor(z.T.contiguous()[:, :, None, None])  # [D, B, 1, 1]
        mu_j, precision_j, logvar_j = (LazyTensor(x.T.contiguous()[:, None, :, None]) for x in (mu, precision, logvar))
        marginals = (-0.5 * ((z_i - mu_j) ** 2 * precision_j + logvar_j)).logsumexp(dim=2)  # [D, B, 1]
        return joint[:, 0] - marginals[:, :, 0].sum(0) + (dims - 1) * math.log(batch)

    return estimate


def exponentials(size: Size, direction: str) -> float:
    return float(size["B"] ** 2 * size["D"]) * (2 if direction == BOTH else 1)


# D log densities cancel: values are accurate to some 1e-5 of the largest, or of ten nats where all are near 0.
CASE = Case(
    "total_correlation", codes, bomkern.total_correlation, textbook, torch.mean, exponentials, "exponentials",
    regimes=CODES, tolerance=(1e-4, 1e-4), least=(10.0, 1.0), more={"KeOps": keops},
)  # fmt: skip


@sizes_and(SIZES, *PEERS, "KeOps", regimes=CODES, at=SHOWN["total_correlation"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_and(
    LARGE, OURS, "torch.compile", "eager", "KeOps",
    directions=(BOTH,), regimes=CODES, at=SHOWN["total_correlation"],
)  # fmt: skip
def test_large(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at([*SIZES, *LARGE], SHOWN["total_correlation"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)


@sizes_at([*SIZES, *LARGE], SHOWN["total_correlation"])
def test_keops_where_we_are_slowest(benchmark: Any, size: Size) -> None:
    """Time KeOps, whose calls take seconds, in two regimes alone: the usual one and our slowest in this run."""
    regime = slowest(CASE, size)
    if regime == CASE.usual:
        pytest.skip("no other regime was slower in this run")
    measure(benchmark, CASE, "KeOps", size, BOTH, regime)


@sizes_and(BATCHES + DIMS, OURS, "torch.compile", "eager", "KeOps", directions=(BOTH,))
def test_growth(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_and([{"B": batch, "D": 32} for batch in (2048, 4096)], OURS, directions=(BOTH,))
def test_growth_beyond_the_temporary(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


# Prints the peak memory of a forward and a backward above their inputs, in bytes.
PEAK = """
import sys, torch, bomkern
from bench.machine import peak_bytes

def step(batch, dims=int(sys.argv[2])):
    x = [torch.randn(batch, dims).requires_grad_() for _ in range(3)]
    return lambda: torch.autograd.grad(bomkern.total_correlation(*x).mean(), x)

step(64)()  # loads libraries and starts threads first: their memory does not count
print(peak_bytes(step(int(sys.argv[1])), 1))
"""


@pytest.mark.skipif(NOT_CPU is not None, reason=f"the reference needs minutes: {NOT_CPU}")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs to measure with")
def test_peak_memory(benchmark: Any, capsys: Any) -> None:
    """Measure forward and backward on the CPU in a separate process. The textbook's temporary alone is 69 GB."""

    def peak() -> float:
        command = [sys.executable, "-c", PEAK, *map(str, MEMORY_SIZE.values())]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    about(benchmark, "total_correlation", "total_correlation", "peak memory", OURS, MEMORY_SIZE)
    peak_bytes = benchmark.pedantic(peak, rounds=1)
    benchmark.extra_info.update(peak_bytes=peak_bytes, device="cpu", calls=1)
    with capsys.disabled():
        print(f"\n{benchmark.group}: peak {peak_bytes / 1e6:.0f} MB above its inputs")
    assert peak_bytes / 1e6 < MEMORY_LIMIT_MB
