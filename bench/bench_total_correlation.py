"""total_correlation against eager PyTorch, torch.compile and KeOps; its memory; its share of the bare exponentials.

Every result is checked against the reference in float64 before it is timed. One "exponential" is one element of the
B x B x D array that the textbook's formula makes.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import reference

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(512, 128), (1024, 128)]
if DEVICE == "cuda":
    SIZES += [(batch, dims) for batch in (4096, 16384) for dims in (64, 128, 256)]
MEMORY_SIZE, MEMORY_LIMIT_MB = (16384, 64), 400
CEILING_SIZE = (512, 128)
COMPILER = shutil.which("g++") or shutil.which("c++")
NOT_CPU = bomkern.info()["ops"]["total_correlation"]["cpu"]["cpu"]
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]


def textbook(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """As one writes it in plain PyTorch: [B, D] x 3 -> [B]."""
    batch, dims = z.shape
    log_density = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi))  # [B, B, D]
    joint = log_density.sum(2).logsumexp(1)
    marginals = log_density.logsumexp(1).sum(1)
    return joint - marginals + (dims - 1) * math.log(batch)


@functools.cache
def keops() -> Estimate | str:
    """The same in KeOps, or why not: vectors of length D in the joint, D as a batch dimension in the marginals."""
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except Exception as error:  # it looks for compilers and drivers as it is imported
        return f"pykeops cannot be imported ({error}); pip install 'bomkern[bench]'"
    if DEVICE == "cuda" and not pykeops.config.gpu_available:
        return "KeOps finds no CUDA libraries; it needs those of a CUDA toolkit beside it"
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


def peer(name: str) -> Estimate:
    if name == "eager":
        return textbook
    if name == "torch.compile":
        torch._dynamo.reset()
        return torch.compile(textbook, mode="max-autotune-no-cudagraphs" if DEVICE == "cuda" else None)
    if name == "KeOps":
        found = keops()
        return pytest.skip(found) if isinstance(found, str) else found
    return bomkern.total_correlation


@functools.cache
def latents(batch: int, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors wide enough that a sample has many components in its joint, as early in training."""
    source = torch.Generator().manual_seed(0)
    mu, logvar, noise = torch.randn(3, batch, dims, generator=source).unbind()
    mu, logvar = 0.3 * mu, 0.2 * logvar - 0.3
    z = mu + noise * torch.exp(logvar / 2)
    return tuple(x.to(DEVICE).requires_grad_() for x in (z, mu, logvar))  # type: ignore[return-value]


@functools.cache
def exact(batch: int, dims: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values, and gradients of their mean, by the reference in float64."""
    x = [t.detach().double().requires_grad_() for t in latents(batch, dims)]
    value = reference.total_correlation(*x, None, False, limit=2**28 if DEVICE == "cuda" else 2**22)
    return value.detach(), torch.autograd.grad(value.mean(), x)


def check(estimate: Estimate, batch: int, dims: int, backward: bool) -> None:
    """Values within 1e-3 nats, where D log densities cancel; gradients within 1e-4 of their largest element."""
    x = latents(batch, dims)
    want, gradients = exact(batch, dims)
    got = estimate(*x)
    assert (got.double() - want).abs().max() < 1e-3 + 1e-5 * want.abs().max()
    if backward:
        for a, b in zip(torch.autograd.grad(got.mean(), x), gradients, strict=True):
            assert (a.double() - b).abs().max() < 1e-4 * b.abs().max()


def measure(benchmark: Any, name: str, batch: int, dims: int, backward: bool) -> None:
    estimate, x = peer(name), latents(batch, dims)
    calls = 10 if DEVICE == "cuda" and batch <= 1024 else 1

    def once() -> None:
        if backward:
            torch.autograd.grad(estimate(*x).mean(), x)
        else:
            with torch.no_grad():
                estimate(*x)

    def step() -> None:
        for _ in range(calls):
            once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    info = {"peer": name, "device": DEVICE, "calls": calls, "exponentials": batch * batch * dims}
    try:
        check(estimate, batch, dims, backward)
        if DEVICE == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            once()
            info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit in the GPU's memory at B={batch}, D={dims}")
    benchmark.group = f"total_correlation {'forward+backward' if backward else 'forward'} B={batch} D={dims}"
    benchmark.extra_info.update(info)
    benchmark.pedantic(step, rounds=15 if name == "bomkern" else 5, warmup_rounds=1)
    if benchmark.stats:  # none with --benchmark-disable
        each = benchmark.stats.stats.median * 1e9 / (calls * batch * batch * dims)
        benchmark.extra_info["ns_per_exponential"] = each


@pytest.mark.parametrize("name", ["bomkern", "KeOps", "torch.compile", "eager"])
@pytest.mark.parametrize(("batch", "dims"), SIZES)
def test_forward_backward(benchmark: Any, batch: int, dims: int, name: str) -> None:
    measure(benchmark, name, batch, dims, backward=True)


@pytest.mark.parametrize("name", ["bomkern", "KeOps", "torch.compile", "eager"])
@pytest.mark.parametrize(("batch", "dims"), SIZES)
def test_forward(benchmark: Any, batch: int, dims: int, name: str) -> None:
    measure(benchmark, name, batch, dims, backward=False)


# Prints by how many MB the resident memory peaks above what it was when the inputs existed.
PEAK = """
import sys, torch, bomkern

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6

def step(batch):
    x = [torch.randn(batch, int(sys.argv[2])).requires_grad_() for _ in range(3)]
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again from here
    bomkern.total_correlation(*x).mean().backward()
    return status("VmHWM") - before

step(64)  # threads and libraries are not what is asked
print(step(int(sys.argv[1])))
"""


@pytest.mark.skipif(NOT_CPU is not None, reason=f"the reference needs minutes: {NOT_CPU}")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs to measure with")
def test_peak_memory(benchmark: Any, capsys: Any) -> None:
    """Forward and backward on the CPU in a process of its own. The textbook's temporary alone would be 69 GB."""
    batch, dims = MEMORY_SIZE

    def peak() -> float:
        command = [sys.executable, "-c", PEAK, str(batch), str(dims)]
        return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    benchmark.group = f"total_correlation peak memory B={batch} D={dims}"
    found = benchmark.pedantic(peak, rounds=1)
    benchmark.extra_info.update(peak_mb=found, device="cpu", exponentials=batch * batch * dims)
    with capsys.disabled():
        print(f"\ntotal_correlation B={batch} D={dims}: peak {found:.0f} MB above its inputs")
    assert found < MEMORY_LIMIT_MB


@pytest.mark.skipif(NOT_CPU is not None, reason=f"no kernel to compare: {NOT_CPU}")
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_share_of_the_exponentials_ceiling(benchmark: Any, capsys: Any, tmp_path: Path) -> None:
    """Forward on one thread, beside the kernels' own exp2 in a loop that does nothing else (bench/exp2_ceiling.cpp)."""
    simd = bomkern.info()["build"]["simd_here"]
    target = [] if simd == "baseline" else [f'-DTARGET="target_{simd}.h"']
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi", "-std=c++20"]
    program = str(tmp_path / "exp2_ceiling")
    source = str(ROOT / "bench/exp2_ceiling.cpp")
    subprocess.run([str(COMPILER), *flags, f"-I{ROOT}/kernels/common", *target, source, "-o", program], check=True)
    batch, dims = CEILING_SIZE
    x = [t.detach().cpu() for t in latents(batch, dims)]
    ceilings: list[float] = []

    def ceiling() -> None:
        # Before each round, so that a busy neighbour or a changed clock meets both.
        ceilings.append(float(subprocess.run([program], capture_output=True, text=True, check=True).stdout))

    benchmark.group = f"total_correlation forward on one thread B={batch} D={dims}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(lambda: bomkern.total_correlation(*x), setup=ceiling, rounds=20, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(device="cpu", simd=simd, exponentials=batch * batch * dims)
    if not benchmark.stats:  # --benchmark-disable
        return
    # The least of each: what disturbs a loop only ever makes it slower.
    ours, least = benchmark.stats.stats.min * 1e9 / (batch * batch * dims), min(ceilings)
    benchmark.extra_info.update(ns_per_exponential=ours, ceiling_ns=least, share_of_ceiling=least / ours)
    with capsys.disabled():
        print(f"\nexp2 alone ({simd}, one thread): {least:.3f} ns; total_correlation forward: {ours:.3f} ns an")
        print(f"exponential, which is {least / ours:.0%} of the ceiling")
