"""Test columns that are absent in some samples, for the op goal_set: every implementation against Python loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import ConstraintTable, Minimize
from bomkern.common.reductions import REDUCTIONS as CODES
from bomkern.dispatch import select
from bomkern.reference import counts_of, deficit, record_parts
from tests.support.goal_set_op import EACH_GROUPING, GROUPINGS, NAN, call, check, ramp, raw_values, run
from tests.support.goals import SIX
from tests.support.servers import servers, why_skipped

# Triton's interpreter warns about a mean of nothing, and about values that `where` discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SERVERS = servers("goal_set")
IMPLS = pytest.mark.parametrize("server", SERVERS)
REDUCTIONS = tuple(CODES)
RULES: dict[str, dict[str, Any]] = {
    "hard": {},
    "smooth": {"mu": 0.3},
    "weights": {"multipliers": [0.4, 0.0, 0.3, 0.2, 0.05, 0.05]},
}
EACH_RULE = pytest.mark.parametrize("rule", RULES)


def masks(batch: int, count: int = 6, share: float = 0.6) -> Tensor:
    """Return a mask in which some samples have no goal, and some goals (by GROUPINGS) are absent or whole."""
    generator = torch.Generator().manual_seed(batch + count)
    present = torch.rand(count, batch, generator=generator) < share
    present[:, ::5] = False
    return present


def rule_of(name: str, groups: Sequence[int]) -> dict[str, Any]:
    how = dict(RULES[name])
    if "multipliers" in how:
        how["multipliers"] = how["multipliers"][: groups[-1] + 1]
    return how


def by_loops(
    raw: Sequence[Tensor],
    present: Tensor,
    groups: Sequence[int],
    reduction: str,
    mu: float = 0.0,
    multipliers: Sequence[float] | None = None,
) -> tuple[Tensor, list[int], dict[str, list[float]], tuple[Tensor, ...]]:
    """Return (loss, bottleneck, record, gradients) in float64, by leaving out absent entries sample by sample."""
    table = ConstraintTable(SIX)
    params, codes = table.params.double(), torch.tensor(table.curves)
    leaves = [x.detach().double().requires_grad_() for x in raw]
    goals = groups[-1] + 1
    weights = None if multipliers is None else torch.tensor(multipliers).double().tolist()
    losses, bottleneck, shares = [], [], []
    deficits: list[list[Tensor]] = [[] for _ in range(goals)]
    for b in range(present.shape[1]):
        own: dict[int, Tensor] = {}
        for g in range(goals):
            members = [k for k in range(len(raw)) if groups[k] == g and present[k, b]]
            if members:
                values = [
                    deficit((leaves[k][b] if leaves[k].dim() else leaves[k]), params[k], codes[k]) for k in members
                ]
                own[g] = torch.stack(values).mean()
                deficits[g].append(own[g].detach())
        if not own:
            losses.append(None)
            bottleneck.append(-1)
            shares.append({})
            continue
        worst = max(own, key=lambda g: (own[g].item(), -g))
        bottleneck.append(worst)
        if weights is not None:
            losses.append(sum(weights[g] * d for g, d in own.items()))
            total = sum(weights[g] for g in own)
            shares.append({g: weights[g] / total if total else 0.0 for g in own})
        elif mu:
            stacked = torch.stack(list(own.values())) / mu
            losses.append(mu * stacked.logsumexp(0))
            shares.append(dict(zip(own, stacked.softmax(0).tolist(), strict=True)))
        else:
            losses.append(own[worst])
            shares.append({worst: 1.0})
    some = [b for b, loss in enumerate(losses) if loss is not None]
    zero = sum(x.sum() * 0 for x in leaves)
    nothing = torch.zeros((), dtype=torch.float64)
    every = torch.stack([nothing if loss is None else loss.double() for loss in losses]) + zero
    kept = every[some]
    share = [sum(s.get(g, 0.0) for s in shares) / max(len(some), 1) for g in range(goals)]
    if reduction == "min":
        at = max(some, key=lambda b: (every[b].item(), -b)) if some else 0
        loss, share = every[at], [shares[at].get(g, 0.0) for g in range(goals)]
    else:
        loss = {"mean": kept.sum() / max(len(some), 1), "sum": kept.sum(), "none": every}[reduction]
        if weights is not None:
            parts = [weights[g] * len(deficits[g]) for g in range(goals)]
            share = [part / sum(parts) if sum(parts) else 0.0 for part in parts]
    mean = lambda values: float(torch.stack(values).double().mean()) if values else NAN  # noqa: E731
    seen = [
        [x[b] if x.dim() else x for b in range(present.shape[1]) if present[k, b]]
        for k, x in enumerate(y.detach() for y in leaves)
    ]
    record = {
        "share": share,
        "level": [mean([torch.exp(-d).clamp(max=1) for d in ds]) for ds in deficits],
        "deficit": [mean(ds) for ds in deficits],
        "raw": [mean(values) for values in seen],
        "highest": [max((float(v) for v in values), default=-math.inf) for values in seen],
        "loss": [float(kept.detach().sum()) / max(len(some), 1) if reduction == "none" else float(loss.detach())],
        "finite": [1.0],
    }
    grads = torch.autograd.grad(loss, leaves, ramp(loss))
    return loss.detach(), bottleneck, record, grads


def poisoned(raw: Sequence[Tensor], present: Tensor) -> list[Tensor]:
    """Return the raw values with NaN or infinity wherever they are absent."""
    out = []
    for k, x in enumerate(raw):
        if x.dim() == 0:
            out.append(x)
        else:
            bad = torch.tensor([NAN, math.inf, -math.inf, 1e30])[torch.arange(len(x)) % 4].to(x)
            out.append(torch.where(present[k], x, bad))
    return out


def judge(
    raw: Sequence[Tensor], present: Tensor, server: tuple[str, str], groups: Sequence[int], reduction: str, **how: Any
) -> None:
    loss, bottleneck, record, grads = by_loops(raw, present, groups, reduction, **how)
    got, own = run(
        poisoned(raw, present), server[0], device=server[1], groups=groups, reduction=reduction, present=present, **how
    )
    torch.testing.assert_close(got[0].cpu().double(), loss, rtol=2e-6, atol=2e-6)
    assert got[1].tolist() == bottleneck
    parts = record_parts(got[2].cpu().double(), groups[-1] + 1, len(raw))
    for name, want in record.items():
        here = parts[name].reshape(-1)
        torch.testing.assert_close(
            here, torch.tensor(want).double(), rtol=2e-6, atol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    for k, (g, want) in enumerate(zip(own, grads, strict=True)):
        g = g.cpu().double()
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-6, msg=lambda m, k=k: f"gradient {k}: {m}")
        if g.dim():
            assert not g[~present[k]].any()


@IMPLS
@EACH_GROUPING
@EACH_RULE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_absent_entries_are_left_out(server: tuple[str, str], reduction: str, rule: str, groups: list[int]) -> None:
    for batch in (1, 17):
        raw = [*raw_values(batch)[:5], torch.tensor(0.31)]
        present = masks(batch)
        judge(raw, present, server, groups, reduction, **rule_of(rule, groups))
        only = torch.zeros_like(present)
        only[:, -1] = present[:, -1] = True
        judge(raw, present, server, groups, reduction, **rule_of(rule, groups))
        judge(raw, only, server, groups, reduction, **rule_of(rule, groups))  # one sample counts
        whole = torch.ones_like(present)
        whole[3:] = False  # columns that no sample has
        judge(raw, whole, server, groups, reduction, **rule_of(rule, groups))


@IMPLS
@EACH_GROUPING
@EACH_RULE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_goal_in_any_sample(server: tuple[str, str], reduction: str, rule: str, groups: list[int]) -> None:
    """The loss is 0 with a graph, and the record says that nothing was seen."""
    for batch in (5, 2500):
        none = torch.zeros(6, batch, dtype=torch.bool)
        raw = [torch.full((batch,), NAN) for _ in range(6)]
        how = rule_of(rule, groups)
        (loss, bottleneck, record), grads = run(
            raw, server[0], device=server[1], groups=groups, reduction=reduction, present=none, **how
        )
        assert not loss.any() and (bottleneck == -1).all() and not any(g.any() for g in grads)
        parts = record_parts(record.cpu(), groups[-1] + 1, 6)
        assert all(parts[name].isnan().all() for name in ("level", "deficit", "raw"))
        assert not parts["share"].any() and (parts["highest"] == -math.inf).all()
        assert parts["loss"] == 0 and parts["finite"] == 1


@IMPLS
@EACH_RULE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_large_batches(server: tuple[str, str], reduction: str, rule: str) -> None:
    """Batches of several blocks, chunks or programs, mixed dtypes and one matrix, against the reference in float64."""
    batch = 5003
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    raw = [x.to(t) for x, t in zip(raw_values(batch), kinds, strict=False)] + [torch.tensor(0.31)]
    present = masks(batch)
    present[2, :4200] = False  # a column that the first chunk never sees
    groups = GROUPINGS["grouped"]
    how = {"present": present, "reduction": reduction, "slack": 2e-6}
    check(raw, server, groups=groups, **how, **rule_of(rule, groups))
    groups = GROUPINGS["alone"]
    check(raw_values(batch), server, lay=lambda g: torch.stack(g, 1), groups=groups, **how, **rule_of(rule, groups))


@IMPLS
@EACH_GROUPING
@EACH_RULE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_present_is_no_mask(server: tuple[str, str], reduction: str, rule: str, groups: list[int]) -> None:
    for batch in (3, 700):
        raw = [*raw_values(batch)[:5], torch.tensor(0.31)]
        how = {"device": server[1], "groups": groups, "reduction": reduction, **rule_of(rule, groups)}
        plain, grads = run(raw, server[0], **how)
        masked, own = run(raw, server[0], present=torch.ones(6, batch, dtype=torch.bool), **how)
        for a, b in zip([*plain, *grads], [*masked, *own], strict=True):  # compilers contract products differently
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@IMPLS
@EACH_RULE
def test_present_entries_may_be_infinite(server: tuple[str, str], rule: str) -> None:
    raw, present = raw_values(33), masks(33)
    raw[1][7], raw[2][8], raw[0][11] = math.inf, NAN, NAN
    present[:, 7], present[:, 8] = True, torch.arange(6) == 2
    present[:, 11] = False
    for groups in GROUPINGS.values():
        how: dict[str, Any] = {"groups": groups, "reduction": "none", "present": present, **rule_of(rule, groups)}
        (loss, bottleneck, record), grads = run(raw, server[0], device=server[1], pull=torch.ones_like, **how)
        want, exact = run(raw, "reference", dtype=torch.float64, pull=torch.ones_like, **how)
        assert loss[7] == math.inf and loss[8].isnan() and loss[11] == 0 and record[-1] == 0
        torch.testing.assert_close(loss.cpu().double(), want[0], equal_nan=True, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(record.cpu().double(), want[2], equal_nan=True, rtol=1e-5, atol=1e-5)
        assert torch.equal(bottleneck.cpu(), want[1])
        for a, b in zip(grads, exact, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6)


@IMPLS
@EACH_RULE
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(server: tuple[str, str], reduction: str, rule: str) -> None:
    impl, device = server
    groups, present = GROUPINGS["grouped"], masks(7)
    raw = [x.double().add(0.05).to(device).requires_grad_() for x in raw_values(7)[:5]]
    raw.append(torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True))
    how = {"groups": groups, "reduction": reduction, "present": present, **rule_of(rule, groups)}
    assert torch.autograd.gradcheck(lambda *g: call(g, impl, **how)[0], raw)
    assert torch.autograd.gradgradcheck(lambda *g: call(g, impl, **how)[0], raw)


@IMPLS
def test_counts_of_several_processes(server: tuple[str, str]) -> None:
    """With counts of the whole batch, the results of its parts add up to those of the whole."""
    raw, present, groups = raw_values(30), masks(30), GROUPINGS["grouped"]
    counts = counts_of(present, groups, torch.float32)
    for rule in RULES:
        how = {"groups": groups, "counts": counts, **rule_of(rule, groups)}
        whole, grads = run(raw, server[0], device=server[1], present=present, pull=torch.ones_like, **how)
        halves = [
            run([x[at] for x in raw], server[0], device=server[1], present=present[:, at], pull=torch.ones_like, **how)
            for at in (slice(0, 11), slice(11, 30))
        ]
        torch.testing.assert_close(sum(half[0][0] for half in halves), whole[0])
        parts, *others = (record_parts(x[2], 3, 6) for x in (whole, halves[0][0], halves[1][0]))
        for name in ("share", "level", "deficit", "raw"):
            torch.testing.assert_close(sum(other[name] for other in others), parts[name])
        for k, grad in enumerate(grads):
            torch.testing.assert_close(torch.cat([half[1][k] for half in halves]), grad)


@IMPLS
def test_the_level_of_a_value_that_beats_its_ideal_is_1(server: tuple[str, str]) -> None:
    raw = [torch.tensor([-1.0, -3.0, 0.5]), torch.tensor([-1e30, 0.0, 0.0])]
    for present in (None, torch.tensor([[True, True, False], [True, False, True]])):
        _, _, record = call([x.to(server[1]) for x in raw], server[0], constraints=[Minimize(0.5)] * 2, present=present)
        level = record_parts(record.cpu(), 2, 2)["level"]
        want = [(2 + math.exp(-1)) / 3, 1.0] if present is None else [1.0, 1.0]
        assert level.tolist() == pytest.approx(want)


@IMPLS
def test_invalid_masks(server: tuple[str, str]) -> None:
    raw, mask = [x.to(server[1]) for x in raw_values(4)], torch.ones(6, 4, dtype=torch.bool)
    for present, counts, kind, message in (
        (mask.float(), torch.ones(13), TypeError, "present must be torch.bool"),
        (mask[:5], torch.ones(13), ValueError, r"present must have shape \[6, 4\]"),
        (mask[:, :3], torch.ones(13), ValueError, r"present must have shape \[6, 4\]"),
        (mask, torch.ones(12), ValueError, r"counts must have shape \[13\]"),
    ):
        with pytest.raises(kind, match=message):
            call(raw, server[0], present=present, counts=counts)
    serve = select.resolve("goal_set", server[1], server[0])
    table = ConstraintTable(SIX, server[1])
    common = (raw, table.params, table.curves, list(range(6)), torch.tensor(0.0, device=server[1]), 1)
    with pytest.raises(ValueError, match="present and counts must be given together"):
        serve(*common, present=mask.to(server[1]))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_opcheck(impl: str) -> None:
    reason = why_skipped("goal_set", impl, "cpu")
    if reason is not None:
        pytest.skip(reason)
    raw = [x.requires_grad_() for x in raw_values(9)]
    present, groups = masks(9), GROUPINGS["grouped"]
    table = ConstraintTable(SIX)
    counts = counts_of(present, groups, torch.float32)
    arguments = (raw, table.params, table.curves, groups, torch.tensor(0.2), 1)
    if impl == "cpu":
        options = {"save": True, "present": present, "counts": counts}
        torch.library.opcheck(torch.ops.bomkern.goal_set.default, arguments, options)
    else:
        torch.library.opcheck(torch.ops.bomkern.goal_set_triton.default, (*arguments, None, present, counts, True))
