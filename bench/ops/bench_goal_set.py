"""Time goal_set, forward and backward, against eager PyTorch and torch.compile; and the cost of a `GoalSet` in a step.

The peers are a user's code for the same loss and the same log: scores, stack, worst goal or log-sum-exp, and the
numbers of the step (share, level and mean raw value of each goal). Every result is checked before it is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import BOTH, Case, Function, Inputs, Size, about, in_turn, measure, sizes_and, sizes_at, timed
from bench.machine import DEVICE
from bench.ops.bench_min_goal import ANCHORED, SIZES, TRAFFIC, K, raw_values
from bench.regimes import GOALS, goals
from bench.report.write import SHOWN
from bomkern import Anchored, ConstraintTable, GoalSet, min_goal_loss
from bomkern.common.reductions import Reduction
from bomkern.dispatch import select
from bomkern.reference import record_parts

RULES = ("hard", "smooth", "spill")
MU, WEIGHTS = 0.1, tuple(0.5 ** (k + 1) for k in range(K))
Step = tuple[Tensor, Tensor, Tensor]  # loss; [2, K]: share and level; [K]: raw


def plain(rule: str) -> Function:
    """Return a step in plain PyTorch, in which each goal's share is its weight in the gradient."""
    weights = torch.tensor(WEIGHTS, device=DEVICE)

    def step(*raw: Tensor) -> Step:
        scores = torch.stack([torch.exp(-(x - c.ideal) / c.scale) for x, c in zip(raw, ANCHORED, strict=True)], 1)
        d = -torch.log(scores)
        if rule == "hard":
            worst = d.max(1)  # the first of goals that tie, as in the share
            loss = worst.values.mean()
            share = torch.nn.functional.one_hot(worst.indices, K).float().mean(0)
        elif rule == "smooth":
            loss = (MU * torch.logsumexp(d / MU, 1)).mean()
            share = torch.softmax(d.detach() / MU, 1).mean(0)
        else:
            loss, share = (d.mean(0) * weights).sum(), weights / weights.sum()
        level = scores.detach().clamp(max=1).mean(0)
        return loss, torch.stack([share, level]), torch.stack([x.detach().mean() for x in raw])

    return step


@functools.cache
def _arguments(rule: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    table = ConstraintTable(ANCHORED, DEVICE)
    mu = torch.tensor(MU if rule == "smooth" else 0.0, device=DEVICE).to(dtype)
    weights = torch.tensor(WEIGHTS, device=DEVICE).to(dtype) if rule == "spill" else None
    return table.params.to(dtype), table.curves, mu, weights


def fused(rule: str) -> Function:
    """Return the same step with bomkern's op."""
    owners = list(range(K))

    def step(*raw: Tensor, impl: str | None = None) -> Step:
        params, curves, mu, weights = _arguments(rule, torch.promote_types(raw[0].dtype, torch.float32))
        serve = select.resolve("goal_set", DEVICE, impl)
        loss, _, record = serve(list(raw), params, curves, owners, mu, Reduction.MEAN, weights)
        parts = record_parts(record, K, K)
        return loss, torch.stack([parts["share"], parts["level"]]), parts["raw"]

    return step


def make(regime: str, K: int, B: int) -> Inputs:
    return goals(regime, ANCHORED[:K], B)


CASES = {
    rule: Case(
        "goal_set", make, fused(rule), plain(rule), lambda out: out[0], TRAFFIC,
        label=rule, regimes=GOALS, tolerance=(1e-4, 1e-3),
    )
    for rule in RULES
}  # fmt: skip


@sizes_and(SIZES[:3], directions=(BOTH,), regimes=GOALS, at=SHOWN["goal_set spill"])
@pytest.mark.parametrize("rule", RULES)
def test_peers(benchmark: Any, rule: str, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASES[rule], name, size, direction, regime)


@sizes_at(SIZES, SHOWN["goal_set spill"])
@pytest.mark.parametrize("rule", RULES)
def test_regimes_in_turn(benchmark: Any, rule: str, size: Size) -> None:
    in_turn(benchmark, CASES[rule], size)


SETS: dict[str, dict[str, Any]] = {"hard": {}, "smooth": {"temperature": MU}, "spill": {"spill": 0.5}}
BARE = "min_goal_loss with stats"


@pytest.mark.parametrize("name", [BARE, *(f"GoalSet {rule}" for rule in SETS)])
def test_what_the_module_adds(benchmark: Any, name: str) -> None:
    """Time a GoalSet with names, policies, history and weights beside a bare loss with stats: nine goals, both ways."""
    size = SIZES[0]
    raw = raw_values(**size)
    about(benchmark, "goal_set", "GoalSet step", BOTH, name, size)
    if name == BARE:

        def step() -> None:
            torch.autograd.grad(min_goal_loss(raw, ANCHORED, return_stats=True)[0], raw, materialize_grads=True)

    else:
        policies = {f"goal{k}": Anchored(c.ideal, c.ideal + c.scale) for k, c in enumerate(ANCHORED)}
        goal_set = GoalSet(policies, **SETS[name.split()[1]]).to(DEVICE)
        named = dict(zip(policies, raw, strict=True))

        def step() -> None:
            torch.autograd.grad(goal_set(named).loss, raw, materialize_grads=True)

    timed(benchmark, [step])
