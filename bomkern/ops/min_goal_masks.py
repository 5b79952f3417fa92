"""`min_goal_loss` of goals that are absent in some samples: one goal to a column of the op goal_set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_goals
from ..common.graph_constants import on_device
from ..constraints import Minimize, pack
from ..dispatch import select
from ..reference import counts_of, record_parts


def masked_min_goal(
    goals: Sequence[Tensor],
    mask: object,
    table: tuple[Tensor | None, Sequence[int]],
    reduction: int,
    impl: str | None,
    route: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, bottleneck, share, level, finite), see `bomkern.min_goal_loss`.

    ``table`` holds the constraints' parameters and curves, None and no curve for scores.
    """
    params, curves = table
    batch, count, dtype = check_goals(goals)
    present = _present(mask, batch, count, goals[0].device)
    device = goals[0].device
    if params is None:
        goals = [_deficits(score, dtype) for score in goals]
        params, curves = pack((Minimize(1.0),) * count, device, dtype)
    serve: Any = select.resolve("goal_set", device.type, impl)
    owner, hard = list(range(count)), on_device((0.0,), dtype, device).reshape(())
    counts = counts_of(present, owner, dtype)
    loss, bottleneck, record = serve(
        goals, params, curves, owner, hard, reduction, None, route=route, present=present, counts=counts
    )
    parts = record_parts(record, count, count)
    return loss, bottleneck, parts["share"], parts["level"], parts["finite"] > 0


def _deficits(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -log(score), with gradient 0 where that is not finite."""
    x = score.to(dtype)
    feasible = (x > 0) & (x < torch.inf)
    return torch.where(feasible, -torch.where(feasible, x, 1).log(), torch.where(x.isnan(), torch.nan, torch.inf))


def _present(mask: object, batch: int, count: int, device: torch.device) -> Tensor:
    """Return the mask as bool [K, B]."""
    if isinstance(mask, Tensor):
        _check("mask", mask, device)
        if mask.dim() == 1 and batch == 1:
            mask = mask[None]
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != count:
            raise ValueError(f"mask must have shape [{batch}, {count}], got {list(mask.shape)}")
        return mask.t().contiguous()
    if not isinstance(mask, (list, tuple)):
        raise TypeError(f"mask must be a bool tensor [B, K] or a sequence of K, got {type(mask).__name__}")
    if len(mask) != count:
        raise ValueError(f"mask must have one entry for each of the {count} goals, got {len(mask)}")
    rows = []
    for k, one in enumerate(mask):
        if one is None or isinstance(one, bool):
            row = on_device((one is not False,), torch.bool, device)
        elif isinstance(one, Tensor):
            _check(f"mask[{k}]", one, device)
            row = one
            if row.dim() > 1 or (row.dim() == 1 and row.shape[0] != batch):
                raise ValueError(f"mask[{k}] must have shape [{batch}] or [], got {list(row.shape)}")
        else:
            raise TypeError(f"mask[{k}] must be a bool tensor or None, got {type(one).__name__}")
        rows.append(row.expand(batch))
    return torch.stack(rows)


def _check(name: str, mask: Tensor, device: torch.device) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {mask.dtype}: write mask > 0")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the goals on {device}: move it")
