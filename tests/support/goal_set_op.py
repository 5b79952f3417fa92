"""Calls of the op goal_set, and their comparison with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bomkern import Constraint, ConstraintTable
from bomkern.common.reductions import REDUCTIONS as CODES
from bomkern.dispatch import select
from bomkern.reference import counts_of, record_parts
from tests.support.goals import SIX
from tests.support.servers import servers
from tests.support.tolerances import assert_as_good_as_eager

GROUPINGS = {"alone": [0, 1, 2, 3, 4, 5], "grouped": [0, 0, 1, 2, 2, 2], "one": [0] * 6}
EACH_GROUPING = pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
Results = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Places = dict[tuple[int, int], float]


def raw_values(batch: int, count: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + count)
    return list((torch.rand(count, batch, generator=generator) * 1.3 + 1e-3).to(dtype))


def call(
    goals: Sequence[Tensor],
    impl: str | None,
    *,
    groups: Sequence[int] | None = None,
    constraints: Sequence[Constraint] = SIX,
    mu: float = 0.0,
    reduction: str = "mean",
    multipliers: Sequence[float] | None = None,
    present: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, bottleneck, record) of the goals; each goal is its own group if ``groups`` is None.

    ``present`` is bool [K, B]; ``counts`` are its own if they are not given.
    """
    device = goals[0].device
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in goals) else torch.float32
    # Round parameters to float32, so that every implementation gets the same numbers.
    table = ConstraintTable(constraints, device)
    temperature = torch.tensor(mu, device=device).to(dtype)
    serve = select.resolve("goal_set", device.type, impl)
    owners = list(range(len(constraints)) if groups is None else groups)
    given = None if multipliers is None else torch.tensor(multipliers, device=device).to(dtype)
    masks: dict[str, Tensor] = {}
    if present is not None:
        present = present.to(device)
        counts = counts_of(present, owners, dtype) if counts is None else counts.to(device, dtype)
        masks = {"present": present, "counts": counts}
    return serve(
        list(goals), table.params.to(dtype), table.curves, owners, temperature, CODES[reduction], given, **masks
    )


def ramp(loss: Tensor) -> Tensor:
    """Return an incoming gradient that differs for each sample."""
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)


def run(
    raw: Sequence[Tensor],
    impl: str | None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    lay: Callable[[list[Tensor]], Any] = list,
    pull: Callable[[Tensor], Tensor] = ramp,
    **how: Any,
) -> Results:
    """Return the results, and the gradients of the raw values."""
    leaves = [x.detach().to(device, dtype or x.dtype).clone().requires_grad_() for x in raw]
    laid = lay(leaves)
    out = call([laid] if isinstance(laid, Tensor) else laid, impl, **how)
    grads = torch.autograd.grad(out[0], leaves, pull(out[0]))
    return (out[0].detach(), out[1], out[2]), grads


def check(raw: Sequence[Tensor], server: tuple[str, str], *, lay: Any = list, slack: float = 1e-6, **how: Any) -> None:
    """Check all results of ``server``.

    Errors against float64 may be twice those of eager float32. The bottleneck and the discrete parts of the record must
    be exact.
    """
    impl, device = server
    (loss, bottleneck, record), grads = run(raw, impl, device=device, lay=lay, **how)
    eager, eager_grads = run(raw, "reference", dtype=torch.float32, **how)
    exact, exact_grads = run(raw, "reference", dtype=torch.float64, **how)
    wide = any(x.dtype == torch.float64 for x in raw)
    assert loss.dtype == record.dtype == (torch.float64 if wide else torch.float32)
    assert bottleneck.dtype == torch.int64 and torch.equal(bottleneck.cpu(), exact[1])
    assert not record.requires_grad
    assert_as_good_as_eager(loss, eager[0], exact[0], slack)
    count = len(raw)
    parts = [record_parts(x, (len(x) - 2 - 4 * count) // 3, count) for x in (record, eager[2], exact[2])]
    # A GPU adds up in a tree; Triton's interpreter adds one by one.
    one_by_one = impl == "triton" and device == "cpu"
    for name, part in parts[0].items():
        if name in ("highest", "ideal", "slope", "finite"):
            assert torch.equal(part.cpu().double(), parts[2][name]), name
        else:
            unit = 1.0 if name == "share" else 0.0
            small = max(slack, 1e-5) if one_by_one else slack
            assert_as_good_as_eager(part, parts[1][name], parts[2][name], small, unit)
    largest = max(g.abs().max().item() for g in exact_grads)
    for x, got, some, want in zip(raw, grads, eager_grads, exact_grads, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        # A half gradient is the float32 gradient, rounded once.
        rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(x.dtype, slack)
        # Subnormal half gradients, sums that cancel, and weights below 1e-30, which the CPU makes zero, have no
        # magnitude of their own.
        unit = largest if x.dim() == 0 else max(torch.finfo(x.dtype).tiny, 1e-23 * largest)
        assert_as_good_as_eager(got, some, want, rounding, unit)


INF, NAN = math.inf, math.nan
BAD: list[Places] = [
    {(3, 1): NAN},
    {(3, 1): INF, (7, 2): NAN, (7, 4): NAN, (20, 5): NAN},
    {(5, 0): -INF, (9, 1): INF, (9, 3): INF},
    {(5, 0): INF, (5, 1): NAN, (31, 2): INF, (31, 5): -INF},
    {(0, 2): -INF, (32, 3): INF},  # infinite on the satisfied side
    {(4, 0): 1e30, (6, 1): 1e30, (8, 4): -1e30},  # finite, but far away
]


def check_places(raw: Sequence[Tensor], server: tuple[str, str], places: Places, **how: Any) -> None:
    """Put numbers at (sample, goal), and check the losses of these samples and the gradients of the others."""
    impl, device = server
    raw = [x.clone() for x in raw]
    for (b, k), value in places.items():
        raw[k][b] = value
    (loss, bottleneck, record), grads = run(raw, impl, device=device, pull=torch.ones_like, **how)
    exact, exact_grads = run(raw, "reference", dtype=torch.float64, pull=torch.ones_like, **how)
    assert torch.equal(bottleneck.cpu(), exact[1])
    torch.testing.assert_close(loss.cpu().double(), exact[0], equal_nan=True, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(record.cpu().double(), exact[2], equal_nan=True, rtol=1e-5, atol=1e-5)
    for k, (got, want) in enumerate(zip(grads, exact_grads, strict=True)):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6, msg=lambda m, k=k: f"goal {k}: {m}")


numbers = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), min_size=1, max_size=40)
KERNELS = pytest.mark.parametrize("server", [s for s in servers("goal_set") if s.values[0][0] != "reference"])


def goals_of(batch: int, device: str = "cpu") -> list[Tensor]:
    raw = [*raw_values(batch)[:5], torch.tensor(0.3)]
    return [x.to(device).requires_grad_() for x in raw]
