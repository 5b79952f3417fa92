"""Every op with its options as a loss of tiny inputs, and the definition of that loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bomkern
from bomkern import (
    Anchored,
    Box,
    ConstraintTable,
    GoalSet,
    Group,
    Lower,
    Minimize,
    MinimizeHard,
    Spill,
    lazy,
    reference,
)
from bomkern.common.reductions import REDUCTIONS
from bomkern.dispatch import select
from tests.support.goals import SIX
from tests.support.statistics import OPS, codes, views

Inputs = tuple[Tensor, ...]
Values = Tensor | tuple[Tensor, ...]
Call = Callable[..., Values]
Loss = Callable[..., Tensor]

RULES: dict[str, dict[str, float]] = {"hard": {}, "soft": {"temperature": 0.3}, "spill": {"spill": 0.5}}
SOFT = float(torch.tensor(RULES["soft"]["temperature"]))  # rounded as in a float32 buffer
MULTIPLIERS = (0.5, 0.25, 0.125, 0.0625)
GROUPS = [0, 0, 1, 2, 2, 3]
DOUBLE = torch.float64


@dataclass(frozen=True)
class Problem:
    """``made(impl, device)`` returns a loss of the inputs; ``exact`` is its definition in plain autograd."""

    op: str
    inputs: Inputs
    made: Callable[[str, str], Call]
    exact: Call
    route: str = ""  # the route of lazy goals
    trains: bool = False  # whether a GoalSet records its steps

    def leaves(self, device: str = "cpu") -> Inputs:
        return tuple(x.to(device, DOUBLE, copy=True).requires_grad_() for x in self.inputs)

    def loss(self, impl: str, device: str = "cpu") -> Loss:
        call = self.made(impl, device)
        return lambda *inputs: weighed(call(*inputs))

    def definition(self, *inputs: Tensor) -> Tensor:
        return weighed(self.exact(*inputs))


def weighed(values: Values) -> Tensor:
    """Return the sum of all squared values, each with its own weight."""
    parts = []
    for k, value in enumerate((values,) if isinstance(values, Tensor) else values):
        weights = torch.linspace(0.5, 1.5 + k, value.numel(), dtype=value.dtype, device=value.device)
        parts.append((weights.view(value.shape) * value.square()).sum())
    return torch.stack(parts).sum()


# Goals.


def raw_values(batch: int, count: int) -> Inputs:
    """Return raw values far from ties; the last one is batch-level."""
    source = torch.Generator().manual_seed(batch + count)
    x = torch.rand(batch, count, generator=source, dtype=DOUBLE) * 0.8 + 0.1
    return (*x[:, :-1].unbind(1), x[0, -1])


def matrix_of(goals: Sequence[Tensor]) -> Tensor:
    """Return the goals as one [B, K] tensor."""
    if goals[0].dim() == 2:
        return goals[0]
    batch = max(x.numel() for x in goals)
    return torch.stack([x.expand(batch) for x in goals], 1)


def deficits_of(goals: Sequence[Tensor], constraints: Sequence[Any], groups: Sequence[int]) -> Tensor:
    """Return the goals' deficits, [B, G], each the mean of its members'.

    Parameters are rounded as in a float32 buffer.
    """
    table = ConstraintTable(constraints)
    each = reference.deficit(matrix_of(goals), table.params.double(), torch.tensor(table.curves))
    members = [[k for k, owner in enumerate(groups) if owner == g] for g in range(groups[-1] + 1)]
    return torch.stack([each[:, of].mean(1) for of in members], 1)


def rule(deficits: Tensor, reduction: str, weighting: str, multipliers: Sequence[float] = MULTIPLIERS) -> Tensor:
    """Evaluate the definition of a goal set's loss on the deficits, [B, G]."""
    if weighting == "spill":
        each = deficits @ deficits.new_tensor(multipliers[: deficits.shape[1]])
    elif weighting == "soft":
        each = SOFT * torch.logsumexp(deficits / SOFT, 1)
    else:
        each = deficits.amax(1)
    return {"none": lambda: each, "mean": each.mean, "sum": each.sum, "min": each.max}[reduction]()


def min_goals(reduction: str, constraints: Any, matrix: bool) -> Problem:
    raw = raw_values(5, 6)

    def made(impl: str, device: str) -> Call:
        def call(*goals: Tensor) -> Tensor:
            given = goals[0] if matrix else list(goals)
            return bomkern.min_goal_loss(given, constraints, reduction=reduction, impl=impl)

        return call

    return Problem("min_goal", (matrix_of(raw),) if matrix else raw, made, made("reference", "cpu"))


def goal_set_ops(reduction: str, weighting: str, matrix: bool) -> Problem:
    raw = raw_values(5, 6)

    def made(impl: str, device: str) -> Call:
        def call(*goals: Tensor) -> Tensor:
            table = ConstraintTable(SIX, device)
            mu = torch.tensor(SOFT if weighting == "soft" else 0.0, dtype=DOUBLE, device=device)
            multipliers = torch.tensor(MULTIPLIERS, dtype=DOUBLE, device=device) if weighting == "spill" else None
            serve = select.resolve("goal_set", device, impl)
            settings = table.params.double(), table.curves, GROUPS, mu, REDUCTIONS[reduction], multipliers
            return serve(list(goals), *settings)[0]

        return call

    def exact(*goals: Tensor) -> Tensor:
        return rule(deficits_of(goals, SIX, GROUPS), reduction, weighting)

    return Problem("goal_set", (matrix_of(raw),) if matrix else raw, made, exact)


def goal_sets(reduction: str, weighting: str, trains: bool, steps: int = 1) -> Problem:
    """Return the problem of a GoalSet.

    In training mode, a step changes its multipliers in place right after the loss is made.
    """
    constraints = [Anchored(0.1, 0.9).constraint, MinimizeHard(0.3), Lower(0.5, 0.1), Box(-0.1, 1.2)]
    raw, order = raw_values(5, 4), [1, 0, 2]
    first = [MULTIPLIERS[k] for k in order]

    def module(impl: str, device: str) -> GoalSet:
        b, c, d = constraints[1:]
        named = {"a": Anchored(0.1, 0.9), "b": Group(b=b, c=c), "d": d}
        goals = GoalSet(named, reduction=reduction, impl=impl, **RULES[weighting]).to(device).double().train(trains)
        goals.multipliers.copy_(torch.tensor(first))
        return goals

    def made(impl: str, device: str) -> Call:
        ready = [module(impl, device)]  # made before a transform of torch.func is active

        def call(*x: Tensor) -> Values:
            goals = ready.pop() if ready else module(impl, device)
            if not trains:  # a training step's changes would affect the next call
                ready.append(goals)
            a, b, c, d = x
            found = []
            for k in range(1, 1 + steps):
                found.append(goals({"a": a * k, "b": {"b": b, "c": c}, "d": d * k}).loss)
            return found[0] if steps == 1 else tuple(found)

        return call

    def exact(*goals: Tensor) -> Values:
        a, b, c, d = goals
        weights, found = first, []
        for k in range(1, 1 + steps):
            deficits = deficits_of((a * k, b, c, d * k), constraints, [0, 1, 1, 2])
            found.append(rule(deficits, reduction, weighting, weights))
            ranks = deficits.mean(0).argsort(descending=True).argsort().tolist()
            weights = Spill(0.5).weights(3)[ranks].tolist()
        return found[0] if steps == 1 else tuple(found)

    return Problem("goal_set", raw, made, exact, trains=trains)


def lazies(module: bool, route: str) -> Problem:
    """Return the problem of two goals, one of which is lazy and owns some of the rows."""
    source = torch.Generator().manual_seed(1)
    x, y = torch.rand(6, 3, generator=source, dtype=DOUBLE), torch.linspace(0.2, 1.1, 6, dtype=DOUBLE)
    constraints = {"a": MinimizeHard(0.5), "b": Minimize(0.5)}

    def size(v: Tensor) -> Tensor:
        return v.sin().square().sum(1)

    def made(impl: str, device: str) -> Call:
        goals = GoalSet(constraints, impl=impl, route=route).to(device).double().eval()
        table = ConstraintTable(list(constraints.values()), device)
        table.params = table.params.double()

        def call(x: Tensor, y: Tensor) -> Tensor:
            given = {"a": lazy(size, x), "b": y}
            if module:
                return goals(given).loss
            return bomkern.min_goal_loss(list(given.values()), table, route=route, impl=impl)

        return call

    def exact(x: Tensor, y: Tensor) -> Tensor:
        return rule(deficits_of([size(x), y], list(constraints.values()), [0, 1]), "mean", "hard")

    return Problem("goal_set" if module else "min_goal", (x, y), made, exact, route)


# Statistics.


def correlations(dataset_size: int | None, estimator: str, first: int | None = None, parts: bool = False) -> Problem:
    z, mu, logvar = codes(6, 3, DOUBLE)

    def made(impl: str, device: str) -> Call:
        def call(*given: Tensor) -> Values:
            if first is None:
                found = bomkern.total_correlation(*given, dataset_size, estimator, parts=parts, impl=impl)
                return tuple(found) if isinstance(found, bomkern.KLParts) else found
            serve = select.resolve("total_correlation", device, impl)
            return serve(*given, dataset_size, estimator == "mss", first)

        return call

    inputs = (z if first is None else z[first : first + 2], mu, logvar)
    return Problem("total_correlation", inputs, made, made("reference", "cpu"))


def statistics(inputs: Inputs, op: Call, **options: Any) -> Problem:
    def made(impl: str, device: str) -> Call:
        def call(*given: Tensor) -> Values:
            found = op(*given, **options, impl=impl)
            return found if isinstance(found, Tensor) else tuple(found)

        return call

    return Problem(op.__name__, inputs, made, made("reference", "cpu"))


def consistency_variance(*given: Tensor, **options: Any) -> Tensor:
    return bomkern.consistency_variance(given if len(given) > 1 else given[0], **options)


def problems() -> dict[str, Problem]:
    z, mu, logvar = codes(6, 4, DOUBLE)
    seen = views(5, 3, 3, DOUBLE)
    found = {
        "gaussian_kl": statistics((mu, logvar), bomkern.gaussian_kl, block_size=1),
        "gaussian_kl blocks": statistics((mu, logvar), bomkern.gaussian_kl, block_size=2, rho=0.3),
        "gaussian_kl ragged": statistics((mu, logvar), bomkern.gaussian_kl, block_size=3, rho=0.3),
        "consistency_variance": statistics(seen, consistency_variance),
        "consistency_variance one tensor": statistics((torch.stack(seen),), consistency_variance, correction=0),
        "active_units": statistics((mu,), bomkern.active_units, temperature=0.5),
        "latent_statistics": statistics((z, mu, logvar), bomkern.latent_statistics, temperature=0.5),
        "total_correlation": correlations(None, "mws"),
        "total_correlation mws": correlations(100, "mws"),
        "total_correlation mss": correlations(100, "mss"),
        "total_correlation parts": correlations(None, "mws", parts=True),
        "total_correlation mss parts": correlations(100, "mss", parts=True),
        "total_correlation first": correlations(None, "mws", 3),
        "total_correlation mss first": correlations(100, "mss", 3),
    }
    for normalize in (False, True):
        for reduction in ("sample", "batch"):
            found[f"covariance_penalty {reduction}{' normalized' * normalize}"] = statistics(
                (z,), bomkern.covariance_penalty, normalize=normalize, reduction=reduction
            )
    for name in OPS.keys() - {problem.op for problem in found.values()}:  # ops without options of their own above
        inputs = tuple(x.double() for x in OPS[name].make(6, 4))
        found[name] = replace(statistics(inputs, OPS[name].call), op=name)
    for reduction in REDUCTIONS:
        for matrix in (False, True):
            lay = " matrix" * matrix
            for name, constraints in (("scores", None), ("six", SIX)):
                found[f"min_goal_loss {reduction} {name}{lay}"] = min_goals(reduction, constraints, matrix)
            for weighting in RULES:
                found[f"goal_set {reduction} {weighting}{lay}"] = goal_set_ops(reduction, weighting, matrix)
        for weighting in RULES if reduction != "sum" else ():
            for trains in (False, True):
                found[f"GoalSet {reduction} {weighting}{' training' * trains}"] = goal_sets(
                    reduction, weighting, trains
                )
    found["GoalSet mean spill training twice"] = goal_sets("mean", "spill", True, 2)
    for route in ("always", "auto", "never"):
        found[f"lazy min_goal_loss {route}"] = lazies(False, route)
        found[f"lazy GoalSet {route}"] = lazies(True, route)
    return found


PROBLEMS = problems()
FAMILIES = tuple(dict.fromkeys(name.split()[0] for name in PROBLEMS))
