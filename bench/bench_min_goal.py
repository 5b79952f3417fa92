"""min_goal_loss, forward and backward, against eager PyTorch and torch.compile; and what one call costs the host.

The peers compute what a user would write: scores, stack, min, log, mean. Every result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bomkern import Box, BoxAsymmetric, Constraint, Lower, Minimize, MinimizeHard, Upper, min_goal_loss

K = 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [64, 512, 8192, 1_048_576]
Loss = Callable[[Sequence[Tensor]], Tensor]

ANCHORED = tuple(Minimize(scale=0.1 * (k + 1), ideal=0.01 * k) for k in range(K))
MIXED = (
    *(Minimize(0.4), Minimize(0.7, ideal=0.1), MinimizeHard(0.5), MinimizeHard(0.9)),
    *(Upper(0.5, 0.3), Lower(0.4, 0.3), Box(-0.3, 1.4), Box(-0.5, 1.2, tail=0.1), BoxAsymmetric(-0.2, 0.4, 1.3)),
)
CONSTRAINTS = {"anchored": ANCHORED, "mixed": MIXED}


def score(x: Tensor, constraint: Constraint) -> Tensor:
    """The score as one writes it in plain PyTorch."""
    c = constraint
    if isinstance(c, Minimize):
        return torch.exp(-(x - c.ideal) / c.scale)
    if isinstance(c, MinimizeHard):
        return 1 / (1 + (x / c.scale) ** 2)
    if isinstance(c, Upper):
        return torch.exp(-torch.relu(x - c.limit) / c.margin)
    if isinstance(c, Lower):
        return torch.exp(-torch.relu(c.limit - x) / c.margin)
    healthy = c.healthy if isinstance(c, BoxAsymmetric) else (c.lower + c.upper) / 2
    r = torch.where(x >= healthy, (x - healthy) / (c.upper - healthy), (healthy - x) / (healthy - c.lower))
    return torch.where(r <= 1 - c.tail, 1 - r, c.tail * torch.exp(-(r - 1 + c.tail) / c.tail))


def plain(constraints: Sequence[Constraint]) -> Loss:
    def loss(goals: Sequence[Tensor]) -> Tensor:
        scores = torch.stack([score(x, c) for x, c in zip(goals, constraints, strict=True)], dim=1)
        return -torch.log(scores.min(dim=1).values).mean()

    return loss


def peer(name: str, constraints: Sequence[Constraint]) -> Loss:
    if name == "eager":
        return plain(constraints)
    if name == "torch.compile":
        torch._dynamo.reset()
        return torch.compile(plain(constraints), mode="max-autotune-no-cudagraphs" if DEVICE == "cuda" else None)
    return lambda goals: min_goal_loss(goals, constraints)


def check(loss: Loss, constraints: Sequence[Constraint], goals: list[Tensor]) -> None:
    """Loss and gradients against the reference in float64."""
    exact = [g.detach().double().cpu().requires_grad_() for g in goals]
    want = min_goal_loss(exact, constraints, impl="reference")
    got = loss(goals)
    assert torch.allclose(got.double().cpu(), want, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, goals, materialize_grads=True), torch.autograd.grad(want, exact), strict=True
    ):
        assert torch.allclose(a.double().cpu(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", ["bomkern", "torch.compile", "eager"])
@pytest.mark.parametrize("batch", SIZES)
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_forward_backward(benchmark: object, kind: str, batch: int, name: str) -> None:
    constraints = CONSTRAINTS[kind]
    generator = torch.Generator().manual_seed(0)
    # Well inside the boxes, where the plain peers are right too.
    goals = [(torch.rand(batch, generator=generator) + 0.05).to(DEVICE).requires_grad_() for _ in range(K)]
    loss = peer(name, constraints)
    check(loss, constraints, goals)
    calls = 20 if DEVICE == "cuda" else 1

    def step() -> None:
        for _ in range(calls):
            torch.autograd.grad(loss(goals), goals, materialize_grads=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"min_goal {kind} K={K} B={batch}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(peer=name, device=DEVICE, calls=calls)  # type: ignore[attr-defined]
    benchmark.pedantic(step, **rounds(batch, name))  # type: ignore[attr-defined]


def rounds(batch: int, name: str) -> dict[str, int]:
    """Enough calls a round to outlast the clock, enough rounds for a median."""
    calls = 200 if batch <= 512 else 40 if batch <= 8192 else 1
    if name != "bomkern":
        calls = max(1, calls // 4)
    return {"rounds": 15, "iterations": calls, "warmup_rounds": 3}


@pytest.mark.parametrize("name", ["bomkern", "torch.exp"])
def test_host_time_of_one_call(benchmark: object, name: str) -> None:
    """One forward call at B=64 on a [64, 9] tensor, beside torch.exp on the same tensor."""
    x = torch.rand(64, K, device=DEVICE).requires_grad_()
    call = (lambda: min_goal_loss(x, ANCHORED)) if name == "bomkern" else (lambda: torch.exp(x))
    benchmark.group = "min_goal host time of one forward call B=64"  # type: ignore[attr-defined]
    benchmark.extra_info.update(peer=name, device=DEVICE, calls=1)  # type: ignore[attr-defined]
    benchmark.pedantic(call, rounds=30, iterations=500, warmup_rounds=3)  # type: ignore[attr-defined]
