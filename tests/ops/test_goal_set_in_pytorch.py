"""Test the op goal_set in PyTorch: compile, opcheck, syncs, poison, autograd's rules, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bomkern import ConstraintTable
from bomkern.dispatch import select
from bomkern.reference import RecordAt
from tests.support.goal_set_op import GROUPINGS, KERNELS, call, goals_of, raw_values, run
from tests.support.goals import REDUCTIONS, SIX
from tests.support.processes import run_on_instruction_set, run_tests
from tests.support.servers import COMPILED, servers
from tests.support.syncs import CountSyncs

IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
GROUPS = GROUPINGS["grouped"]


@COMPILED
@pytest.mark.parametrize("reduction", range(4))
@pytest.mark.parametrize("matrix", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(matrix: bool, reduction: int, save: bool) -> None:
    table, mu = ConstraintTable(SIX), torch.tensor(0.2)
    goals = [torch.rand(8, 6).requires_grad_()] if matrix else goals_of(8)
    if not save:
        goals = [g.detach() for g in goals]
    arguments = (goals, table.params, table.curves, GROUPS, mu, reduction)
    torch.library.opcheck(torch.ops.bomkern.goal_set.default, arguments, {"save": save})
    if save:
        loss, _, _, weight = torch.ops.bomkern.goal_set([g.detach() for g in goals], *arguments[1:], save=True)
        index, dim = ([0], [2]) if matrix else ([1, 3, 5], [1, 1, 0])
        pull = (torch.rand(loss.shape), weight, index, dim, [2] * len(index))
        torch.library.opcheck(torch.ops.bomkern.goal_set_backward.default, pull)


@KERNELS
def test_fakes_match_what_runs(server: tuple[str, str]) -> None:
    impl, device = server
    for reduction in REDUCTIONS:
        real = goals_of(8, device)
        out, plain = call(real, impl, groups=GROUPS, reduction=reduction), [x.detach() for x in real]
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x).requires_grad_() for x in plain]
            made = call(fakes, impl, groups=GROUPS, reduction=reduction)
        for a, b in zip(out, made, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert out[2].shape == (RecordAt.of(3, 6).size,)


@COMPILED
def test_weight_is_made_only_where_it_is_asked_for() -> None:
    table, mu = ConstraintTable(SIX), torch.tensor(0.0)
    goals = goals_of(8)

    def weight(given: list[Tensor], **save: bool) -> Tensor:
        return torch.ops.bomkern.goal_set(given, table.params, table.curves, GROUPS, mu, 1, **save)[3]

    plain = [g.detach() for g in goals]
    assert weight(goals).shape == weight(plain, save=True).shape == (6, 8)
    assert weight(plain).shape == (0,)
    with torch.no_grad():
        assert weight(goals).shape == (0,)
    assert torch.equal(weight(goals), weight(plain, save=True)) and not weight(goals).requires_grad


@KERNELS
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.slow)],  # a second B makes B symbolic
)
def test_compile_fullgraph(server: tuple[str, str], backend: str, dynamic: bool | None) -> None:
    """The compiled graph serves changing batches, and a temperature and constraints that change on the device."""
    impl, device = server
    torch._dynamo.reset()
    table, mu = ConstraintTable(SIX, device), torch.tensor(0.0, device=device)
    serve = select.resolve("goal_set", device, impl)

    def step(goals: list[Tensor]) -> tuple[Tensor, ...]:
        loss, bottleneck, record = serve([g * 1.1 for g in goals], table.params, table.curves, GROUPS, mu, 1)
        return loss * 2, bottleneck, record

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch, temperature in ((64, 0.0), (96, 0.0), (96, 0.3)):
        mu.fill_(temperature)
        table.params[0, 0] += 0.01
        ours, theirs = goals_of(batch, device), goals_of(batch, device)
        got, want = compiled(ours), step(theirs)
        got[0].backward()
        want[0].backward()
        torch.testing.assert_close(got[0], want[0])
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[2], want[2])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@KERNELS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_host_sync(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    table, mu = ConstraintTable(SIX, device), torch.tensor(0.1, device=device)
    goals, serve = goals_of(32, device), select.resolve("goal_set", device, impl)
    with CountSyncs() as counter:
        loss, _, _ = serve(goals, table.params, table.curves, GROUPS, mu, REDUCTIONS.index(reduction))
        loss.sum().backward()
    assert not counter.seen


@IMPLS
@pytest.mark.parametrize("mu", [0.0, 0.2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_element_is_written(server: tuple[str, str], reduction: str, mu: float) -> None:
    """Fresh buffers are filled with NaN or the largest integer, and no result contains the filling."""
    impl, device = server
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        for batch in (1, 33, 9000):
            for lay in (list, lambda g: torch.stack([*g[:5], g[0]], 1)):
                raw = [*raw_values(batch)[:5], torch.tensor(0.3)]
                raw = raw if lay is list else raw[:5]
                groups = GROUPS
                leaves = [x.to(device).requires_grad_() for x in raw]
                goals = lay(leaves)
                goals = goals if isinstance(goals, list) else [goals]
                loss, bottleneck, record = call(goals, impl, groups=groups, mu=mu, reduction=reduction)
                grads = torch.autograd.grad(loss.sum(), leaves)
                assert all(x.isfinite().all() for x in (loss, record, *grads))
                assert ((bottleneck >= 0) & (bottleneck < 3)).all()
    finally:
        torch.use_deterministic_algorithms(False)


@IMPLS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_what_needs_a_gradient_gets_one(server: tuple[str, str], reduction: str) -> None:
    impl, device = server
    how: dict[str, Any] = {"groups": GROUPS, "mu": 0.2, "reduction": reduction}
    every = goals_of(40, device)
    want = torch.autograd.grad(call(every, impl, **how)[0].sum(), every)
    for chosen in ([2], [5], [0, 3, 5]):
        goals = [g if k in chosen else g.detach() for k, g in enumerate(every)]
        loss, _, record = call(goals, impl, **how)
        assert loss.requires_grad and not record.requires_grad
        got = torch.autograd.grad(loss.sum(), [every[k] for k in chosen])
        assert all(torch.equal(g, want[k]) for g, k in zip(got, chosen, strict=True))
    with torch.no_grad():
        assert not call(every, impl, **how)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(call(every, impl, **how)[0], loss)


@IMPLS
def test_a_weight_of_zero_stops_any_gradient(server: tuple[str, str]) -> None:
    impl, device = server
    x = torch.tensor([[float("inf"), 1.0], [0.5, 1.0]], device=device).requires_grad_()
    for lay in (lambda x: [x], lambda x: list(x.unbind(1))):
        loss, _, _ = call(lay(x), impl, constraints=SIX[:1] * 2, reduction="none")
        above = torch.tensor([float("nan"), 2.0], device=device)
        (grad,) = torch.autograd.grad(loss, x, above)
        assert grad.tolist() == [[0.0, 0.0], [0.0, 5.0]]


@IMPLS
def test_gradients_from_above_of_any_layout(server: tuple[str, str]) -> None:
    impl, device = server
    pulls = (
        lambda loss: loss.new_full((), 2.0).expand(loss.shape),
        lambda loss: torch.stack([loss.detach(), loss.detach() * 9], -1)[:, 0],
        lambda loss: loss.detach().flip(0),
    )
    for pull in pulls:
        how: dict[str, Any] = {"reduction": "none", "mu": 0.2, "pull": pull}
        for lay in (list, lambda g: torch.stack(g, 1)):
            _, got = run(raw_values(70), impl, device=device, lay=lay, **how)
            _, want = run(raw_values(70), "reference", **how)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-6)


@COMPILED
def test_forward_mode_is_refused() -> None:
    raw = raw_values(3)
    with pytest.raises(NotImplementedError, match="goal_set has no forward-mode"):
        torch.func.jvp(lambda x: call([*raw[:5], x], "cpu")[0], (raw[5],), (raw[5],))


@IMPLS
def test_backward_twice_needs_retain_graph(server: tuple[str, str]) -> None:
    impl, device = server
    goals = goals_of(5, device)
    loss, _, _ = call(goals, impl, mu=0.1)
    loss.backward(retain_graph=True)
    first = [g.grad.clone() for g in goals]
    loss.backward()
    assert all(torch.equal(g.grad, 2 * f) for g, f in zip(goals, first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@KERNELS
def test_autocast_changes_nothing(server: tuple[str, str]) -> None:
    impl, device = server
    want = run(raw_values(40), impl, device=device, mu=0.1)
    with torch.autocast(device, torch.bfloat16):
        got = run(raw_values(40), impl, device=device, mu=0.1)
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True))


V, T = ValueError, TypeError
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"goals": []}, V, "^goals must name"),
    ({"goals": [torch.rand(4, 0)]}, V, "^goals must name"),
    ({"goals": [torch.rand(3)] * 65}, V, "^goals must name"),
    ({"goals": [torch.rand(0)] * 2}, V, "^goals must hold"),
    ({"goals": [torch.rand(3), torch.rand(4)]}, V, r"^goals\[1\] has 4"),
    ({"goals": [torch.rand(3), torch.rand(3, 1)]}, V, r"^goals\[1\] must have shape"),
    ({"goals": [torch.rand(3), torch.arange(3)]}, T, r"^goals\[1\] must be float16"),
    ({"goals": [torch.rand(3), torch.rand(3, device="meta")]}, V, r"^goals\[1\] is on meta"),
    ({"goals": [torch.rand(3), torch.rand(3).to_sparse()]}, T, r"^goals\[1\] must be a dense"),
    ({"goals": [torch.rand(3), None]}, T, r"^goals\[1\] must be a tensor"),
    ({"goals": [torch.rand(3), torch.rand(3).double()]}, T, "^params must be"),
    ({"params": torch.rand(3, 4)}, V, r"^params must have shape \[2, 4\]"),
    ({"params": torch.rand(2, 4, device="meta")}, V, "^params is on meta"),
    ({"curves": [0]}, V, "^constraints must be one"),
    ({"groups": [0]}, V, "^groups must have one entry for each of the 2 columns, got 1"),
    ({"groups": [1, 2]}, V, "^groups must count up"),
    ({"groups": [0, 2]}, V, "^groups must count up"),
    ({"groups": [0, -1]}, V, "^groups must count up"),
    ({"temperature": torch.zeros(1)}, V, r"^temperature must have shape \[\], got \[1\]"),
    ({"temperature": torch.zeros((), dtype=torch.float64)}, T, "^temperature must be"),
    ({"temperature": torch.zeros((), device="meta")}, V, "^temperature is on meta"),
]


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize(("wrong", "error", "text"), BAD)
def test_bad_input_is_named(impl: str | None, wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    table = ConstraintTable(SIX[:2])
    good = {"goals": [torch.rand(3), torch.rand(3)], "params": table.params, "curves": table.curves, "groups": [0, 1]}
    arguments = {**good, "temperature": torch.tensor(0.1), **wrong}
    with pytest.raises(error, match=text):
        select.resolve("goal_set", "cpu", impl)(*arguments.values(), 1)


@COMPILED
def test_bad_input_of_the_backward_op_is_named() -> None:
    weight, grad = torch.rand(2, 3), torch.rand(())
    back = torch.ops.bomkern.goal_set_backward
    for arguments, text in (
        ((torch.rand(4), weight, [0], [1], [2]), "^grad must have shape"),
        ((torch.rand(3, 1), weight, [0], [1], [2]), "^grad must have shape"),
        ((grad, weight.t(), [0], [1], [2]), "^weight must be"),
        ((grad, weight[0], [0], [1], [2]), "^weight must be"),
        ((grad, weight, [2], [1], [2]), "^index must be below 2"),
        ((grad, weight, [0], [3], [2]), "^dim must be 0 to 2"),
        ((grad, weight, [0, 1], [2, 1], [2, 2]), "^dim must be 2 for one gradient alone"),
        ((grad, weight, [0], [1], [4]), "^dtype must be 0 to 3"),
        ((grad, weight, [0, 1], [1], [2]), "^index, dim and dtype"),
    ):
        with pytest.raises(ValueError, match=text):
            back(*arguments)
    with pytest.raises(TypeError, match=r"^grad must be Float"):
        back(grad.double(), weight, [0], [1], [2])
    with pytest.raises(TypeError, match=r"^weight must be Float or Double"):
        back(grad, weight.half(), [0], [1], [2])
    assert back(grad, weight, [], [], []) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_graph_replay_sees_a_changed_temperature() -> None:
    table, mu, goals = ConstraintTable(SIX, "cuda"), torch.tensor(0.0, device="cuda"), goals_of(3000, "cuda")

    def step() -> tuple[Tensor, ...]:
        loss, _, record, _ = torch.ops.bomkern.goal_set(goals, table.params, table.curves, GROUPS, mu, 1)
        return loss, record, *torch.autograd.grad(loss, goals)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for temperature in (0.0, 0.3):
        mu.fill_(temperature)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(made, step(), strict=True))


@COMPILED
@pytest.mark.slow
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_other_instruction_sets(simd: str) -> None:
    """Run the oracle tests on the narrower vectors of other CPUs."""
    run_on_instruction_set(simd, "tests/ops/test_goal_set.py", "cpu-cpu and not properties and not gradcheck")


@pytest.mark.slow
def test_triton_passes_the_same_oracle_tests() -> None:
    """Run tests/ops/test_goal_set.py on Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton")
    minutes = "9000 or 5000 or properties or gradcheck or copies or 33 or 64"
    run_tests("tests/ops/test_goal_set.py", f"triton-cpu and not ({minutes})", TRITON_INTERPRET="1")
