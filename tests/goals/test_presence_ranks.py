"""Test absent and masked goals with a process_group of two processes against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from bomkern import Calibrated, GoalSet, Group, Minimize, ShareGuard, Tracking
from tests.support.processes import on_two_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
BATCH = 6  # samples of a rank
RULES: dict[str, dict[str, Any]] = {
    "hard": {},
    "smooth": {"temperature": 0.3},
    "spill": {"spill": 0.5},
    "spill auto": {"spill": "auto"},
    "guard": {"spill": 0.5, "guard": ShareGuard(halflife=1.0)},
}


def make(group: Any, reduction: str, rule: str) -> GoalSet:
    goals = GoalSet(
        a=Tracking(3.0),
        g=Group(x=Calibrated(3, 0.5), y=Minimize(0.5)),
        b=Minimize(1.0),
        optional=["a", "g"],
        reduction=reduction,
        process_group=group,
        route="never",
        **RULES[rule],
    )
    return goals.double()


def draw(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return raw values and masks of the whole batch. Some steps lack a goal on one rank, or on both, or everything."""
    generator = torch.Generator().manual_seed(step)
    raw = {n: torch.rand(2 * BATCH, generator=generator, dtype=torch.float64) * 2 for n in ("a", "x", "y", "b")}
    mask = {n: torch.rand(2 * BATCH, generator=generator) < 0.6 for n in ("a", "x", "y")}
    if step % 4 == 1:
        mask["a"][BATCH:] = False
    if step % 4 == 2:
        mask["a"][:] = False
        mask["x"][:BATCH] = mask["y"][:BATCH] = False
    return raw, mask


def take(goals: GoalSet, step: int, w: Tensor, part: slice) -> Any:
    raw, mask = draw(step)
    own = {n: x[part] * w for n, x in raw.items()}
    known = {n: m[part] for n, m in mask.items()}
    given: dict[str, Any] = {"a": own["a"], "g": {"x": own["x"], "y": own["y"]}, "b": own["b"]}
    masks: dict[str, Any] = {"a": known["a"], "g": {"x": known["x"], "y": known["y"]}}
    if not known["a"].any():
        del given["a"], masks["a"]  # as a loader without such samples does
    if not (known["x"] | known["y"]).any():
        given["g"] = masks["g"] = None
    return goals(given, mask=masks)


def agree(group: Any, rank: int, reduction: str, rule: str) -> None:
    ours, whole = make(group, reduction, rule), make(None, reduction, rule)
    for step in range(6):
        w, v = (torch.tensor(1.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        one = take(ours, step, w, slice(rank * BATCH, (rank + 1) * BATCH))
        all_of_it = take(whole, step, v, slice(None))
        if reduction == "none":
            expected = all_of_it.loss[rank * BATCH : (rank + 1) * BATCH]
            torch.testing.assert_close(one.loss, expected)
        else:
            torch.testing.assert_close(one.loss, all_of_it.loss)
            grads = [torch.autograd.grad(x.loss, y, materialize_grads=True)[0] for x, y in ((one, w), (all_of_it, v))]
            mean = grads[0].clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, grads[1])
        torch.testing.assert_close(one.record, all_of_it.record, equal_nan=True, rtol=1e-6, atol=1e-9)
        for (name, a), b in zip(ours.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def one_goal_alone(group: Any, rank: int) -> None:
    ours, whole = make(group, "mean", "hard"), make(None, "mean", "hard")
    w, v = (torch.tensor(1.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with ours.only("a"), whole.only("a"):
        one = take(ours, 1, w, slice(rank * BATCH, (rank + 1) * BATCH)).loss
        all_of_it = take(whole, 1, v, slice(None)).loss
    torch.testing.assert_close(one, all_of_it)
    grads = [torch.autograd.grad(x, y, materialize_grads=True)[0] for x, y in ((one, w), (all_of_it, v))]
    dist.all_reduce(grads[0])
    torch.testing.assert_close(grads[0] / 2, grads[1])


def compiled(group: Any, rank: int) -> None:
    """A compiled step gathers the counts too."""
    eager, ours = make(group, "mean", "spill"), make(group, "mean", "spill")
    part = slice(rank * BATCH, (rank + 1) * BATCH)

    def loss(goals: GoalSet, raw: dict[str, Tensor], mask: dict[str, Tensor]) -> Tensor:
        given = {"a": raw["a"], "g": {"x": raw["x"], "y": raw["y"]}, "b": raw["b"]}
        return goals(given, mask=mask).loss

    fast = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for step in range(2):
        raw, mask = draw(step)
        own = {n: x[part].requires_grad_() for n, x in raw.items()}
        known = {"a": mask["a"][part], "g.x": mask["x"][part]}
        one, other = loss(eager, own, known), fast(ours, own, known)
        torch.testing.assert_close(other, one)
        grads = [torch.autograd.grad(x, list(own.values())) for x in (one, other)]
        torch.testing.assert_close(grads[1], grads[0])


def refuse(group: Any, rank: int) -> None:
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=0.5, process_group=group)
    for raw, mask in (
        ({"a": None, "b": torch.rand(2)}, None),
        ({"a": torch.rand(2), "b": torch.rand(2)}, {"a": torch.tensor([True, False])}),
    ):
        with pytest.raises(ValueError, match=r"a is absent or masked.*GoalSet\(..., optional=\['a'\]\)"):
            goals(raw, mask=mask)
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0), spill=0.5, process_group=group, optional=["a"])
    with pytest.raises(ValueError, match=r"b has 3 samples, .* a has 2: take \.mean\(\) of each"):
        goals({"a": torch.rand(2), "b": torch.rand(3)})


def _check(group: Any, rank: int, whole: bool) -> None:
    for reduction in ("mean", "sum", "min", "none") if whole else ("mean",):
        for rule in RULES if whole else ("smooth", "guard"):
            agree(group, rank, reduction, rule)
    one_goal_alone(group, rank)
    refuse(group, rank)
    if whole:
        compiled(group, rank)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_one(tmp_path: Path, whole: bool) -> None:
    """Two processes with half of the samples each are one with all of them, with all rules and reductions if whole."""
    assert len(on_two_ranks(_check, tmp_path, whole)) == 2
