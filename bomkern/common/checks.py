"""Argument checks in Python, for fake tensors and the implementations that are not C++. csrc/ makes the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_GOALS = 64
MAX_VIEWS = 16


def check_number(name: str, value: object) -> float:
    """Return ``value`` as it is; a TypeError says that it is no number of Python's."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def finite_number(name: str, value: object, above: float = -math.inf) -> float:
    """Return ``value`` as a float; an error says that it is no number, not finite, or not greater than ``above``."""
    number = check_number(name, value)
    if not math.isfinite(number) or number <= above:
        raise ValueError(f"{name} must be finite" + f" and above {above:g}" * (above > -math.inf) + f", got {value}")
    return float(number)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_goals(goals: Sequence[Tensor]) -> tuple[int, int, torch.dtype]:
    """(B, K, compute dtype) of goals that are one [B, K] tensor or K tensors, each [B] or 0-dim."""
    if len(goals) == 0:
        raise ValueError("goals must name 1 to 64 goals, got an empty sequence")
    for k, goal in enumerate(goals):
        if not isinstance(goal, Tensor):
            raise TypeError(f"goals[{k}] must be a tensor, got {type(goal).__name__}")
        if goal.dtype not in FLOATS:
            raise TypeError(f"goals[{k}] must be float16, bfloat16, float32 or float64, got {goal.dtype}")
        if goal.layout != torch.strided:
            raise TypeError(f"goals[{k}] must be a dense tensor, got layout {goal.layout}")
        if goal.device != goals[0].device:
            raise ValueError(f"goals[{k}] is on {goal.device}, goals[0] on {goals[0].device}: move them to one device")
    double = any(g.dtype == torch.float64 for g in goals)
    dtype = torch.float64 if double else torch.float32
    if len(goals) == 1 and goals[0].dim() == 2:
        batch, count = goals[0].shape
    else:
        count = len(goals)
        batch = 1
        first = None
        for k, goal in enumerate(goals):
            if goal.dim() > 1:
                raise ValueError(f"goals[{k}] must have shape [B] or [], got {list(goal.shape)}")
            if goal.dim() == 1:
                if first is None:
                    batch, first = goal.shape[0], k
                elif goal.shape[0] != batch:
                    raise ValueError(
                        f"goals[{k}] has {goal.shape[0]} samples, goals[{first}] has {batch}: they must be the same"
                    )
    if not 1 <= count <= MAX_GOALS:
        raise ValueError(f"goals must name 1 to {MAX_GOALS} goals, got {count}")
    if batch == 0:
        raise ValueError("goals must hold at least one sample, got B = 0")
    return batch, count, dtype


def check_params(params: Tensor | None, curves: Sequence[int], count: int, dtype: torch.dtype, device: object) -> None:
    """That ``params`` is [K, 4] in the compute dtype beside the goals, and ``curves`` K codes."""
    if params is None:
        if curves:
            raise ValueError(f"curves must be empty where params is None, got {list(curves)}")
        return
    if len(curves) != count:
        raise ValueError(f"constraints must be one, or one for each of the {count} goals, got {len(curves)}")
    if params.dim() != 2 or params.shape[0] != count or params.shape[1] != 4:
        raise ValueError(f"params must have shape [{count}, 4], got {list(params.shape)}")
    if params.dtype != dtype:
        raise TypeError(f"params must be {dtype} for these goals, got {params.dtype}")
    if params.device != device:
        raise ValueError(f"params is on {params.device}, the goals on {device}: move it")


def check_groups(groups: Sequence[int], count: int) -> None:
    """That ``groups`` gives the goal of each of K columns: 0, then the same or the next."""
    if len(groups) != count:
        raise ValueError(f"groups must have one entry for each of the {count} columns, got {len(groups)}")
    before = -1
    for k, group in enumerate(groups):
        if group not in ((0,) if k == 0 else (before, before + 1)):
            raise ValueError(f"groups must count up from 0 by 0 or 1, got {list(groups)}")
        before = group


def check_temperature(temperature: Tensor, params: Tensor) -> None:
    """That it is 0-dim, beside the params and of their dtype. Its value is the device's business."""
    if temperature.dim() != 0:
        raise ValueError(f"temperature must have shape [], got {list(temperature.shape)}")
    if temperature.dtype != params.dtype:
        raise TypeError(f"temperature must be {params.dtype} as params, got {temperature.dtype}")
    if temperature.device != params.device:
        raise ValueError(f"temperature is on {temperature.device}, params on {params.device}: move it")


def check_multipliers(multipliers: Tensor | None, groups: Sequence[int], params: Tensor) -> None:
    """That there is one for each goal, beside the params and of their dtype."""
    if multipliers is None:
        return
    if list(multipliers.shape) != [groups[-1] + 1]:
        raise ValueError(f"multipliers must have shape [{groups[-1] + 1}], got {list(multipliers.shape)}")
    if multipliers.dtype != params.dtype:
        raise TypeError(f"multipliers must be {params.dtype} as params, got {multipliers.dtype}")
    if multipliers.device != params.device:
        raise ValueError(f"multipliers is on {multipliers.device}, params on {params.device}: move it")


def check_present(
    present: Tensor | None, counts: Tensor | None, groups: Sequence[int], batch: int, params: Tensor
) -> None:
    """That both are given or neither: ``present`` is bool [K, B], ``counts`` [1 + G + K] in the dtype of the params."""
    if present is None or counts is None:
        if present is not counts:
            raise ValueError("present and counts must be given together: see bomkern.reference.counts_of")
        return
    size = 1 + groups[-1] + 1 + len(groups)
    if present.dtype != torch.bool:
        raise TypeError(f"present must be torch.bool, got {present.dtype}")
    if present.dim() != 2 or present.shape[0] != len(groups) or present.shape[1] != batch:
        raise ValueError(f"present must have shape [{len(groups)}, {batch}], got {list(present.shape)}")
    if counts.dim() != 1 or counts.shape[0] != size:
        raise ValueError(f"counts must have shape [{size}], got {list(counts.shape)}")
    if counts.dtype != params.dtype:
        raise TypeError(f"counts must be {params.dtype} as params, got {counts.dtype}")
    for name, x in (("present", present), ("counts", counts)):
        if x.device != params.device:
            raise ValueError(f"{name} is on {x.device}, params on {params.device}: move it")


def check_matrices(least: int = 1, /, **given: Tensor) -> tuple[int, int, torch.dtype]:
    """(B, D, compute dtype) of tensors that must all be [B, D], B >= ``least``, on one device."""
    first, model = next(iter(given.items()))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
        if x.device != model.device:
            raise ValueError(f"{name} is on {x.device}, {first} on {model.device}: move them to one device")
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [B, D], got {list(x.shape)}")
        if x.shape[0] != model.shape[0] or x.shape[1] != model.shape[1]:
            raise ValueError(f"{name} must have the shape of {first}, {list(model.shape)}, got {list(x.shape)}")
    batch, dims = model.shape
    if batch == 0 or dims == 0:
        raise ValueError(f"{first} must hold at least one sample of at least one dimension, got shape {[*model.shape]}")
    if batch < least:
        raise ValueError(f"{first} must hold at least {least} samples, which a variance needs, got {batch}")
    return batch, dims, torch.float64 if any(x.dtype == torch.float64 for x in given.values()) else torch.float32


def check_latents(z: Tensor, mu: Tensor, logvar: Tensor, *, least: int = 1) -> tuple[int, int, torch.dtype]:
    """(B, D, compute dtype) of a sample and its posterior, three [B, D] tensors."""
    return check_matrices(least, z=z, mu=mu, logvar=logvar)


def check_rows(z: Tensor, mu: Tensor, logvar: Tensor, first: int | None) -> tuple[int, int, torch.dtype]:
    """(B, D, compute dtype) of posteriors [B, D] and of samples of them from ``first`` on, z [R, D]; None: of all."""
    if first is None:
        return check_latents(z, mu, logvar)
    batch, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    rows, width, own = check_matrices(z=z)
    if z.device != mu.device:
        raise ValueError(f"z is on {z.device}, mu on {mu.device}: move them to one device")
    if width != dims:
        raise ValueError(f"z must have the {dims} dimensions of mu, got {width}")
    if first < 0 or first + rows > batch:
        raise ValueError(
            f"first must be at least 0, and {rows} rows from there on be among the {batch} of mu, got {first}"
        )
    return batch, dims, torch.promote_types(dtype, own)


def check_prior(dims: int, block_size: int, rho: float) -> None:
    """Raise a ValueError unless a block fits into D dimensions and its correlation matrix is positive definite."""
    if not 1 <= block_size <= dims:
        raise ValueError(f"block_size must lie between 1 and the number of dimensions, {dims}, got {block_size}")
    least = -1 / (block_size - 1) if block_size > 1 else -math.inf
    if not least < rho < 1:
        raise ValueError(f"rho must lie between {least:g} and 1 for block_size {block_size}, got {rho}")


def check_units(threshold: float, temperature: float) -> None:
    if not -math.inf < threshold < math.inf:  # Dynamo cannot trace math.isfinite
        raise ValueError(f"threshold must be finite, got {threshold}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_views(views: Sequence[Tensor], correction: float) -> tuple[int, int, int, torch.dtype]:
    """(V, B, D, compute dtype) of views that are one [V, B, D] tensor or V tensors [B, D]."""
    if len(views) == 1 and isinstance(views[0], Tensor) and views[0].dim() == 3:
        views = [v for v in views[0].unbind(0)]
    count = len(views)
    if not 2 <= count <= MAX_VIEWS:
        raise ValueError(f"views must be 2 to {MAX_VIEWS} tensors, or one [V, B, D] tensor, got {count}")
    batch, dims, dtype = check_matrices(**{f"views[{v}]": view for v, view in enumerate(views)})
    if not 0 <= correction < count:
        raise ValueError(f"correction must be at least 0 and below the number of views, {count}, got {correction}")
    return count, batch, dims, dtype


def check_estimator(batch: int, dataset_size: int | None, stratified: bool) -> None:
    """That the estimator has what it needs: MSS a data set and two samples, and no batch larger than its data set."""
    if dataset_size is None:
        if stratified:
            raise ValueError("dataset_size must be given for estimator 'mss': its weights depend on it")
        return
    if dataset_size < batch:
        raise ValueError(f"dataset_size must be at least the batch size, {batch}, got {dataset_size}")
    if stratified and batch < 2:
        raise ValueError("z must hold at least 2 samples for estimator 'mss', got 1")
