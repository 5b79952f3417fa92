"""Cases as plain data, and their tensors with values of every kind in every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
DTYPES = {**FLOATS, "int64": torch.int64}  # ops must refuse int64


@dataclass(frozen=True)
class Given:
    """One tensor.

    An upper-case axis names a size of the case; a lower-case one means that size plus one.
    """

    name: str
    axes: str
    role: str  # raw, score, code or logvar
    dtype: str = "float32"
    layout: str = "plain"
    values: str = "plain"
    seed: int = 0
    grad: bool = True

    def shape(self, sizes: dict[str, int]) -> list[int]:
        return [sizes[axis.upper()] + axis.islower() for axis in self.axes]


@dataclass(frozen=True)
class Case:
    op: str
    impl: str
    device: str
    sizes: dict[str, int]
    given: tuple[Given, ...]
    options: dict[str, Any] = field(default_factory=dict)
    pull: str = "ramp"  # the kind of incoming gradient
    threads: int = 1  # if more than one, check for equal bits with this number of threads
    twice: bool = False  # also check the second derivative

    @property
    def wide(self) -> bool:
        return any(g.dtype == "float64" for g in self.given)

    def tensors(self) -> list[Tensor]:
        """Return the inputs in their own dtypes and layouts, on the CPU."""
        return [laid_out(values_of(g, self.sizes), g.layout) for g in self.given]

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def to_json(self) -> str:
        usual = {f.name: f.default for f in Given.__dataclass_fields__.values()}
        plain = asdict(self)
        plain["given"] = [{k: v for k, v in g.items() if v != usual[k]} for g in plain["given"]]
        return json.dumps(plain, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Case:
        plain = json.loads(text)
        return Case(**{**plain, "given": tuple(Given(**g) for g in plain["given"])})

    def __str__(self) -> str:
        def one(g: Given) -> str:
            odd = [g.dtype[g.dtype == "float32" and 7 :], g.layout, g.values, "no grad" if not g.grad else ""]
            return f"{g.name}{g.shape(self.sizes)}" + "".join(f" {x}" for x in odd if x not in ("", "plain"))

        options = [f"{name}={value!r}" for name, value in self.options.items() if value is not None]
        more = [f"pull={self.pull}"] * (self.pull != "ramp") + [f"threads={self.threads}"] * (self.threads > 1)
        more += ["twice"] * self.twice
        return f"{self.op} by {self.impl} on {self.device}: {', '.join([*map(one, self.given), *options, *more])}"


# Kinds of values. Each function maps an op's usual float64 values to others; rows are the axis before the last.


def _places(x: Tensor, source: torch.Generator, numbers: list[float]) -> Tensor:
    """Put each of the numbers at a random place."""
    x = x.clone()
    flat = x.view(-1)
    if len(flat):
        for number in numbers:
            flat[torch.randint(len(flat), (1,), generator=source)] = number
    return x


def _rows_again(x: Tensor, source: torch.Generator) -> Tensor:
    if x.dim() == 0 or not x.numel():
        return x
    rows = x.shape[-2] if x.dim() > 1 else x.shape[0]
    return x.index_select(max(0, x.dim() - 2), torch.randint(min(3, rows), (rows,), generator=source))


def _some_columns_constant(x: Tensor, source: torch.Generator) -> Tensor:
    if x.dim() < 2 or not x.numel():
        return x
    constant = torch.rand(x.shape[-1], generator=source, dtype=x.dtype) < 0.4
    level = torch.tensor([0.1, 0.0, -12345.678], dtype=x.dtype)[torch.arange(x.shape[-1]) % 3]
    return torch.where(constant, level, x)


def _own_units(x: Tensor, decades: float) -> Tensor:
    if x.dim() == 0:
        return x
    return x * torch.logspace(-decades, decades, x.shape[-1], dtype=x.dtype)


VALUES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "plain": lambda x, _: x,
    "negative": lambda x, _: -x,
    "wide": lambda x, _: x * 5 - 2,
    "whole": lambda x, _: (x * 3).round(),
    "ties": lambda x, _: (x * 4).round() / 4,
    "zero": lambda x, _: x * 0,
    "constant": lambda x, _: x * 0 + 0.1,
    "some columns constant": _some_columns_constant,
    "rows again": _rows_again,
    "units of their own": lambda x, _: _own_units(x, 1.5),
    "units far apart": lambda x, _: _own_units(x, 4),
    "far": lambda x, _: x + 1e4,
    "very far": lambda x, _: x + 1e8,
    "large": lambda x, _: x * 1e3,
    "huge": lambda x, _: x * 1e18,
    "enormous": lambda x, _: x * 1e160,
    "tiny": lambda x, _: x * 1e-18,
    "denormal": lambda x, _: x * 1e-40,
    "outliers": lambda x, s: _places(x, s, [1e3, -1e3, 1e5]),
    "nan": lambda x, s: _places(x, s, [math.nan]),
    "inf": lambda x, s: _places(x, s, [math.inf]),
    "-inf": lambda x, s: _places(x, s, [-math.inf]),
    "specials": lambda x, s: _places(x, s, [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38, -65504.0]),
}
# Log-variances have a narrower range: the docstrings cover -87 to 87.
LOGVARS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    name: VALUES[name] for name in ("plain", "whole", "zero", "constant", "rows again", "nan", "inf", "-inf")
}
LOGVARS["spread"] = lambda x, _: x * 12
LOGVARS["steep"] = lambda x, _: x * 60  # beyond 80, where the variance continues as its tangent
LOGVARS["collapsed"] = lambda x, _: x - 15
RARE = {"huge", "enormous", "steep", "tiny", "denormal", "nan", "inf", "-inf", "specials", "units far apart"}


def kinds(role: str) -> list[str]:
    return list(LOGVARS if role == "logvar" else VALUES)


def values_of(g: Given, sizes: dict[str, int]) -> Tensor:
    """Return the values of a tensor, contiguous and in its dtype."""
    source = torch.Generator().manual_seed(g.seed)
    shape = g.shape(sizes)
    if g.role in ("raw", "score"):
        x = torch.rand(shape, generator=source, dtype=torch.float64) * (1.3 if g.role == "raw" else 0.98) + 1e-3
    else:
        x = torch.randn(shape, generator=source, dtype=torch.float64)
        x = x * 0.5 - 1 if g.role == "logvar" else x
    kind = (LOGVARS if g.role == "logvar" else VALUES)[g.values]
    return kind(x, source).to(DTYPES[g.dtype])


# Layouts. The gaps between the elements hold NaN, so that a kernel that reads them is detected.


def _within(x: Tensor, room: list[int], at: tuple[slice, ...]) -> Tensor:
    view = torch.full(room, torch.nan if x.is_floating_point() else 7, dtype=x.dtype)[at]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    return _within(x.reshape(-1), [x.numel() + 3], (slice(3, None),)).view(x.shape)


def _slice(x: Tensor) -> Tensor:
    return _within(x, [n + 5 for n in x.shape], tuple(slice(3, 3 + n) for n in x.shape))


def _steps(step: int, axis: int) -> Callable[[Tensor], Tensor]:
    def lay(x: Tensor) -> Tensor:
        if x.dim() < -axis:
            return _slice(x)
        room, at = list(x.shape), [slice(None)] * x.dim()
        room[axis], at[axis] = room[axis] * step, slice(0, room[axis] * step, step)
        return _within(x, room, tuple(at))

    return lay


def _transposed(x: Tensor) -> Tensor:
    """Make the last axis outermost in memory, as channels-last does for images."""
    around = list(reversed(range(x.dim())))
    return x.permute(around).contiguous().permute(around)


def _overlapping(x: Tensor) -> Tensor:
    """Let each row begin one element after the previous one."""
    if x.dim() < 2 or not x.numel():
        return x
    line = torch.cat([x.reshape(-1), x.reshape(-1)])
    return line.as_strided(x.shape, [1] * x.dim(), 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "slice": _slice,
    "offset": _offset,
    "every other row": _steps(2, -2),
    "every third column": _steps(3, -1),
    "transposed": _transposed,
    "one row": lambda x: x[..., :1, :].expand(x.shape) if x.dim() > 1 and x.numel() else x,
    "one column": lambda x: x[..., :1].expand(x.shape) if x.dim() and x.numel() else x,
    "one number": lambda x: x.reshape(-1)[:1].reshape([1] * x.dim()).expand(x.shape) if x.numel() else x,
    "overlapping": _overlapping,
    "negated": lambda x: torch._neg_view(-x),  # a lazy negation, as of the imaginary part of a conjugate
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](x)


# Random draws.

EDGES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 64, 65, 67, 127, 128, 129, 257, 509, 513, 1031, 2050]


def size(source: Random, most: int, least: int = 0) -> int:
    """Draw a size: mostly small, near tile edges, sometimes near the largest, rarely 0."""
    if source.random() < 0.01:
        return 0
    fit = [n for n in EDGES if least <= n <= most] or [most]
    small = [n for n in fit if n <= 17] or fit
    return source.choice(small if source.random() < 0.5 else fit)


def tensor(source: Random, name: str, axes: str, role: str, tame: bool = False) -> Given:
    """Draw one tensor; ``tame`` excludes values that make a result infinite."""
    kind = "plain"
    if source.random() < 0.7:
        fit = [k for k in kinds(role) if not (tame and k in RARE)]
        kind = source.choice([k for k in fit if k not in RARE] if source.random() < 0.7 else fit)
    dtype = "float32" if source.random() < 0.5 else source.choice(list(FLOATS))
    layout = "plain" if source.random() < 0.4 else source.choice(list(LAYOUTS))
    return Given(name, axes, role, dtype, layout, kind, source.randrange(2**31), source.random() < 0.9)


def alike(source: Random, given: list[Given]) -> list[Given]:
    """Give all tensors one dtype half of the time, and one kind of values a quarter of the time."""
    if source.random() < 0.5:
        given = [replace(g, dtype=given[0].dtype) for g in given]
    if source.random() < 0.25:
        given = [replace(g, values=given[0].values if given[0].values in kinds(g.role) else g.values) for g in given]
    return given
