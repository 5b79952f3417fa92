"""The op goal_set with its goals' weights given: every implementation against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import ConstraintTable, Minimize, _impl
from bomkern.reference import record_parts
from tests.test_goal_set_op import EACH, IMPLS, REDUCTIONS, SIX, call, check, raw_values, run
from tests.test_min_goal_bridge import COMPILED

WEIGHTS = (0.4, 0.05, 0.0, 0.25, 0.2, 0.1)


def weights_of(groups: list[int]) -> list[float]:
    return list(WEIGHTS[: max(groups) + 1])


@IMPLS
@EACH
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [1, 17, 513, 9000])
def test_oracle(server: tuple[str, str], batch: int, reduction: str, groups: list[int]) -> None:
    raw = [*raw_values(batch)[:5], torch.tensor(0.31)]
    check(raw, server, groups=groups, reduction=reduction, multipliers=weights_of(groups))


@IMPLS
def test_is_the_weighted_sum_whatever_the_temperature(server: tuple[str, str]) -> None:
    impl, device = server
    raw = [x.to(device) for x in raw_values(40, 3)]
    weights = [0.5, 0.25, 0.25]
    how: dict[str, Any] = {"constraints": [Minimize(2.0, 0.1)] * 3, "multipliers": weights}
    want = sum(w * (x.double() - 0.1).mean() / 2 for w, x in zip(weights, raw, strict=True))
    for mu in (0.0, 0.3):
        loss, bottleneck, record = call(raw, impl, mu=mu, **how)
        assert float(loss) == pytest.approx(float(want), rel=1e-6)
        assert torch.equal(bottleneck, torch.stack(raw).argmax(0))
        assert torch.equal(record_parts(record, 3, 3)["share"].cpu(), torch.tensor(weights))


@IMPLS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 2])  # weighed, and not
def test_what_is_not_finite(server: tuple[str, str], value: float, column: int) -> None:
    """A sample whose worst deficit or whose loss is not finite has no gradient, and its bottleneck all the share."""
    impl, device = server
    raw = raw_values(9, 3)
    raw[column][4] = value
    how: dict[str, Any] = {"constraints": [Minimize(1.0)] * 3, "multipliers": [0.5, 0.5, 0.0], "reduction": "none"}
    got, grads = run(raw, impl, device=device, pull=torch.ones_like, **how)
    want, wanted = run(raw, "reference", dtype=torch.float64, pull=torch.ones_like, **how)
    assert torch.allclose(got[0].cpu().double(), want[0], rtol=1e-6, equal_nan=True)
    assert torch.equal(got[1].cpu(), want[1])
    assert all(torch.allclose(g.cpu().double(), w, rtol=1e-6) for g, w in zip(grads, wanted, strict=True))
    names = record_parts(got[2].cpu().double(), 3, 3), record_parts(want[2], 3, 3)
    assert torch.allclose(names[0]["share"], names[1]["share"], atol=1e-6)
    assert float(names[0]["finite"]) == float(names[1]["finite"]) == 0
    assert all(float(g[4]) == 0 and float(g[5]) == 0.5 for g in grads[:2])


@COMPILED
def test_opcheck_and_gradcheck() -> None:
    table, mu = ConstraintTable(SIX), torch.tensor(0.2)
    given = torch.tensor(WEIGHTS)
    goals = [x.requires_grad_() for x in raw_values(8)]
    arguments = (goals, table.params, table.curves, list(range(6)), mu, 1, given)
    torch.library.opcheck(torch.ops.bomkern.goal_set.default, arguments, {"save": True})
    wide = [x.detach().double().requires_grad_() for x in goals]

    def loss(*raw: Tensor) -> Tensor:
        params = table.params.double()
        out = torch.ops.bomkern.goal_set(
            raw, params, table.curves, [0, 0, 1, 2, 2, 2], mu.double(), 1, given[:3].double()
        )
        return out[0]

    assert torch.autograd.gradcheck(loss, wide)


@IMPLS
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.ones(5), ValueError, r"multipliers must have shape \[6\], got \[5\]"),
        (torch.ones(6, dtype=torch.float64), TypeError, "multipliers must be .* as params, got"),
        (torch.ones(()), ValueError, r"multipliers must have shape \[6\], got \[\]"),
    ],
)
def test_bad_multipliers_are_named(
    server: tuple[str, str], given: Tensor, error: type[Exception], message: str
) -> None:
    impl, device = server
    table, mu = ConstraintTable(SIX, device), torch.tensor(0.0, device=device)
    serve = _impl.resolve("goal_set", device, impl)
    goals = [x.to(device) for x in raw_values(8)]
    with pytest.raises(error, match=message):
        serve(goals, table.params, table.curves, list(range(6)), mu, 1, given.to(device))
