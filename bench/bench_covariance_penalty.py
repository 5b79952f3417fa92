"""covariance_penalty, by sample and of the batch, against VICReg's code, torch.compile and the bare matrix products."""

from __future__ import annotations

import functools
from typing import Any

import torch
from latent_benches import DEVICE, Case, Inputs, codes, measure, seconds, sizes_and
from torch import Tensor

import bomkern


def samples(batch: int, dims: int) -> Inputs:
    return codes(batch, dims)[:1]


def off_diagonal(x: Tensor) -> Tensor:
    """As VICReg has it (facebookresearch/vicreg, main_vicreg.py)."""
    n, m = x.shape
    assert n == m
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def plain_batch(z: Tensor) -> Tensor:
    """VICReg's."""
    x = z - z.mean(dim=0)
    covariance = (x.T @ x) / (len(x) - 1)
    return off_diagonal(covariance).pow_(2).sum().div(z.shape[1])


def plain(z: Tensor) -> Tensor:
    """Each sample's part, written the same way."""
    batch, dims = z.shape
    x = z - z.mean(dim=0)
    covariance = (x.T @ x) / (batch - 1)
    off = covariance - torch.diag(torch.diagonal(covariance))
    return ((x @ off) * x).sum(1) * (batch / (batch - 1) / dims)


def few(parts: Tensor) -> Tensor:
    """As a bottleneck rule weighs samples: most have another bottleneck."""
    return (parts * (torch.arange(len(parts), device=parts.device) % 5 == 0)).sum() / len(parts)


ours_batch = functools.partial(bomkern.covariance_penalty, reduction="batch")
BY_SAMPLE = {"bomkern": bomkern.covariance_penalty, "eager": plain}
CASE = Case("covariance_penalty", samples, BY_SAMPLE, torch.mean)
WEIGHED = Case("covariance_penalty", samples, BY_SAMPLE, few, " weighed")
BATCH = Case("covariance_penalty", samples, {"bomkern": ours_batch, "eager": plain_batch}, torch.mean, " of the batch")


@sizes_and()
def test_peers(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, CASE, name, size, backward)


@sizes_and()
def test_batch(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, BATCH, name, size, backward)


@sizes_and(directions=(True,))
def test_weighed(benchmark: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    measure(benchmark, WEIGHED, name, size, backward)


@sizes_and("bomkern")
def test_beside_the_products(benchmark: Any, capsys: Any, size: tuple[int, int], backward: bool, name: str) -> None:
    """The library's x.T @ x and x @ C alone, the work that no implementation is spared."""
    x = torch.randn(size, device=DEVICE)
    c = x.T @ x / len(x)
    times: list[tuple[float, float]] = []

    def products() -> None:
        times.append((seconds(lambda: x.T @ x), seconds(lambda: x @ c)))

    measure(benchmark, CASE, name, size, backward, products, " beside the products")
    if not benchmark.stats:
        return
    gram, product = (min(t) for t in zip(*times, strict=True))
    benchmark.extra_info.update(gram_seconds=gram, product_seconds=product)
    least = benchmark.stats.stats.min
    with capsys.disabled():
        print(f"\n{benchmark.group}: {least * 1e3:.2f} ms; x.T @ x {gram * 1e3:.2f} ms, x @ C {product * 1e3:.2f} ms")
