"""Test the op goal_set with given multipliers: every implementation against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bomkern import ConstraintTable, Minimize
from bomkern.dispatch import select
from bomkern.reference import record_parts
from tests.support.goal_set_op import (
    BAD,
    EACH_GROUPING,
    GROUPINGS,
    KERNELS,
    Places,
    call,
    check,
    check_places,
    goals_of,
    numbers,
    raw_values,
    run,
)
from tests.support.goals import LAYOUTS, REDUCTIONS, SIX
from tests.support.processes import run_tests
from tests.support.servers import COMPILED, only_cpu, servers
from tests.support.syncs import CountSyncs

IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
GROUPS = GROUPINGS["grouped"]
THREE = [0.5, 0.0, 0.5]
WEIGHTS = (0.4, 0.05, 0.0, 0.25, 0.2, 0.1)


def weights_of(groups: list[int]) -> list[float]:
    return list(WEIGHTS[: max(groups) + 1])


def some_of(groups: Sequence[int], *, total: float = 1.0) -> list[float]:
    """Return a multiplier for each goal; every third multiplier is 0 if there are enough goals."""
    some = [(1.0 + g % 4) * (g % 3 != 1) for g in range(groups[-1] + 1)]
    return [total * x / sum(some) for x in some]


@IMPLS
@EACH_GROUPING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [1, 17, 513, 9000])
def test_oracle(server: tuple[str, str], batch: int, reduction: str, groups: list[int]) -> None:
    raw = [*raw_values(batch)[:5], torch.tensor(0.31)]
    check(raw, server, groups=groups, reduction=reduction, multipliers=weights_of(groups))


@IMPLS
def test_is_the_weighted_sum_whatever_the_temperature(server: tuple[str, str]) -> None:
    impl, device = server
    raw = [x.to(device) for x in raw_values(40, 3)]
    weights = [0.5, 0.25, 0.25]
    how: dict[str, Any] = {"constraints": [Minimize(2.0, 0.1)] * 3, "multipliers": weights}
    want = sum(w * (x.double() - 0.1).mean() / 2 for w, x in zip(weights, raw, strict=True))
    for mu in (0.0, 0.3):
        loss, bottleneck, record = call(raw, impl, mu=mu, **how)
        assert float(loss) == pytest.approx(float(want), rel=1e-6)
        assert torch.equal(bottleneck, torch.stack(raw).argmax(0))
        assert torch.equal(record_parts(record, 3, 3)["share"].cpu(), torch.tensor(weights))


@IMPLS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 2])  # a weighted goal, and one with multiplier 0
def test_what_is_not_finite(server: tuple[str, str], value: float, column: int) -> None:
    """A sample whose worst deficit or loss is not finite has no gradient, and its bottleneck has the whole share."""
    impl, device = server
    raw = raw_values(9, 3)
    raw[column][4] = value
    how: dict[str, Any] = {"constraints": [Minimize(1.0)] * 3, "multipliers": [0.5, 0.5, 0.0], "reduction": "none"}
    got, grads = run(raw, impl, device=device, pull=torch.ones_like, **how)
    want, wanted = run(raw, "reference", dtype=torch.float64, pull=torch.ones_like, **how)
    assert torch.allclose(got[0].cpu().double(), want[0], rtol=1e-6, equal_nan=True)
    assert torch.equal(got[1].cpu(), want[1])
    assert all(torch.allclose(g.cpu().double(), w, rtol=1e-6) for g, w in zip(grads, wanted, strict=True))
    names = record_parts(got[2].cpu().double(), 3, 3), record_parts(want[2], 3, 3)
    assert torch.allclose(names[0]["share"], names[1]["share"], atol=1e-6)
    assert float(names[0]["finite"]) == float(names[1]["finite"]) == 0
    assert all(float(g[4]) == 0 and float(g[5]) == 0.5 for g in grads[:2])


@IMPLS
@EACH_GROUPING
@EACH_REDUCTION
@pytest.mark.parametrize("places", BAD)
def test_any_sum_and_what_is_not_finite(
    server: tuple[str, str], places: Places, reduction: str, groups: list[int]
) -> None:
    """Loss and gradient use the multipliers as given; the record's shares are their fractions of the sum."""
    for total in (0.3, 7.0):
        how: dict[str, Any] = {"groups": groups, "reduction": reduction, "multipliers": some_of(groups, total=total)}
        check(raw_values(33), server, **how)
        check_places(raw_values(33), server, places, **how)


@IMPLS
@pytest.mark.parametrize("count", [1, 2, 9, 33, 64])
def test_number_of_goals(server: tuple[str, str], count: int) -> None:
    constraints = [SIX[k % 6] for k in range(count)]
    for groups in (range(count), [k // 3 for k in range(count)]):
        how: dict[str, Any] = {"constraints": constraints, "groups": groups, "multipliers": some_of(groups)}
        check(raw_values(50, count), server, **how)
        check(raw_values(50, count), server, lay=lambda g: torch.stack(g, 1), reduction="min", **how)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str, dtype: torch.dtype) -> None:
    for batch, name in ((70, "grouped"), (72, "alone")):
        groups = GROUPINGS[name]
        check(raw_values(batch, dtype=dtype), server, lay=LAYOUTS[layout], groups=groups, multipliers=some_of(groups))


@IMPLS
@EACH_REDUCTION
def test_float64_and_mixed_dtypes(server: tuple[str, str], reduction: str) -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for dtypes in (kinds, [torch.float64] * 6, kinds[:3] * 2):
        raw = [x.to(t) for x, t in zip(raw_values(100), dtypes, strict=True)]
        check(raw, server, groups=GROUPS, reduction=reduction, multipliers=some_of(GROUPS, total=2.0))


@IMPLS
@settings(max_examples=40)
@given(
    rows=numbers,
    some=st.lists(st.floats(0, 4, width=16), min_size=6, max_size=6),
    mu=st.sampled_from([0.0, 0.5, math.nan]),
)
def test_properties(server: tuple[str, str], rows: list[list[float]], some: list[float], mu: float) -> None:
    """The mean loss is the sum of multipliers times the record's deficits.

    Neither the loss nor a share depends on mu.
    """
    impl, device = server
    columns = list(torch.tensor(rows, device=device).unbind(1))
    for groups in GROUPINGS.values():
        goals = groups[-1] + 1
        multipliers = some[:goals]
        loss, bottleneck, record = call(columns, impl, groups=groups, mu=mu, multipliers=multipliers)
        parts = record_parts(record, goals, 6)
        want = sum(w * d for w, d in zip(multipliers, parts["deficit"].tolist(), strict=True))
        assert float(loss) == pytest.approx(want, rel=1e-4, abs=1e-4)
        total = sum(multipliers) or 1.0
        assert parts["share"].tolist() == pytest.approx([w / total for w in multipliers], abs=1e-6)
        _, plain, other = call(columns, impl, groups=groups)
        assert torch.equal(bottleneck, plain)
        for name in ("level", "deficit", "raw", "highest", "ideal", "slope"):
            assert torch.equal(parts[name], record_parts(other, goals, 6)[name]), name


@IMPLS
def test_all_on_one_goal_is_that_goal(server: tuple[str, str]) -> None:
    impl, device = server
    raw = raw_values(40)
    for g in range(3):
        one = [float(g == other) for other in range(3)]
        (loss, _, record), grads = run(raw, impl, device=device, groups=GROUPS, multipliers=one, reduction="none")
        own = [k for k in range(6) if GROUPS[k] == g]
        mine = ([raw[k] for k in own], [SIX[k] for k in own])
        (alone, _, _), pull = run(
            mine[0], impl, device=device, groups=[0] * len(own), constraints=mine[1], reduction="none"
        )
        torch.testing.assert_close(loss, alone)
        assert record[:3].tolist() == one
        torch.testing.assert_close([grads[k] for k in own], list(pull))
        assert not any(grads[k].any() for k in range(6) if k not in own)


@IMPLS
@EACH_REDUCTION
def test_a_goal_of_multiplier_0_adds_nothing_though_it_is_the_bottleneck(
    server: tuple[str, str], reduction: str
) -> None:
    impl, device = server
    raw = [torch.linspace(0.1, 0.6, 20), torch.full((20,), 1e30), torch.linspace(0.5, 0.2, 20)]
    how: dict[str, Any] = {"constraints": [Minimize(0.5)] * 3, "multipliers": THREE, "reduction": reduction}
    check(raw, server, **how)
    (loss, bottleneck, record), grads = run(raw, impl, device=device, **how)
    assert bottleneck.unique().tolist() == [1] and record[:3].tolist() == THREE
    assert loss.isfinite().all() and loss.abs().max() < 100 and record[-1] == 1
    assert not grads[1].any() and grads[0].any() and grads[2].any()
    (loss, _, record), grads = run(raw, impl, device=device, **{**how, "multipliers": [0.0] * 3})
    assert not loss.any() and not record[:3].any() and not any(g.any() for g in grads)


@IMPLS
@EACH_REDUCTION
def test_a_weighted_sum_that_overflows_has_no_gradient(server: tuple[str, str], reduction: str) -> None:
    """All deficits are finite, but the loss of sample 1 is infinite with either sign.

    The bottleneck takes its share.
    """
    impl, device = server
    for value, want in ((1e30, math.inf), (-1e30, -math.inf)):
        raw = [torch.tensor([0.5, value, 0.5]), torch.tensor([0.5, 2.0, 0.5])]
        how: dict[str, Any] = {"constraints": [Minimize(1.0)] * 2, "multipliers": [3e9, 1e9]}
        (loss, bottleneck, record), grads = run(
            raw, impl, device=device, reduction=reduction, pull=torch.ones_like, **how
        )
        parts, first = record_parts(record, 2, 2), int(value < 0)
        assert bottleneck.tolist() == [0, first, 0] and parts["finite"] == 0
        worst = reduction == "min" and value > 0
        share = [0.75, 0.25] if reduction == "min" else [(1.5 + 1 - first) / 3, (0.5 + first) / 3]
        assert parts["share"].tolist() == pytest.approx([1, 0] if worst else share)
        assert (loss[1] if reduction == "none" else loss).item() == (2e9 if reduction == "min" and not worst else want)
        part = 1 / 3 if reduction == "mean" else 1.0
        taken = [0.0] * 3 if worst else [1.0, 0.0, 0.0] if reduction == "min" else [part, 0.0, part]
        for grad, multiplier in zip(grads, how["multipliers"], strict=True):
            assert grad.tolist() == pytest.approx([multiplier * x for x in taken], rel=1e-6)


@IMPLS
def test_without_them_finite_is_the_worst_deficits(server: tuple[str, str]) -> None:
    """Without multipliers, the finite flag follows the worst deficit, not the smoothed loss.

    A large mu makes the smoothed loss infinite.
    """
    raw = [torch.ones(3) for _ in range(6)]
    loss, _, record = call([x.to(server[1]) for x in raw], server[0], constraints=[Minimize(1.0)] * 6, mu=3e38)
    assert loss.item() == math.inf and record[-1] == 1


@IMPLS
@EACH_GROUPING
@EACH_REDUCTION
def test_gradcheck(server: tuple[str, str], reduction: str, groups: list[int]) -> None:
    impl, device = server
    raw = [x.double().add(0.05).to(device).requires_grad_() for x in raw_values(7)[:5]]
    raw.append(torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True))
    how: dict[str, Any] = {"groups": groups, "reduction": reduction, "multipliers": some_of(groups)}
    assert torch.autograd.gradcheck(lambda *g: call(g, impl, **how)[0], raw)


@only_cpu("goal_set")
@EACH_REDUCTION
def test_same_bits_at_any_number_of_threads(reduction: str) -> None:
    raw = [*raw_values(50_000)[:5], torch.tensor(0.3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, grads = run(raw, "cpu", groups=GROUPS, multipliers=THREE, reduction=reduction)
            results.append([*out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@IMPLS
@EACH_REDUCTION
def test_every_element_is_written(server: tuple[str, str], reduction: str) -> None:
    """Fresh buffers are filled with NaN or the largest integer, and no result contains the filling."""
    impl, device = server
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for batch in (1, 33, 5000):
            for lay in (list, lambda g: [torch.stack([*g[:5], g[0]], 1)]):
                leaves = goals_of(batch, device)
                how: dict[str, Any] = {"groups": GROUPS, "multipliers": THREE, "reduction": reduction}
                loss, bottleneck, record = call(lay(leaves), impl, **how)
                grads = torch.autograd.grad(loss.sum(), leaves[:5])
                assert all(x.isfinite().all() for x in (loss, record, *grads))
                assert ((bottleneck >= 0) & (bottleneck < 3)).all()
    finally:
        torch.use_deterministic_algorithms(False)


@COMPILED
@pytest.mark.parametrize("reduction", range(4))
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(matrix: bool, reduction: int, save: bool) -> None:
    table = ConstraintTable(SIX)
    goals = [torch.rand(8, 6).requires_grad_()] if matrix else goals_of(8)
    if not save:
        goals = [g.detach() for g in goals]
    arguments = (goals, table.params, table.curves, GROUPS, torch.tensor(0.2), reduction)
    given = {"save": save, "multipliers": torch.tensor(THREE)}
    torch.library.opcheck(torch.ops.bomkern.goal_set.default, arguments, given)


@KERNELS
def test_fakes_match_what_runs(server: tuple[str, str]) -> None:
    impl, device = server
    for reduction in REDUCTIONS:
        real = goals_of(8, device)
        how: dict[str, Any] = {"groups": GROUPS, "reduction": reduction, "multipliers": THREE}
        out, plain = call(real, impl, **how), [x.detach() for x in real]
        with FakeTensorMode() as mode:
            made = call([mode.from_tensor(x).requires_grad_() for x in plain], impl, **how)
        for a, b in zip(out, made, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@KERNELS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph_that_sees_changed_multipliers(server: tuple[str, str], backend: str) -> None:
    impl, device = server
    torch._dynamo.reset()
    table, mu, given = (
        ConstraintTable(SIX, device),
        torch.tensor(0.0, device=device),
        torch.tensor(THREE, device=device),
    )
    serve = select.resolve("goal_set", device, impl)

    def step(goals: list[Tensor]) -> tuple[Tensor, ...]:
        return serve([g * 1.1 for g in goals], table.params, table.curves, GROUPS, mu, 1, given)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (64, 96):
        given.copy_(given.roll(1))
        ours, theirs = goals_of(batch, device), goals_of(batch, device)
        got, want = compiled(ours), step(theirs)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(loss, goals) for loss, goals in ((got[0], ours), (want[0], theirs))]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@KERNELS
@EACH_REDUCTION
def test_no_host_sync(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    table, mu, given = (
        ConstraintTable(SIX, device),
        torch.tensor(0.1, device=device),
        torch.tensor(THREE, device=device),
    )
    goals, serve = goals_of(32, device), select.resolve("goal_set", device, impl)
    with CountSyncs() as counter:
        loss, _, _ = serve(goals, table.params, table.curves, GROUPS, mu, REDUCTIONS.index(reduction), given)
        loss.sum().backward()
    assert not counter.seen


@IMPLS
def test_multipliers_of_any_stride(server: tuple[str, str]) -> None:
    impl, device = server
    table, mu, goals = ConstraintTable(SIX, device), torch.tensor(0.0, device=device), goals_of(32, device)
    serve = select.resolve("goal_set", device, impl)
    wide = torch.tensor([[x, 9.0] for x in THREE], device=device)
    for strided, plain in ((wide[:, 0], THREE), (torch.tensor(0.25, device=device).expand(3), [0.25] * 3)):
        assert not strided.is_contiguous()
        got = serve(goals, table.params, table.curves, GROUPS, mu, 1, strided)
        want = serve(goals, table.params, table.curves, GROUPS, mu, 1, torch.tensor(plain, device=device))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@IMPLS
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.ones(5), ValueError, r"multipliers must have shape \[6\], got \[5\]"),
        (torch.ones(6, dtype=torch.float64), TypeError, "multipliers must be .* as params, got"),
        (torch.ones(()), ValueError, r"multipliers must have shape \[6\], got \[\]"),
        (torch.ones(6, 1), ValueError, r"^multipliers must have shape \[6\], got \[6, 1\]"),
        (torch.ones(6, dtype=torch.float16), TypeError, "^multipliers must be .* as params, got"),
        (torch.ones(6, device="meta"), ValueError, "^multipliers is on meta, params on .*: move it"),
    ],
)
def test_bad_multipliers_are_named(
    server: tuple[str, str], given: Tensor, error: type[Exception], message: str
) -> None:
    impl, device = server
    table, mu = ConstraintTable(SIX, device), torch.tensor(0.0, device=device)
    serve = select.resolve("goal_set", device, impl)
    goals = [x.to(device) for x in raw_values(8)]
    with pytest.raises(error, match=message):
        serve(goals, table.params, table.curves, list(range(6)), mu, 1, given if given.is_meta else given.to(device))


@COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_other_instruction_sets(simd: str) -> None:
    """Run the oracle tests on the narrower vectors of other CPUs."""
    selection = "cpu-cpu and (oracle or number or layouts or dtypes or finite or overflows)"
    run_tests("tests/ops/test_goal_set_multipliers.py", selection, BOMKERN_SIMD=simd)
