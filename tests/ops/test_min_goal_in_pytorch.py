"""Test min_goal_loss in PyTorch: compile, opcheck, syncs, poison, threads, instruction sets, bad input."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import ConstraintTable, Minimize, min_goal_loss
from tests.support.goals import REDUCTIONS, SIX, grad_of, leaf
from tests.support.processes import run_on_instruction_set, run_tests
from tests.support.servers import COMPILED, servers
from tests.support.syncs import CountSyncs

IMPLS = pytest.mark.parametrize("server", servers("min_goal"))


def goals_of(batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(torch.rand(batch), dtype, device) for _ in range(5)] + [leaf(torch.tensor(0.3), dtype, device)]


@COMPILED
@pytest.mark.parametrize("reduction", range(4))
@pytest.mark.parametrize("matrix", [False, True])
def test_opcheck(reduction: int, matrix: bool) -> None:
    goals = [leaf(torch.rand(8, 6), torch.float32, "cpu")] if matrix else goals_of(8)
    table = ConstraintTable(SIX)
    for op in (torch.ops.bomkern.min_goal.default, torch.ops.bomkern.min_goal.stats):
        torch.library.opcheck(op, (goals, table.params, table.curves, reduction))
        torch.library.opcheck(op, (goals, None, [], reduction))
    _, winner, slope = torch.ops.bomkern.min_goal([g.detach() for g in goals], None, [], reduction)
    grad = torch.rand(8) if reduction == 0 else torch.rand(())
    index, dim = ([0], [2]) if matrix else ([1, 3, 5], [1, 1, 0])
    dtype = [2] * len(index)  # float32
    arguments = (grad, winner, slope, 8, 6, index, dim, dtype, reduction)
    torch.library.opcheck(torch.ops.bomkern.min_goal_backward.default, arguments)


@COMPILED
def test_bad_input_of_the_backward_op_is_named() -> None:
    """The op refuses bad arguments, including those that would read or write outside of a tensor."""
    back = torch.ops.bomkern.min_goal_backward
    winner, slope, grad = torch.zeros(3, dtype=torch.uint8), torch.ones(3), torch.ones(())
    good = dict(grad=grad, winner=winner, slope=slope, batch=3, goals=2, index=[0], dim=[1], dtype=[2], reduction=1)
    for wrong, text in (
        (dict(batch=100_000), "^winner must have shape"),
        (dict(batch=0), "^batch must be at least 1"),
        (dict(goals=65), "^goals must be 1 to 64"),
        (dict(winner=winner[:2]), "^winner must have shape"),
        (dict(winner=torch.zeros(6, dtype=torch.uint8)[::2]), "^winner must be contiguous"),
        (dict(slope=slope[:2]), "^slope must have shape"),
        (dict(grad=slope), "^grad must have shape"),
        (dict(reduction=0), "^grad must have shape"),
        (dict(reduction=0, grad=torch.ones(2)), "^grad must have shape"),
        (dict(reduction=3), "^winner must have shape"),
        (dict(reduction=4), "^reduction must be 0 to 3"),
        (dict(index=[2]), "^index must be below 2"),
        (dict(dim=[3]), "^dim must be 0 to 2"),
        (dict(dim=[2, 1], index=[0, 1], dtype=[2, 2]), "^dim must be 2 for one gradient alone"),
        (dict(dtype=[4]), "^dtype must be 0 to 3"),
        (dict(dtype=[]), "^index, dim and dtype"),
    ):
        with pytest.raises(ValueError, match=text):
            back(**{**good, **wrong})
    for wrong, text in (
        (dict(winner=winner.long()), "^winner must be Byte"),
        (dict(grad=grad.double()), "^grad must be Float"),
        (dict(slope=slope.half()), "^slope must be Float or Double"),
    ):
        with pytest.raises(TypeError, match=text):
            back(**{**good, **wrong})
    assert back(**good)[0].tolist() == pytest.approx([1 / 3] * 3)


@COMPILED
def test_a_winner_that_is_no_goal_gets_nothing() -> None:
    winner, ones = torch.tensor([0, 255, 2], dtype=torch.uint8), torch.ones(3)
    (matrix,) = torch.ops.bomkern.min_goal_backward(ones, winner, ones, 3, 2, [0], [2], [2], 0)
    assert matrix.tolist() == [[1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("impl", ["reference", None])
def test_curves_without_params_are_refused(impl: str | None) -> None:
    with pytest.raises(ValueError, match=r"^curves must be empty where params is None"):
        bomkern.dispatch.select.resolve("min_goal", "cpu", impl)([torch.rand(3), torch.rand(3)], None, [0], 1, False)


@IMPLS
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("inductor", None)])
def test_compile_fullgraph(server: tuple[str, str], backend: str, dynamic: bool | None) -> None:
    impl, device = server
    if impl == "reference":
        impl_name: str | None = "reference"
    else:
        impl_name = None
    torch._dynamo.reset()

    def step(goals: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats = min_goal_loss([g * 1.1 for g in goals], SIX, return_stats=True, impl=impl_name)
        return loss * 2, stats.share, stats.bottleneck

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (64, 96):
        ours, theirs = goals_of(batch, device), []
        theirs = [g.detach().clone().requires_grad_() for g in ours]
        got, want = compiled(ours), step(theirs)
        got[0].backward()
        want[0].backward()
        assert torch.allclose(got[0], want[0], rtol=1e-6) and torch.equal(got[2], want[2])
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(grad_of(a), grad_of(b), rtol=1e-5)


@IMPLS
def test_compile_with_a_table_sees_changes(server: tuple[str, str]) -> None:
    impl, device = server
    torch._dynamo.reset()
    table = ConstraintTable([Minimize(1.0)], device=device)
    compiled = torch.compile(lambda x: min_goal_loss([x], table, impl=impl), fullgraph=True)
    x = torch.full((4,), 3.0, device=device)
    assert compiled(x).item() == 3
    table[0] = Minimize(2.0)
    assert compiled(x).item() == 1.5


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_host_sync(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    table = ConstraintTable(SIX, device=device)
    for constraints in (None, SIX, table):
        with CountSyncs() as counter:
            loss, _ = min_goal_loss(
                goals_of(32, device), constraints, reduction=reduction, return_stats=True, impl=impl
            )
            loss.sum().backward()
        assert not counter.seen


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_element_is_written(server: tuple[str, str], reduction: str) -> None:
    """Fresh buffers are filled with NaN or the largest integer, and no result contains the filling."""
    impl, device = server
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        for batch in (1, 33, 9000):
            goals = goals_of(batch, device)
            loss, stats = min_goal_loss(goals, SIX, reduction=reduction, return_stats=True, impl=impl)
            loss.sum().backward()
            for t in (loss, stats.share, stats.level, *map(grad_of, goals)):
                assert t.isfinite().all()  # type: ignore[union-attr]
            assert (stats.bottleneck < 6).all()
            x = leaf(torch.rand(batch, 6), torch.float32, device)
            min_goal_loss(x, SIX, reduction=reduction, impl=impl).sum().backward()
            assert x.grad.isfinite().all()  # type: ignore[union-attr]
    finally:
        torch.use_deterministic_algorithms(False)


def test_same_bits_at_any_number_of_threads() -> None:
    goals = goals_of(100_000)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for g in goals:
                g.grad = None
            loss, stats = min_goal_loss(goals, SIX, reduction="sum", return_stats=True)
            loss.backward()
            results.append([loss, *stats, *map(grad_of, goals)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@COMPILED
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_other_instruction_sets(simd: str) -> None:
    """Run the oracle tests on the narrower vectors of other CPUs."""
    run_on_instruction_set(
        simd, "tests/ops/test_min_goal.py", "cpu-cpu and (oracle or layouts or nan or infeasible or dtypes)"
    )


@COMPILED
def test_forward_mode_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: min_goal_loss(x), (torch.rand(3, 2),), (torch.rand(3, 2),))


@IMPLS
def test_backward_twice_needs_retain_graph(server: tuple[str, str]) -> None:
    impl, device = server
    x = leaf(torch.rand(5, 6), torch.float32, device)
    loss = min_goal_loss(x, SIX, impl=impl)
    loss.backward(retain_graph=True)
    first = x.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert torch.equal(x.grad, 2 * first)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


BAD = [
    (lambda: {"goals": torch.rand(2, 3, 4)}, ValueError, "goals"),
    (lambda: {"goals": torch.tensor(0.5)}, ValueError, "goals"),
    (lambda: {"goals": torch.rand(0, 4)}, ValueError, "goals"),
    (lambda: {"goals": torch.rand(4, 0)}, ValueError, "goals"),
    (lambda: {"goals": torch.rand(0)}, ValueError, "goals"),
    (lambda: {"goals": torch.rand(4, 65)}, ValueError, "goals"),
    (lambda: {"goals": [torch.rand(3)] * 65}, ValueError, "goals"),
    (lambda: {"goals": []}, ValueError, "goals"),
    (lambda: {"goals": None}, TypeError, "goals"),
    (lambda: {"goals": {"a": torch.rand(3)}}, TypeError, "goals"),
    (lambda: {"goals": 0.5}, TypeError, "goals"),
    (lambda: {"goals": [0.5, 0.2]}, TypeError, r"goals\[0\]"),
    (lambda: {"goals": [torch.rand(3), 0.2]}, TypeError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3), None]}, TypeError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3), torch.rand(4)]}, ValueError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3), torch.rand(1)]}, ValueError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3), torch.rand(3, 1)]}, ValueError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3, 2)]}, ValueError, r"goals\[0\]"),
    (lambda: {"goals": [torch.rand(3), torch.arange(3)]}, TypeError, r"goals\[1\]"),
    (lambda: {"goals": torch.ones(3, 2, dtype=torch.bool)}, TypeError, r"goals\[0\]"),
    (lambda: {"goals": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, r"goals\[0\]"),
    (lambda: {"goals": [torch.rand(3), torch.rand(3, device="meta")]}, ValueError, r"goals\[1\]"),
    (lambda: {"goals": [torch.rand(3), torch.rand(3).to_sparse()]}, TypeError, r"goals\[1\]"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": 2.0}, TypeError, "constraints"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": [Minimize(1.0)]}, ValueError, "constraints"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": [Minimize(1.0), 2.0]}, TypeError, r"constraints\[1\]"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": [Minimize, Minimize]}, TypeError, r"constraints\[0\]"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": ConstraintTable([Minimize(1.0)])}, ValueError, "constraints"),
    (lambda: {"goals": torch.rand(3, 2), "constraints": ConstraintTable(SIX[:2], "meta")}, ValueError, "params"),
    (lambda: {"goals": torch.rand(3, 2), "reduction": "average"}, ValueError, "reduction"),
    (lambda: {"goals": torch.rand(3, 2), "reduction": None}, ValueError, "reduction"),
    (lambda: {"goals": torch.rand(3, 2), "reduction": ["mean"]}, ValueError, "reduction"),
    (lambda: {"goals": torch.rand(3, 2), "impl": "fast"}, ValueError, "impl"),
]


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize(("make", "error", "names"), BAD)
def test_bad_input_is_named(impl: str | None, make: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        min_goal_loss(**{"impl": impl, **make()})


def random_call(rng: random.Random) -> dict[str, Any]:
    """Draw a call with about one error, or none."""
    batch, count = rng.choice([0, 1, 3, 8]), rng.choice([0, 1, 2, 5, 64, 65])
    dtypes = [torch.float32, torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64]

    def goal() -> Any:
        x = torch.rand(batch) * 2
        if rng.random() < 0.1 and batch:
            x[rng.randrange(batch)] = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
        if rng.random() < 0.1:
            x = x.to(rng.choice(dtypes))
        wrong = [torch.rand(batch, 2), torch.rand(batch + 1), torch.rand(batch, device="meta"), 0.5, None, "x"]
        return rng.choice(wrong) if rng.random() < 0.05 else x

    constraint: Any = Minimize(0.5)
    constraints = rng.choice([None, constraint, [constraint] * count, [constraint] * 2, "x", [None] * count])
    goals: Any = [goal() for _ in range(count)]
    if rng.random() < 0.3:
        goals = rng.choice([torch.rand(batch, count), torch.rand(batch), torch.rand(1, batch, count), torch.rand(())])
    return {"goals": goals, "constraints": constraints, "reduction": rng.choice([*REDUCTIONS, "x", 3])}


@pytest.mark.parametrize("impl", ["reference", None])
def test_a_thousand_random_calls(impl: str | None) -> None:
    """Each call gives the documented result, or a ValueError or TypeError that names an argument; none crashes."""
    rng = random.Random(0)
    outcome: Counter[str] = Counter()
    for _ in range(1000):
        call = random_call(rng)
        try:
            loss, stats = min_goal_loss(**call, return_stats=True, impl=impl)
        except (ValueError, TypeError) as error:
            assert any(name in str(error) for name in ("goals", "constraints", "reduction", "params")), error
            outcome[type(error).__name__] += 1
        else:
            assert bool(stats.finite) == bool(loss.isfinite().all())
            outcome["ok"] += 1
    assert outcome["ok"] > 100 and outcome["ValueError"] > 100 and outcome["TypeError"] > 50, outcome
    for bad in (lambda: Minimize(-0.5), lambda: bomkern.Box(1.0, 0.0)):
        with pytest.raises(ValueError):
            bad()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_graph_replay_sees_a_changed_scale() -> None:
    table = ConstraintTable([Minimize(1.0)] * 3, device="cuda")
    x = torch.full((100, 3), 4.0, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        loss = min_goal_loss(x, table)
        assert isinstance(loss, Tensor)
        return loss, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    for scale in (1.0, 2.0, 8.0):
        for k in range(3):
            table[k] = Minimize(scale)
        graph.replay()
        assert loss.item() == 4 / scale and grad[:, 0].sum().item() == pytest.approx(1 / scale)


@pytest.mark.slow
def test_triton_passes_the_same_oracle_tests() -> None:
    """Run tests/ops/test_min_goal.py on Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton")
    run_tests(
        "tests/ops/test_min_goal.py",
        "triton-cpu and not properties and not 20000 and not gradcheck",
        TRITON_INTERPRET="1",
    )
