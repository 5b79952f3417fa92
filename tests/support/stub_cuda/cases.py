"""Calls of every op that Triton serves, in every way that leads to another launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomkern import ConstraintTable
from bomkern.dispatch import triton as triton_ops
from tests.support.triton_device import BF16, DOUBLE, FLOAT, HALF
from tests.support.triton_goals import CONSTRAINTS, MEAN, MIN, MIXED, NONE, SUM, make, table

REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM, "min": MIN}
Call = Callable[[], Any]
Prepare = Callable[[int], tuple[Call, Sequence[Tensor]]]


class Case(NamedTuple):
    """One call of an op.

    ``prepare(B)`` returns the call and the leaves to differentiate by, none for forward alone.
    """

    op: str
    kind: str  # a row of the launches' table
    name: str
    batch: int
    prepare: Prepare
    expanded: bool = False  # the incoming gradient is one number, as from `.sum()`


def both_ways(case: Case, batch: int | None = None) -> tuple[Call, Call]:
    """Return the forward call, and the backward of the last forward call."""
    call, leaves = case.prepare(case.batch if batch is None else batch)
    made: list[Tensor] = []
    pulls: list[Tensor] = []

    def forward() -> None:
        out = call()
        made[:] = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        if not pulls:
            pulls[:] = [x.new_ones(()).expand(x.shape) if case.expanded else torch.ones_like(x) for x in made]

    def backward() -> None:
        if leaves:
            torch.autograd.grad(made, leaves, pulls, allow_unused=True, retain_graph=True)

    return forward, backward


# Goals: functions that make them for a batch of B.


def laid(name: str, *dtypes: torch.dtype) -> Callable[[int], list[Tensor]]:
    """Return a function that makes six goals in one of the layouts of tests/support/triton_goals.py."""
    return lambda batch: make(name, batch, list(dtypes) or [FLOAT])


def columns(count: int, wanted: int | None = None) -> Callable[[int], list[Tensor]]:
    """Return a function that makes ``count`` tensors [B], the last ``wanted`` of which require grad."""
    least = count - (count if wanted is None else wanted)
    return lambda batch: [torch.rand(batch).requires_grad_(k >= least) for k in range(count)]


def matrix(count: int) -> Callable[[int], list[Tensor]]:
    return lambda batch: [torch.rand(batch, count).requires_grad_()]


def detached(batch: int) -> list[Tensor]:
    return [g.detach() for g in make("columns", batch, [FLOAT])]


GOAL_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "slice": (HALF,),
    "transposed": (BF16,),
    "strided": (HALF, FLOAT, BF16),
    "batch-level": (BF16, HALF, DOUBLE),
    "columns": (DOUBLE,),
}


def min_goal_cases() -> list[Case]:
    def case(
        kind: str,
        name: str,
        batch: int,
        goals: Callable[[int], list[Tensor]],
        constraints: Any = MIXED,
        reduction: int = MEAN,
        stats: bool = True,
    ) -> Case:
        def prepare(batch: int) -> tuple[Call, Sequence[Tensor]]:
            given = goals(batch)
            params, curves = table(constraints, DOUBLE if any(g.dtype == DOUBLE for g in given) else FLOAT)
            leaves = [g for g in given if g.requires_grad]
            return lambda: triton_ops.min_goal(given, params, curves, reduction, stats), leaves

        return Case("min_goal", kind, name, batch, prepare)

    cases = []
    for lay, (word, code) in itertools.product(("rows", "columns"), REDUCTIONS.items()):
        cases.append(case("one program", f"{lay}-{word}", 90, laid(lay), MIXED, code))
        cases.append(case("many programs", f"{lay}-{word}", 2000, laid(lay), MIXED, code))
    for lay, dtypes in GOAL_DTYPES.items():
        cases.append(case("one program", f"{lay}-dtypes", 37, laid(lay, *dtypes), MIXED, MIN))
    for kind in ("scores", "hard", "linear", "barrier"):
        cases.append(case("one program", kind, 90, laid("columns"), CONSTRAINTS[kind]))
    for count in (1, 64):
        constraints = (MIXED * 11)[:count]
        cases.append(case("one program", f"K={count}", 40, columns(count), constraints))
        cases.append(case("one program", f"[B, {count}]", 40, matrix(count), constraints))
    return [
        *cases,
        case("no statistics, no reduction", "none", 2000, laid("columns"), MIXED, NONE, False),
        case("many programs", "no statistics-mean", 2000, laid("columns"), MIXED, MEAN, False),
        case("0-dim goals", "sum", 2000, laid("batch-level"), MIXED, SUM),
        case("0-dim goals", "min", 2000, laid("batch-level", HALF), MIXED, MIN),
        case("no gradient", "mean", 2000, detached),
        case("one program", "some gradients", 90, columns(3, 2), MIXED[2:5]),
    ]


def goal_set_cases() -> list[Case]:
    def case(
        kind: str,
        name: str,
        batch: int,
        goals: Callable[[int], list[Tensor]],
        groups: Sequence[int],
        reduction: int = MEAN,
        multipliers: bool = False,
        masked: bool = False,
    ) -> Case:
        def prepare(batch: int) -> tuple[Call, Sequence[Tensor]]:
            given = goals(batch)
            dtype = DOUBLE if any(g.dtype == DOUBLE for g in given) else FLOAT
            made = ConstraintTable((MIXED * 11)[: len(groups)], dtype=dtype)
            weights = torch.ones(groups[-1] + 1, dtype=dtype) if multipliers else None
            rest = (made.params, made.curves, groups, torch.full((), 0.1, dtype=dtype), reduction, weights)
            masks = {}
            if masked:
                masks["present"] = torch.ones(len(groups), batch, dtype=torch.bool)
                masks["counts"] = torch.ones(2 + groups[-1] + len(groups), dtype=dtype)
            return lambda: triton_ops.goal_set(given, *rest, **masks), [g for g in given if g.requires_grad]

        return Case("goal_set", kind, name, batch, prepare)

    alone, grouped, one = [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 3], [0] * 6
    cases = []
    for lay, (word, code) in itertools.product(("rows", "columns"), REDUCTIONS.items()):
        cases.append(case("one program", f"{lay}-{word}", 90, laid(lay), grouped, code))
        cases.append(case("many programs", f"{lay}-{word}", 2000, laid(lay), alone, code))
    for word, groups in {"grouped": grouped, "one group": one, "alone": alone}.items():
        cases.append(case("many programs", f"{word}-multipliers", 2000, laid("columns"), groups, SUM, True))
    for lay, dtypes in GOAL_DTYPES.items():
        cases.append(case("one program", f"{lay}-dtypes", 37, laid(lay, *dtypes), grouped, MIN))
    for count in (1, 64):
        pairs = [k // 2 for k in range(count)]
        cases.append(case("one program", f"K={count}", 40, columns(count), pairs))
    return [
        *cases,
        case("many programs", "[B, 64]", 500, matrix(64), range(64)),
        case("0-dim goals", "mean", 2000, laid("batch-level"), grouped),
        case("no gradient", "mean", 2000, detached, grouped),
        case("one program", "some gradients", 90, columns(3, 2), [0, 1, 1]),
        case("one program", "masked", 90, laid("columns"), grouped, MEAN, True, True),
        case("many programs", "masked", 2000, laid("columns"), grouped, MIN, False, True),
    ]


# Matrices [B, D].

HOWS: dict[str, dict[str, Any]] = {
    "float": {},
    "double": {"dtypes": (DOUBLE,)},
    "halves": {"dtypes": (HALF, BF16, FLOAT)},
    "transposed": {"lay": lambda x: x.t().contiguous().t()},
    "strided": {"lay": lambda x: torch.stack([x, x], -1)[..., 1]},
}


def on_matrices(
    op: Callable[..., Any],
    dims: int,
    count: int,
    *rest: Any,
    dtypes: Sequence[torch.dtype] = (FLOAT,),
    lay: Callable[[Tensor], Tensor] = lambda x: x,
    want: int = -1,
) -> Prepare:
    """Prepare ``op(*matrices, *rest)``; each bit of ``want`` requests a gradient."""

    def prepare(batch: int) -> tuple[Call, Sequence[Tensor]]:
        given = [lay(torch.rand(batch, dims, dtype=dtypes[k % len(dtypes)])) for k in range(count)]
        for k, x in enumerate(given):
            x.requires_grad_(bool(want >> k & 1))
        return lambda: op(*given, *rest), [x for x in given if x.requires_grad]

    return prepare


def hows(op: str, kind: str, batch: int, call: Callable[..., Any], dims: int, count: int, *rest: Any) -> list[Case]:
    """Return one call in every dtype and layout."""
    return [Case(op, kind, name, batch, on_matrices(call, dims, count, *rest, **how)) for name, how in HOWS.items()]


def gaussian_kl_cases() -> list[Case]:
    op, call = "gaussian_kl", triton_ops.gaussian_kl
    return [
        *hows(op, "always", 90, call, 24, 2, 1, 0.0),
        Case(op, "always", "blocks of 4", 90, on_matrices(call, 24, 2, 4, 0.3)),
        Case(op, "always", "wide blocks", 90, on_matrices(call, 4000, 2, 2000, 0.3)),
        Case(op, "always", "a shorter block", 90, on_matrices(call, 24, 2, 9, 0.3)),
        Case(op, "always", "mu alone", 90, on_matrices(call, 24, 2, 4, 0.3, want=1)),
        Case(op, "always", "logvar alone", 90, on_matrices(call, 24, 2, 4, 0.3, want=2)),
        Case(op, "always", "one gradient", 90, on_matrices(call, 24, 2, 1, 0.0), expanded=True),
    ]


def consistency_variance_cases() -> list[Case]:
    def call(*given: Any) -> Tensor:
        return triton_ops.consistency_variance(given[:-1], given[-1])

    def stacked(batch: int) -> tuple[Call, Sequence[Tensor]]:
        views = torch.rand(3, batch, 24, requires_grad=True)
        return lambda: triton_ops.consistency_variance([views], 1.0), [views]

    op = "consistency_variance"
    return [
        *hows(op, "always", 90, call, 24, 3, 1.0),
        Case(op, "always", "16 views", 90, on_matrices(call, 200, 16, 0.0)),
        Case(op, "always", "some gradients", 90, on_matrices(call, 24, 3, 1.0, want=5)),
        Case(op, "always", "stacked", 90, stacked),
    ]


def active_units_cases() -> list[Case]:
    op, call = "active_units", triton_ops.active_units
    return [
        *hows(op, "one program", 90, call, 24, 1, 0.01, 0.1),
        *hows(op, "many programs", 3000, call, 24, 1, 0.01, 0.1),
        Case(op, "many programs", "wide", 90, on_matrices(call, 300, 1, 0.01, 0.1)),
    ]


def latent_statistics_cases() -> list[Case]:
    op, call, units = "latent_statistics", triton_ops.latent_statistics, (0.01, 0.1)
    cases = [
        *hows(op, "one program", 90, call, 24, 3, *units),
        *hows(op, "many programs", 3000, call, 24, 3, *units),
        Case(op, "many programs", "wide", 90, on_matrices(call, 300, 3, *units)),
    ]
    for k, name in enumerate(("z", "mu", "logvar")):
        prepare = on_matrices(call, 24, 3, *units, want=1 << k)
        cases.append(Case(op, "one program", f"{name} alone", 90, prepare))
    for field in (0, 3, 7):
        prepare = on_matrices(lambda *x, field=field: call(*x)[field], 24, 3, *units)
        cases.append(Case(op, "one program", f"field {field} alone", 90, prepare))
    return cases


def covariance_penalty_cases() -> list[Case]:
    op, call = "covariance_penalty", triton_ops.covariance_penalty
    cases = []
    for per_sample, dual, expanded, normalize in itertools.product((True, False), repeat=4):
        if expanded and not per_sample:
            continue  # a single number has no other gradient
        words = ["sample" if per_sample else "batch"]
        words += [
            word for word, said in {"D > B": dual, "one gradient": expanded, "raw": not normalize}.items() if said
        ]
        prepare = on_matrices(call, 100 if dual else 24, 1, normalize, per_sample)
        cases.append(Case(op, ", ".join(words), "float", 90, prepare, expanded))
    for name in ("double", "halves", "transposed"):
        prepare = on_matrices(call, 24, 1, True, True, **HOWS[name])
        cases.append(Case(op, "sample", name, 90, prepare))
    return [
        *cases,
        Case(op, "rows cut", "sample", 3000, on_matrices(call, 24, 1, True, True)),
        Case(op, "matrix cut", "batch", 90, on_matrices(call, 80, 1, True, False)),
    ]


def total_correlation_cases() -> list[Case]:
    op, call = "total_correlation", triton_ops.total_correlation

    def rows(batch: int) -> tuple[Call, Sequence[Tensor]]:
        z, mu, logvar = (torch.rand(n, 10, requires_grad=True) for n in (batch // 2, batch, batch))
        return lambda: call(z, mu, logvar, 60000, True, 3), [z, mu, logvar]

    cases = [
        case._replace(kind="halves" if case.name == "halves" else case.kind)
        for case in hows(op, "one chunk", 90, call, 10, 3, 60000, True)
    ]
    for k, name in enumerate(("z", "mu", "logvar")):
        prepare = on_matrices(call, 10, 3, 60000, True, want=1 << k)
        cases.append(Case(op, "one gradient", f"{name} alone", 90, prepare))
    return [
        *cases,
        Case(op, "one chunk", "mws", 90, on_matrices(call, 10, 3, 60000, False)),
        Case(op, "one chunk", "no size", 90, on_matrices(call, 10, 3, None, False)),
        Case(op, "one chunk", "parts", 90, on_matrices(partial(call, parts=True), 10, 3, 60000, True)),
        Case(op, "one dimension", "float", 90, on_matrices(call, 1, 3, 60000, True)),
        Case(op, "one chunk", "some rows", 90, rows),
        Case(op, "one chunk", "expanded", 90, on_matrices(call, 10, 3, 60000, True), expanded=True),
        Case(op, "two chunks", "float", 3000, on_matrices(call, 2, 3, 60000, True)),
    ]


CASES: dict[str, list[Case]] = {
    "min_goal": min_goal_cases(),
    "goal_set": goal_set_cases(),
    "total_correlation": total_correlation_cases(),
    "gaussian_kl": gaussian_kl_cases(),
    "consistency_variance": consistency_variance_cases(),
    "active_units": active_units_cases(),
    "latent_statistics": latent_statistics_cases(),
    "covariance_penalty": covariance_penalty_cases(),
}

# Kernels by Triton of a call and of its backward, then PyTorch's kernels beside each.
LAUNCHES = {
    "min_goal": {
        "one program": (1, 1, 0, 0),
        "no statistics, no reduction": (1, 1, 0, 0),
        "many programs": (2, 1, 0, 0),
        "0-dim goals": (2, 2, 0, 0),
        "no gradient": (2, 0, 0, 0),
    },
    "goal_set": {  # if a gradient is needed, PyTorch copies the settings for a second one
        "one program": (1, 1, 1, 0),
        "many programs": (2, 1, 1, 0),
        "0-dim goals": (2, 2, 1, 0),
        "no gradient": (2, 0, 0, 0),
    },
    "total_correlation": {  # PyTorch makes the range and the sum of logvar, parts of grad_z, and half gradients
        "one chunk": (4, 4, 2, 2),
        "halves": (4, 4, 2, 4),
        "one gradient": (4, 3, 2, 2),
        "one dimension": (3, 4, 1, 2),
        "two chunks": (4, 7, 2, 4),
    },
    "gaussian_kl": {"always": (1, 1, 0, 0)},
    "consistency_variance": {"always": (1, 1, 0, 0)},
    "active_units": {"one program": (1, 1, 0, 0), "many programs": (2, 1, 0, 0)},
    "latent_statistics": {"one program": (1, 1, 0, 0), "many programs": (2, 1, 0, 0)},
    "covariance_penalty": {  # PyTorch makes the matrix products and fills diagonals
        "sample": (3, 2, 3, 3),
        "sample, raw": (3, 2, 3, 3),
        "sample, one gradient": (3, 2, 3, 0),
        "sample, one gradient, raw": (3, 1, 3, 0),
        "sample, D > B": (3, 4, 1, 1),
        "sample, D > B, raw": (3, 4, 1, 1),
        "sample, D > B, one gradient": (3, 3, 1, 1),
        "sample, D > B, one gradient, raw": (3, 2, 1, 1),
        "batch": (3, 3, 1, 1),
        "batch, raw": (3, 2, 1, 1),
        "batch, D > B": (4, 3, 1, 1),
        "batch, D > B, raw": (4, 2, 1, 1),
        "rows cut": (4, 2, 3, 3),
        "matrix cut": (4, 3, 1, 1),
    },
}
