"""Test offsets past 2^31 elements, which do not fit into 32 bits.

The tests that read such offsets cost no memory, because most of it is never touched. Those that write take up to 10 GB
and two minutes each, too much for several processes at once. ``BOMKERN_LARGE=1 pytest tests/ops/test_large_offsets.py
-k past_2_to_31`` runs them if that much is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import ConstraintTable, Minimize, MinimizeHard
from bomkern.dispatch import select
from tests.support.processes import run_tests
from tests.support.servers import servers
from tests.support.statistics import OPS, Call, Inputs, check, codes

PAST = 2**31 + 2**20
STATISTICS = [pytest.param(op, server.values[0], id=f"{op}-{server.id}") for op in OPS for server in servers(op)]  # type: ignore[attr-defined]


class Far(torch.autograd.Function):
    """Copy a tensor to rows or columns so far apart that the last is past 2^31 elements from the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, room: Tensor, place: int, dim: int) -> Tensor:
        steps = [x.shape[1], 1] if dim == 0 else [1, x.shape[0]]
        steps[dim] = 2**31 // (x.shape[dim] - 1) + 64
        return x.new_empty(0).set_(room.untyped_storage(), place, x.shape, steps).copy_(x)  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, None, None, None


@pytest.fixture(scope="module")
def far() -> Iterator[Callable[[int], Callable[[Tensor], Tensor]]]:
    """Yield ``far``: far(dim) lays a [B, D] tensor out as `Far` does.

    float64 tensors are the truth and stay as they are.
    """
    rooms: dict[tuple[torch.dtype, str], Tensor] = {}
    placed = 0

    def of(dim: int) -> Callable[[Tensor], Tensor]:
        def lay(x: Tensor) -> Tensor:
            nonlocal placed
            if x.dtype == torch.float64:
                return x
            key = (x.dtype, x.device.type)
            if key not in rooms:
                try:
                    rooms[key] = torch.empty(PAST, dtype=x.dtype, device=x.device)
                except RuntimeError as error:
                    pytest.skip(f"cannot reserve {PAST * x.element_size() / 1e9:.1f} GB of addresses: {error}")
            placed = (placed + 8192) % 2**19
            return Far.apply(x, rooms[key], placed, dim)  # type: ignore[no-any-return]

        return lay

    yield of
    rooms.clear()


def halves(inputs: Inputs) -> Inputs:
    return tuple(x.half() for x in inputs)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("op", "server"), STATISTICS)
def test_statistics_read_far_apart(
    op: str, server: tuple[str, str], dim: int, far: Callable[[int], Callable[[Tensor], Tensor]]
) -> None:
    shape = (9, 20) if dim == 0 else (20, 9)
    for inputs in (OPS[op].make(*shape), halves(OPS[op].make(*shape))):
        check(OPS[op].call, inputs, server, slack=1e-5, unit=1, lay=far(dim))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("server", servers("total_correlation"))
def test_total_correlation_reads_far_apart(
    server: tuple[str, str], dim: int, far: Callable[[int], Callable[[Tensor], Tensor]]
) -> None:
    def call(z: Tensor, mu: Tensor, logvar: Tensor, impl: str | None = None) -> Tensor:
        return bomkern.total_correlation(z, mu, logvar, dataset_size=100, estimator="mss", impl=impl)

    check(call, codes(*((9, 20) if dim == 0 else (20, 9))), server, slack=1e-5, unit=1, lay=far(dim))


def as_columns(x: Tensor) -> list[Tensor]:
    return list(x.unbind(1))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("of", [as_columns, lambda x: x], ids=["columns", "matrix"])
@pytest.mark.parametrize("server", servers("min_goal"))
def test_min_goal_reads_far_apart(
    server: tuple[str, str], of: Any, dim: int, far: Callable[[int], Callable[[Tensor], Tensor]]
) -> None:
    constraints = [MinimizeHard(0.5), *(Minimize(0.3 + k) for k in range(4))]

    def call(x: Tensor, impl: str | None = None) -> Tensor:
        return bomkern.min_goal_loss(of(x), constraints, reduction="none", impl=impl)

    for inputs in (codes(9, 5)[:1], halves(codes(9, 5)[:1])):
        check(call, inputs, server, slack=1e-5, unit=1, lay=far(dim))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("server", servers("goal_set"))
def test_goal_set_reads_far_apart(
    server: tuple[str, str], dim: int, far: Callable[[int], Callable[[Tensor], Tensor]]
) -> None:
    table = ConstraintTable([Minimize(0.3 + k) for k in range(5)], device=server[1])

    def call(x: Tensor, impl: str | None = None) -> Tensor:
        params = table.params.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        serve = select.resolve("goal_set", x.device.type, impl)
        mu = params.new_tensor(0.1)
        return serve(as_columns(x), params, table.curves, list(range(5)), mu, 0)[0]  # type: ignore[no-any-return]

    check(call, codes(9, 5)[:1], server, slack=1e-5, unit=1, lay=far(dim))


@pytest.mark.slow
def test_triton_reads_far_apart() -> None:
    run_tests("tests/ops/test_large_offsets.py", "triton-cpu and far_apart", TRITON_INTERPRET="1")


# The tests below write B x D half gradients, 4.3 GB. All D dimensions of a sample hold the same number.
BATCH, DIMS = 2**20 + 3, 2**11
ROWS = [0, 1, 2**19, 2**20 - 1, 2**20, BATCH - 1]  # 2^31 elements lie before the row before the last


def free_memory() -> float:
    """Return the free memory in GB."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1e6


@pytest.fixture
def room(request: pytest.FixtureRequest) -> None:
    needed = request.param
    if os.environ.get("BOMKERN_LARGE") != "1":
        pytest.skip("takes many gigabytes: BOMKERN_LARGE=1 runs it")
    if select.extension is None:
        pytest.skip("not compiled")
    try:
        free = free_memory()
    except OSError:
        pytest.skip("how much memory is free is known on Linux alone")
    if free < needed + 2:
        pytest.skip(f"needs {needed + 2} GB of free memory, {free:.1f} GB here")


def needs(gigabytes: float) -> Any:
    return pytest.mark.parametrize("room", [gigabytes], indirect=True, ids=[f"{gigabytes} GB"])


def column(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 1, generator=torch.Generator().manual_seed(seed)).half()


def wide(x: Tensor, dims: int = DIMS) -> Tensor:
    """Expand [B, 1] to a [B, D] leaf without memory, whose gradient is separate."""
    return x.expand(-1, dims).detach().requires_grad_()


def same(ours: Tensor, exact: Tensor, tolerance: float = 2e-3) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=1e-12, check_dtype=False)


@pytest.mark.slow
@needs(4.5)
@pytest.mark.usefixtures("room")
def test_gaussian_kl_writes_past_2_to_31() -> None:
    mu, logvar = column(BATCH, 1), column(BATCH, 2)
    x = wide(mu)
    out = bomkern.gaussian_kl(x, logvar.expand(-1, DIMS), impl="cpu")
    pull = torch.linspace(-1, 2, BATCH)
    (grad,) = torch.autograd.grad(out, x, pull)
    part = mu[ROWS].double().expand(-1, DIMS)
    same(out[ROWS], bomkern.gaussian_kl(part, logvar[ROWS].double().expand(-1, DIMS), impl="reference"), 1e-5)
    same(grad[ROWS], pull[ROWS, None].double() * part)


@pytest.mark.slow
@needs(4.5)
@pytest.mark.usefixtures("room")
def test_consistency_variance_writes_past_2_to_31() -> None:
    views = column(BATCH, 1), column(BATCH, 2)
    x, y = wide(views[0]), views[1].expand(-1, DIMS)
    out = bomkern.consistency_variance([x, y], impl="cpu")
    pull = torch.linspace(-1, 2, BATCH)
    (grad,) = torch.autograd.grad(out, x, pull)
    a, b = (v[ROWS].double().expand(-1, DIMS) for v in views)
    same(out[ROWS], (a - b).square().mean(1) / 2, 1e-5)
    same(grad[ROWS], pull[ROWS, None].double() * (a - b) / DIMS)


@pytest.mark.slow
@needs(4.5)
@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("op", ["active_units", "latent_statistics"])
def test_columns_write_past_2_to_31(op: str) -> None:
    mu = column(BATCH, 1)
    x = wide(mu)
    if op == "active_units":
        value = bomkern.active_units(x, threshold=1.0, impl="cpu")[0]
        variance = mu.double().var()
        slope = torch.sigmoid((variance - 1) / 0.05)
        slope = slope * (1 - slope) / 0.05 / DIMS * 2 / (BATCH - 1)
        scale = 1e6  # the scale keeps the numbers within half precision
    else:
        other = column(BATCH, 2).expand(-1, DIMS)
        value = bomkern.latent_statistics(other, x, other, impl="cpu").mu_variance.sum()
        slope, scale = torch.tensor(2 / (BATCH - 1), dtype=torch.float64), 1e3
    (grad,) = torch.autograd.grad(value * scale, x)
    exact = scale * slope * (mu[ROWS].double() - mu.double().mean())
    torch.testing.assert_close(grad[ROWS].double(), exact.expand(-1, DIMS), rtol=1e-2, atol=1e-7)


@pytest.mark.slow
@needs(6.5)
@pytest.mark.usefixtures("room")
def test_covariance_penalty_writes_past_2_to_31() -> None:
    batch, dims = 2**28 + 3, 8
    z = column(batch, 1)
    x = wide(z, dims)
    out = bomkern.covariance_penalty(x, reduction="batch", impl="cpu")
    (grad,) = torch.autograd.grad(out * 1e6, x)
    mean, variance = z.mean(dtype=torch.float64), z.float().var().double()
    same(out, (dims - 1) * variance.square(), 1e-4)
    rows = [0, 1, 2**27, 2**28 - 1, 2**28, batch - 1]
    exact = 1e6 * 4 * (dims - 1) * variance * (z[rows].double() - mean) / dims / (batch - 1)
    torch.testing.assert_close(grad[rows].double(), exact.expand(-1, dims), rtol=1e-2, atol=1e-7)


@pytest.mark.slow
@needs(6)
@pytest.mark.usefixtures("room")
def test_min_goal_writes_past_2_to_31() -> None:
    """The op writes a [B, K] gradient, and keeps the position of the worst entry."""
    batch, goals = 2**26 + 3, 33
    values = column(batch, 1)
    values[-2] = 60
    x = wide(values, goals)
    constraints = [Minimize(2.0 if k % 2 else 1.0, ideal=0.5 if k == 17 else -0.5 * (k == 31)) for k in range(goals)]
    loss = bomkern.min_goal_loss(x, constraints, reduction="sum", impl="cpu")
    (grad,) = torch.autograd.grad(loss, x)
    rows = [0, 1, 2**25, 2**26 - 1, 2**26, batch - 1]
    few = values[rows].double().expand(-1, goals).detach().requires_grad_()
    bomkern.min_goal_loss(few, constraints, reduction="sum", impl="reference").backward()
    assert torch.equal(grad[rows].double(), few.grad)  # type: ignore[arg-type]
    del grad
    loss = bomkern.min_goal_loss(x, constraints, reduction="min", impl="cpu")
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.item() == 60 and grad[-2].tolist() == [1, *[0] * (goals - 1)] and not grad[[0, -1]].any()


@pytest.mark.slow
@needs(10)
@pytest.mark.usefixtures("room")
def test_goal_set_writes_past_2_to_31() -> None:
    """Forward keeps weights [K, B], of which backward reads the last."""
    batch, goals = 2**26 + 3, 33
    values, last = column(batch, 1)[:, 0], column(batch, 2)[:, 0].requires_grad_()
    given = [*[values] * (goals - 1), last]
    table = ConstraintTable([Minimize(1.0)] * goals)
    serve: Call = select.resolve("goal_set", "cpu", "cpu")
    loss = serve(given, table.params, table.curves, list(range(goals)), torch.tensor(0.0), 2)[0]
    (grad,) = torch.autograd.grad(loss, last)
    assert torch.equal(grad, (last.detach() > values).to(grad.dtype))
