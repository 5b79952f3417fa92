"""Time latent_statistics against the separate calls that it replaces, eager PyTorch and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import PEERS, Case, Size, in_turn, measure, sizes_and, sizes_at, traffic
from bench.ops.bench_active_units import plain as plain_units
from bench.ops.bench_gaussian_kl import plain as plain_kl
from bench.regimes import CODES, SIZES, codes
from bench.report.write import SHOWN

SEPARATE = "separate calls"
Nine = tuple[Tensor, ...]


def moments(z: Tensor, mu: Tensor, logvar: Tensor) -> Nine:
    """Return moments of logvar's rows, then of z's and mu's columns, in the order of `bomkern.latent_statistics`."""
    columns = [part for x in (z, mu) for part in reversed(torch.var_mean(x, 0))]
    return logvar.mean(1), logvar.square().mean(1), *columns


def separate(z: Tensor, mu: Tensor, logvar: Tensor) -> Nine:
    return bomkern.gaussian_kl(mu, logvar), *moments(z, mu, logvar), *bomkern.active_units(mu)


def plain(z: Tensor, mu: Tensor, logvar: Tensor) -> Nine:
    """Compute all nine statistics in plain PyTorch."""
    return plain_kl(mu, logvar), *moments(z, mu, logvar), *plain_units(mu)


def loss(fields: Nine) -> Tensor:
    """Combine all nine statistics, each with enough weight for its gradient to show."""
    kl, logvar_mean, logvar_square, z_mean, z_variance, mu_mean, mu_variance, active, effective = fields
    rows = kl.mean() + (logvar_mean.square() + logvar_square).mean()
    columns = z_mean.square() + (z_variance - 1).square() + mu_mean.square() + mu_variance.square()
    return rows + columns.sum() - active - effective


CASE = Case(
    "latent_statistics", codes, bomkern.latent_statistics, plain, loss, traffic(3), regimes=CODES,
    tolerance=(1e-4, 1e-3), more={SEPARATE: lambda: separate},
)  # fmt: skip


@sizes_and(SIZES, *PEERS, SEPARATE, regimes=CASE.regimes, at=SHOWN["latent_statistics"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["latent_statistics"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)
