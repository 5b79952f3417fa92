"""Constraints: map the raw value of a goal to a score, and so to a deficit.

All seven constraints have one form: a two-sided linear *ramp* around a centre,

    r(x) = right * (x - center)  where x > center,
           left  * (x - center)  where x < center,

followed by one of three *curves* that give the deficit ``d = -log(score)``:

    LINEAR   d = r                                        Minimize, Maximize, Upper, Lower
    HARD     d = log(1 + r^2)                             MinimizeHard
    BARRIER  d = -log(1 - r)                r <= 1 - tail
               = -log(tail) + (r - 1 + tail) / tail       Box, BoxAsymmetric

`ConstraintTable` holds four numbers per goal, ``(center, right, left, tail)``, on the device, so that they can change
without a host sync and inside a captured CUDA graph. The kernels know only the ramp and the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .common.blame import TOO_MANY
from .common.checks import MAX_GOALS, finite_number
from .common.graph_constants import on_device

LINEAR, HARD, BARRIER = CURVES = 0, 1, 2


def _number(owner: str, name: str, value: object) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{owner}: {name} must be a Python number, got a tensor: write .item(), which waits for the device; "
            "to keep parameters on the device, write into ConstraintTable.params"
        )
    return finite_number(f"{owner}: {name}", value)


def _positive(owner: str, name: str, value: object) -> float:
    number = _number(owner, name, value)
    if number <= 0 or math.isinf(1 / number):
        raise ValueError(f"{owner}: {name} must be greater than 0, got {number}")
    return number


def _tail(owner: str, value: object) -> float:
    number = _number(owner, "tail", value)
    if not 0 < number < 1:
        raise ValueError(f"{owner}: tail must lie between 0 and 1, got {number}")
    return number


class Constraint:
    """Base of the seven constraints: immutable, hashable, equal by value.

    ``curve`` is LINEAR, HARD or BARRIER, and ``ramp`` is ``(center, right, left, tail)``; see the module's docstring.
    """

    curve: ClassVar[int]
    __slots__ = ("_arguments", "_hash", "_text", "ramp")

    ramp: tuple[float, float, float, float]
    _arguments: dict[str, float]
    _hash: int
    _text: str  # the ramp: torch.compile treats text as constant, but floats as values that may change

    def _freeze(self, ramp: tuple[float, float, float, float], **arguments: float) -> None:
        text = " ".join(map(repr, ramp))
        slots = {"ramp": ramp, "_arguments": arguments, "_text": text}
        for slot, value in slots.items():
            object.__setattr__(self, slot, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{type(self).__name__} is immutable: make a new one, or write into ConstraintTable.params"
        )

    def __getattr__(self, name: str) -> float:
        # Called only for names without a slot: returns the arguments as the user gave them.
        if not name.startswith("_") and name in self._arguments:
            return self._arguments[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> tuple[type[Constraint], tuple[float, ...]]:
        return type(self), tuple(self._arguments.values())

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:  # lazily: torch 2.11 cannot trace hash() in a graph that makes a constraint
            object.__setattr__(self, "_hash", hash((type(self), self.ramp)))
            return self._hash

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.ramp == other.ramp

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in self._arguments.items())})"


class Minimize(Constraint):
    """Score ``exp(-(x - ideal) / scale)``: deficit 0 at ``ideal``, 1 at ``ideal + scale``.

    A raw value below ``ideal`` scores above 1: it is better than ideal, which is allowed.

    Args:
        scale: raw units per unit of deficit, > 0; ``nadir - ideal`` for an anchored goal.
        ideal: the raw value with deficit 0.
    """

    curve = LINEAR
    __slots__ = ()

    def __init__(self, scale: float, ideal: float = 0.0) -> None:
        scale, ideal = _positive("Minimize", "scale", scale), _number("Minimize", "ideal", ideal)
        self._freeze((ideal, 1 / scale, 1 / scale, 0.0), scale=scale, ideal=ideal)


class Maximize(Constraint):
    """Score ``exp(-(ideal - x) / scale)``: deficit 0 at ``ideal``, 1 at ``ideal - scale``.

    It mirrors `Minimize`, for an accuracy, a structural similarity or a log-likelihood. A raw value above ``ideal``
    scores above 1: it is better than ideal, which is allowed.

    Args:
        scale: raw units per unit of deficit, > 0; ``ideal - nadir`` for an anchored goal.
        ideal: the raw value with deficit 0.
    """

    curve = LINEAR
    __slots__ = ()

    def __init__(self, scale: float, ideal: float = 0.0) -> None:
        scale, ideal = _positive("Maximize", "scale", scale), _number("Maximize", "ideal", ideal)
        self._freeze((ideal, -1 / scale, -1 / scale, 0.0), scale=scale, ideal=ideal)


class MinimizeHard(Constraint):
    """Score ``1 / (1 + (x / scale)^2)``: flat near 0, one half at ``scale``, heavy-tailed far out.

    Args:
        scale: the raw value with score one half, > 0.
    """

    curve = HARD
    __slots__ = ()

    def __init__(self, scale: float) -> None:
        scale = _positive("MinimizeHard", "scale", scale)
        self._freeze((0.0, 1 / scale, -1 / scale, 0.0), scale=scale)


class Upper(Constraint):
    """Score 1 up to ``limit``, then ``exp(-(x - limit) / margin)``; no gradient at or below the limit.

    Args:
        limit: the largest raw value that satisfies the goal.
        margin: raw units per unit of deficit beyond the limit, > 0.
    """

    curve = LINEAR
    __slots__ = ()

    def __init__(self, limit: float, margin: float) -> None:
        limit, margin = _number("Upper", "limit", limit), _positive("Upper", "margin", margin)
        self._freeze((limit, 1 / margin, 0.0, 0.0), limit=limit, margin=margin)


class Lower(Constraint):
    """Score 1 down to ``limit``, then ``exp(-(limit - x) / margin)``; no gradient at or above the limit.

    Args:
        limit: the smallest raw value that satisfies the goal.
        margin: raw units per unit of deficit beyond the limit, > 0.
    """

    curve = LINEAR
    __slots__ = ()

    def __init__(self, limit: float, margin: float) -> None:
        limit, margin = _number("Lower", "limit", limit), _positive("Lower", "margin", margin)
        self._freeze((limit, 0.0, -1 / margin, 0.0), limit=limit, margin=margin)


class BoxAsymmetric(Constraint):
    """Score 1 at ``healthy``, falling to ``tail`` near ``lower`` and ``upper``, and towards 0 beyond them.

    A relaxed log barrier (Hauser & Saccon 2006, "A barrier function method for the optimization of trajectory
    functionals with constraints"). Let ``r`` be the distance from ``healthy`` over the half-width of its side. The
    score is ``1 - r`` if ``r <= 1 - tail``, else ``tail * exp(-(r - 1 + tail) / tail)``. Its slope has no jump at the
    seam.

    Args:
        lower, healthy, upper: raw values, ``lower < healthy < upper``.
        tail: the score at the seam, in (0, 1).
    """

    curve = BARRIER
    __slots__ = ()

    def __init__(self, lower: float, healthy: float, upper: float, tail: float = 0.05) -> None:
        lower, healthy, upper = (
            _number("BoxAsymmetric", name, value)
            for name, value in (("lower", lower), ("healthy", healthy), ("upper", upper))
        )
        if not lower < healthy < upper:
            raise ValueError(
                f"BoxAsymmetric: lower < healthy < upper must hold, got lower={lower}, healthy={healthy}, upper={upper}"
            )
        right = 1 / _positive("BoxAsymmetric", "upper - healthy", upper - healthy)
        left = -1 / _positive("BoxAsymmetric", "healthy - lower", healthy - lower)
        tail = _tail("BoxAsymmetric", tail)
        self._freeze((healthy, right, left, tail), lower=lower, healthy=healthy, upper=upper, tail=tail)


class Box(Constraint):
    """`BoxAsymmetric` around the middle of ``lower`` and ``upper``.

    Args:
        lower, upper: raw values, ``lower < upper``.
        tail: the score at the seam, in (0, 1).
    """

    curve = BARRIER
    __slots__ = ()

    def __init__(self, lower: float, upper: float, tail: float = 0.05) -> None:
        lower, upper = _number("Box", "lower", lower), _number("Box", "upper", upper)
        if not lower < upper:
            raise ValueError(f"Box: lower must be less than upper, got lower={lower}, upper={upper}")
        half = _positive("Box", "upper - lower", upper / 2 - lower / 2)
        tail = _tail("Box", tail)
        self._freeze((lower + half, 1 / half, -1 / half, tail), lower=lower, upper=upper, tail=tail)


def check_constraints(constraints: Sequence[object]) -> None:
    """Check that each is a constraint; a TypeError names the first that is not."""
    for k, constraint in enumerate(constraints):
        if not isinstance(constraint, Constraint):
            raise TypeError(f"constraints[{k}] must be a constraint, got {type(constraint).__name__}")


class ConstraintTable:
    """K constraints with their parameters in device memory.

    Pass it as ``constraints=`` if parameters change during training, especially inside a captured CUDA graph. Write
    into ``params``, or assign ``table[k] = Minimize(3.0)``: the next call or replay sees it, without a host sync.

    Args:
        constraints: 1 to 64 constraints.
        device: device of the goals.
        dtype: float32, or float64 for float64 goals.

    Attributes:
        params: [K, 4], the columns ``center, right, left, tail`` of each goal's ramp and curve (see the module).
        curves: K curve codes. They are fixed, because a kernel launch has them baked in.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(constraints, Constraint) or not isinstance(constraints, Sequence):
            raise TypeError(f"constraints must be a sequence of constraints, got {type(constraints).__name__}")
        check_constraints(constraints)
        if not 1 <= len(constraints) <= MAX_GOALS:
            fix = f": {TOO_MANY}" if constraints else ""
            raise ValueError(f"constraints must name 1 to {MAX_GOALS} goals, got {len(constraints)}{fix}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.curves = [c.curve for c in constraints]
        self.params = torch.tensor([c.ramp for c in constraints], dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self.curves)

    def __setitem__(self, index: int, constraint: Constraint) -> None:
        if not isinstance(constraint, Constraint):
            raise TypeError(f"table[{index}] must be a constraint, got {type(constraint).__name__}")
        if constraint.curve != self.curves[index]:
            raise ValueError(f"table[{index}] cannot become {constraint!r}: its curve is fixed; make a new table")
        write_ramp(self.params[index], constraint)

    def __repr__(self) -> str:
        return f"ConstraintTable({len(self)} goals, {self.params.dtype}, {self.params.device})"


def write_ramp(row: Tensor, constraint: Constraint) -> None:
    """Write a constraint's parameters into a row of a table, [4], without a copy from the host, which would wait."""
    for entry, value in zip(row.unbind(), constraint.ramp, strict=True):
        entry.fill_(value)


def pack(constraints: Sequence[Constraint], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """Return ``params`` and ``curves`` of a table of these constraints; the tensor is shared, see `on_device`."""
    if torch.compiler.is_dynamo_compiling():
        ramps: tuple[Any, ...] = tuple(tuple(float(x) for x in c._text.split()) for c in constraints)
    else:
        ramps = tuple(c.ramp for c in constraints)
    return on_device(ramps, dtype, device), [c.curve for c in constraints]
