"""Time covariance_penalty by sample and of the batch, against VICReg's code, torch.compile and bare matrix products.

The work is the operations of the products that every implementation needs: ``x.T @ x`` and ``x @ C``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import BOTH, FORWARD, OURS, Case, Inputs, Size, in_turn, measure, sizes_and, sizes_at
from bench.machine import DEVICE
from bench.regimes import CODES, SIZES, codes
from bench.report.write import SHOWN

DIMS = [{"B": 4096, "D": dims} for dims in (32, 64, 256, 512)]  # beside 128, to see the cost grow


def samples(regime: str, B: int, D: int) -> Inputs:
    return codes(regime, B, D)[:1]


def off_diagonal(x: Tensor) -> Tensor:
    """Return the off-diagonal elements, as VICReg does (facebookresearch/vicreg, main_vicreg.py)."""
    n, m = x.shape
    assert n == m
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def plain_batch(z: Tensor) -> Tensor:
    """Compute VICReg's covariance penalty of the batch."""
    x = z - z.mean(dim=0)
    covariance = (x.T @ x) / (len(x) - 1)
    return off_diagonal(covariance).pow_(2).sum().div(z.shape[1])


def plain(z: Tensor) -> Tensor:
    """Compute each sample's part of the penalty, written the same way."""
    batch, dims = z.shape
    x = z - z.mean(dim=0)
    covariance = (x.T @ x) / (batch - 1)
    off = covariance - torch.diag(torch.diagonal(covariance))
    return ((x @ off) * x).sum(1) * (batch / (batch - 1) / dims)


def weigh_every_fifth(parts: Tensor) -> Tensor:
    """Sum every fifth sample's part: under the bottleneck rule most samples have another bottleneck."""
    return (parts * (torch.arange(len(parts), device=parts.device) % 5 == 0)).sum() / len(parts)


def products(count: int) -> Any:
    """Return the operations of ``count`` products of [B, D] with [D, D] forward, and of two in both directions."""

    def work(size: Size, direction: str) -> float:
        product = 2.0 * size["B"] * size["D"] ** 2
        return product * (count if direction == FORWARD else 2 if direction == BOTH else 1)

    return work


def case(label: str, ours: Any, written: Any, loss: Any, forward: int) -> Case:
    op, tolerance = "covariance_penalty", (1e-4, 1e-3)
    return Case(op, samples, ours, written, loss, products(forward), "flops", label, CODES, tolerance)


BY_SAMPLE = case("", bomkern.covariance_penalty, plain, torch.mean, 2)
WEIGHED = case("weighed", bomkern.covariance_penalty, plain, weigh_every_fifth, 2)
ours_batch = functools.partial(bomkern.covariance_penalty, reduction="batch")
BATCH = case("of the batch", ours_batch, plain_batch, torch.mean, 1)
if DEVICE == "cuda":
    DIMS.append({"B": 4096, "D": 1024})


@sizes_and(SIZES, regimes=CODES, at=SHOWN["covariance_penalty"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, BY_SAMPLE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["covariance_penalty"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, BY_SAMPLE, size)


@sizes_and(SIZES)
def test_batch(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, BATCH, name, size, direction, regime)


@sizes_and(SIZES, directions=(BOTH,))
def test_weighed(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, WEIGHED, name, size, direction, regime)


@sizes_and(DIMS, OURS, "torch.compile", "eager", directions=(BOTH,))
def test_growth(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, BY_SAMPLE, name, size, direction, regime)
