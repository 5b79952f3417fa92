"""Argument checks in Python, for fake tensors and the implementations that are not C++. csrc/ makes the same ones."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .blame import (
    LAST_BATCH,
    TOO_MANY,
    dtype_fix,
    goal_fix,
    length_fix,
    matrix_fix,
    number_fix,
    odd_length,
    odd_one,
    samples,
    tensor_fix,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_GOALS = 64
MAX_VIEWS = 16


def as_number(value: object) -> float | None:
    """Return a number of Python or NumPy, which may be a 0-dim array; None for anything else, such as a bool."""
    if isinstance(value, (int, float)):
        return None if isinstance(value, bool) else value
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor) or getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return None
    item = value.item()
    return float(item) if isinstance(item, numbers.Real) and not isinstance(item, bool) else None


def as_whole(value: object) -> int | None:
    """Return an int of Python or NumPy as an int; None for anything else, such as a bool or a tensor."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor) or type(value).__name__ in ("bool", "bool_"):  # NumPy's bool is no int
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_size(name: str, value: object) -> int:
    """Return a number of any integer type, or a 0-dim integer tensor, as an int; a TypeError names anything else."""
    scalar = isinstance(value, Tensor) and value.dim() == 0
    found = value.item() if scalar else value  # type: ignore[attr-defined]
    number = as_whole(found)
    if number is not None:
        return number
    fix = "len(dataset)"
    if isinstance(found, Tensor):
        fix = ".item(), which waits for the device"
    elif isinstance(found, numbers.Real) and not isinstance(found, bool):
        fix = "int(x)"
    kind = "a tensor of " * scalar + type(found).__name__
    raise TypeError(f"{name} must be an integer or None, got {kind}: write {fix}")


def check_number(name: str, value: object) -> float:
    """Return a number of Python or NumPy as one of Python; a TypeError says that ``value`` is no number."""
    number = as_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {_kind(value)}{number_fix(value)}")
    return number


def check_whole(name: str, value: object, least: int = 1) -> int:
    """Return a whole number of Python or NumPy as an int; an error says that it is none, or less than ``least``."""
    number = as_whole(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {_kind(value)}{number_fix(value)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def finite_number(name: str, value: object, above: float = -math.inf) -> float:
    """Return ``value`` as a float; an error says that it is no number, not finite, or not greater than ``above``."""
    number = check_number(name, value)
    if not math.isfinite(number) or number <= above:
        raise ValueError(f"{name} must be finite" + f" and above {above:g}" * (above > -math.inf) + f", got {value}")
    return float(number)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_dense(name: str, x: object) -> None:
    """Check that x is a dense tensor of a float dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}{tensor_fix(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: {dtype_fix(x.dtype)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}: write .to_dense()")


def check_devices(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Check that all tensors are on one device."""
    if any(x.device != tensors[0].device for x in tensors):
        odd, right, _ = odd_one([x.device for x in tensors])
        raise ValueError(
            f"{names[odd]} is on {tensors[odd].device}, {names[right]} on {tensors[right].device}: "
            "move them to one device"
        )


def check_goals(goals: Sequence[Tensor], names: Sequence[str] = ()) -> tuple[int, int, torch.dtype]:
    """Return (B, K, compute dtype) of goals that are one [B, K] tensor or K tensors, each [B] or 0-dim.

    With ``names``, which name the goals in errors, they are K tensors.
    """
    if len(goals) == 0:
        raise ValueError("goals must name 1 to 64 goals, got an empty sequence")
    labels = names or [f"goals[{k}]" for k in range(len(goals))]
    for label, goal in zip(labels, goals, strict=True):
        check_dense(label, goal)
    check_devices(labels, goals)
    double = any(g.dtype == torch.float64 for g in goals)
    dtype = torch.float64 if double else torch.float32
    if len(goals) == 1 and goals[0].dim() == 2 and not names:
        batch, count = goals[0].shape
    else:
        count, batch = len(goals), _batch_of(labels, goals)
    if not 1 <= count <= MAX_GOALS:
        fix = f": {TOO_MANY}" if count > MAX_GOALS else ""
        raise ValueError(f"goals must name 1 to {MAX_GOALS} goals, got {count}{fix}")
    if batch == 0:
        raise ValueError("goals must hold at least one sample, got B = 0")
    return batch, count, dtype


def as_flag(name: str, value: object, device: torch.device) -> Tensor:
    """Return a bool, or a 0-dim bool tensor, as the latter; a TypeError names anything else. No host sync."""
    if isinstance(value, bool):
        return torch.full((), value, dtype=torch.bool, device=device)
    if not isinstance(value, Tensor) or value.dtype is not torch.bool or value.dim():
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool or a 0-dim bool tensor, got {got}")
    return value


def _batch_of(labels: Sequence[str], goals: Sequence[Tensor]) -> int:
    """Return the number of samples of goals that are each [B] or 0-dim; 1 if all are 0-dim."""
    rows = [k for k, goal in enumerate(goals) if goal.dim() == 1]
    batch = goals[rows[0]].shape[0] if rows else 1
    for label, goal in zip(labels, goals, strict=True):
        if goal.dim() > 1:
            fix = goal_fix(goal.shape, batch if rows else None)
            raise ValueError(f"{label} must have shape [B] or [], got {list(goal.shape)}: {fix}")
    if any(goals[k].shape[0] != batch for k in rows):
        lengths = [int(goals[k].shape[0]) for k in rows]  # a graph that is traced may hold symbols
        odd, right, most = odd_length(lengths)
        what = samples(lengths[odd]) if lengths[odd] != 1 else "shape [1]"
        others = f"others have {lengths[right]}" if most else f"{labels[rows[right]]} has {lengths[right]}"
        fix = length_fix(lengths[odd], lengths[right])
        raise ValueError(f"{labels[rows[odd]]} has {what}, {others}{' samples' * (what == 'shape [1]')}: {fix}")
    return batch


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
        other = "" if dtype == torch.float32 else ", or write .float() for the goals that are float64"
        fix = f"make the ConstraintTable with dtype={dtype}{other}"
        raise TypeError(f"params must be {dtype} for these goals, got {params.dtype}: {fix}")
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
    names, tensors = list(given), list(given.values())
    for name, x in given.items():
        check_dense(name, x)
    check_devices(names, tensors)
    for name, x in given.items():
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [B, D], got {list(x.shape)}: {matrix_fix(x.shape)}")
    first, model = names[0], tensors[0]
    if any(x.shape[0] != model.shape[0] or x.shape[1] != model.shape[1] for x in tensors):
        shapes = [list(x.shape) for x in tensors]
        odd, right, _ = odd_one(shapes)
        raise ValueError(f"{names[odd]} must have the shape of {names[right]}, {shapes[right]}, got {shapes[odd]}")
    batch, dims = model.shape
    if batch == 0 or dims == 0:
        raise ValueError(f"{first} must hold at least one sample of at least one dimension, got shape {[*model.shape]}")
    if batch < least:
        raise ValueError(
            f"{first} must hold at least {least} samples, which a variance needs, got {batch}: {LAST_BATCH}"
        )
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
        raise ValueError(f"z must hold at least 2 samples for estimator 'mss', got 1: {LAST_BATCH}")
