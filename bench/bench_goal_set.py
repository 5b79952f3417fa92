"""goal_set, forward and backward, against eager PyTorch and torch.compile; and what a `GoalSet` costs a step.

The peers compute what a user would write for the same loss and the same log: scores, stack, worst goal or log-sum-exp,
and the numbers of the step (share, level and mean raw of each goal). Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.bench_min_goal import ANCHORED, DEVICE, K, rounds
from bomkern import Anchored, ConstraintTable, GoalSet, _impl, min_goal_loss
from bomkern.reference import MEAN, record_parts

SIZES = [64, 512, 8192]
RULES = ("hard", "smooth", "spill")
MU, WEIGHTS = 0.1, tuple(0.5 ** (k + 1) for k in range(K))
Step = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]  # loss, and [3, K]: share, level, raw


def plain(rule: str) -> Step:
    """As one writes it: each goal's weight is its gradient."""
    weights = torch.tensor(WEIGHTS, device=DEVICE)

    def step(goals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        scores = torch.stack([torch.exp(-(x - c.ideal) / c.scale) for x, c in zip(goals, ANCHORED, strict=True)], 1)
        d = -torch.log(scores)
        if rule == "hard":
            loss = d.amax(1).mean()
            share = torch.nn.functional.one_hot(d.argmax(1), K).float().mean(0)
        elif rule == "smooth":
            loss = (MU * torch.logsumexp(d / MU, 1)).mean()
            share = torch.softmax(d.detach() / MU, 1).mean(0)
        else:
            loss, share = (d.mean(0) * weights).sum(), weights / weights.sum()
        return loss, torch.stack([share, scores.detach().mean(0), torch.stack([x.detach().mean() for x in goals])])

    return step


def fused(impl: str | None, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Callable[[str], Step]:
    """The op, in the same form."""
    table = ConstraintTable(ANCHORED, device)
    serve = _impl.resolve("goal_set", device, impl)
    params, owners = table.params.to(dtype), list(range(K))

    def make(rule: str) -> Step:
        mu = torch.tensor(MU if rule == "smooth" else 0.0, device=device).to(dtype)
        given = torch.tensor(WEIGHTS, device=device).to(dtype) if rule == "spill" else None

        def step(goals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            loss, _, record = serve(list(goals), params, table.curves, owners, mu, MEAN, given)
            parts = record_parts(record, K, K)
            return loss, torch.stack([parts["share"], parts["level"], parts["raw"]])

        return step

    return make


def check(step: Step, rule: str, goals: list[Tensor]) -> None:
    """Loss, numbers and gradients against the reference in float64."""
    exact = [g.detach().double().cpu().requires_grad_() for g in goals]
    want, numbers = fused("reference", torch.float64, "cpu")(rule)(exact)
    got, seen = step(goals)
    assert torch.allclose(got.double().cpu(), want, rtol=1e-5)
    assert torch.allclose(seen.double().cpu(), numbers, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, goals), torch.autograd.grad(want, exact), strict=True):
        assert torch.allclose(a.double().cpu(), b, rtol=1e-3, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", ["bomkern", "torch.compile", "eager"])
@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_forward_backward(benchmark: object, rule: str, batch: int, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    goals = [(torch.rand(batch, generator=generator) + 0.05).to(DEVICE).requires_grad_() for _ in range(K)]
    if name == "bomkern":
        step = fused(None)(rule)
    elif name == "torch.compile":
        torch._dynamo.reset()
        step = torch.compile(plain(rule), mode="max-autotune-no-cudagraphs" if DEVICE == "cuda" else None)
    else:
        step = plain(rule)
    check(step, rule, goals)
    calls = 20 if DEVICE == "cuda" else 1

    def run() -> None:
        for _ in range(calls):
            torch.autograd.grad(step(goals)[0], goals)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"goal_set {rule} K={K} B={batch}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(peer=name, device=DEVICE, calls=calls)  # type: ignore[attr-defined]
    benchmark.pedantic(run, **rounds(batch, name))  # type: ignore[attr-defined]


SETS = {"hard": {}, "smooth": {"temperature": MU}, "spill": {"spill": 0.5}}


@pytest.mark.parametrize("name", ["bomkern.min_goal_loss with stats", *(f"GoalSet {rule}" for rule in SETS)])
@pytest.mark.parametrize("batch", [64])
def test_whole_step_of_a_goal_set(benchmark: object, batch: int, name: str) -> None:
    """What names, policies, history and weights add to a bare loss with stats: forward and backward of nine goals."""
    generator = torch.Generator().manual_seed(0)
    raw = [(torch.rand(batch, generator=generator) + 0.05).to(DEVICE).requires_grad_() for _ in range(K)]
    if name.startswith("bomkern"):

        def step() -> None:
            torch.autograd.grad(min_goal_loss(raw, ANCHORED, return_stats=True)[0], raw, materialize_grads=True)

    else:
        policies = {f"goal{k}": Anchored(c.ideal, c.ideal + c.scale) for k, c in enumerate(ANCHORED)}
        goals = GoalSet(policies, **SETS[name.split()[1]]).to(DEVICE)
        named = dict(zip(policies, raw, strict=True))

        def step() -> None:
            torch.autograd.grad(goals(named).loss, raw, materialize_grads=True)

    benchmark.group = f"GoalSet step K={K} B={batch}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(peer=name, device=DEVICE, calls=1)  # type: ignore[attr-defined]
    benchmark.pedantic(step, rounds=30, iterations=200, warmup_rounds=3)  # type: ignore[attr-defined]
