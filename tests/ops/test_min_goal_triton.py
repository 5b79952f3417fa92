"""Test `min_goal` by Triton against the reference in float64.

The kernels run on a GPU if there is one. Otherwise Triton's interpreter runs them, in its own process because it must
be chosen before triton is imported. `TRITON_INTERPRET=1 pytest FILE` shows each test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import Box, Constraint, Minimize, MinimizeHard, Upper, reference
from bomkern.dispatch import triton as triton_ops
from tests.support.tolerances import assert_as_good_as_eager
from tests.support.triton_device import BF16, DEVICE, DOUBLE, FLOAT, HALF, INTERPRET, needs_triton, run_interpreted
from tests.support.triton_goals import CONSTRAINTS, LAYOUTS, MEAN, MIN, MIXED, NONE, SUM, make, on_device, table
from tests.support.triton_recorder import Launches, check_no_spills, compile_all, record


def call(fn: Any, goals: list[Tensor], constraints: list[Constraint] | None, reduction: int) -> tuple[Any, Any]:
    """Return the results with statistics, and the gradients for a fixed incoming gradient."""
    dtype = DOUBLE if any(g.dtype == DOUBLE for g in goals) else FLOAT
    params, curves = table(constraints, FLOAT)
    out = fn(goals, params if params is None else params.to(dtype), curves, reduction, True)
    pull = torch.linspace(0.5, 2.0, out[0].numel(), device=DEVICE, dtype=dtype).reshape(out[0].shape)
    return out, torch.autograd.grad(out[0], goals, pull)


def compare(goals: list[Tensor], constraints: list[Constraint] | None, reduction: int) -> None:
    before = [g.detach().clone() for g in goals]
    mine, my_grads = call(triton_ops.min_goal, goals, constraints, reduction)
    eager, eager_grads = call(reference.min_goal, goals, constraints, reduction)
    doubles = [g.detach().double().requires_grad_() for g in goals]
    exact, exact_grads = call(reference.min_goal, doubles, constraints, reduction)
    assert torch.equal(mine[1], exact[1]) and mine[1].dtype == torch.int64
    assert torch.equal(mine[4], exact[4]) and mine[4].dtype == torch.bool
    assert mine[0].dtype == eager[0].dtype
    assert_as_good_as_eager(mine[0], eager[0], exact[0])
    for k in (2, 3):  # level is a statistic, which the interpreter adds up one by one
        torch.testing.assert_close(mine[k], exact[k].to(mine[k].dtype), rtol=3e-6, atol=3e-7, equal_nan=True)
        assert not mine[k].requires_grad
    for got, want, true, goal in zip(my_grads, eager_grads, exact_grads, goals, strict=True):
        assert got.dtype == goal.dtype
        # The interpreter truncates bfloat16, while devices round it.
        assert_as_good_as_eager(got, want, true, slack=4e-3 if got.dtype == BF16 and INTERPRET else 1e-6)
    for now, then in zip(goals, before, strict=True):
        assert torch.equal(now.nan_to_num(nan=7.5), then.nan_to_num(nan=7.5)), "an input was written to"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns in branches that `where` discards
class TestKernels:
    __test__ = INTERPRET or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def poison(self) -> Iterator[None]:
        """Fill fresh buffers with NaN, so that elements that a kernel leaves unwritten are detected."""
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3, device=DEVICE).new_empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("layout", ["rows", "columns"])
    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, MIN])
    @pytest.mark.parametrize("kind", CONSTRAINTS)
    def test_float32(self, kind: str, reduction: int, layout: str) -> None:
        compare(make(layout, 90, [FLOAT]), CONSTRAINTS[kind], reduction)

    @pytest.mark.parametrize("layout", ["rows", "columns"])
    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, MIN])
    def test_many_programs(self, reduction: int, layout: str) -> None:
        compare(make(layout, 600, [FLOAT]), MIXED, reduction)

    @pytest.mark.parametrize("dtypes", [[HALF], [BF16], [DOUBLE], [HALF, FLOAT, BF16], [BF16, HALF, DOUBLE]])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_dtypes_and_layouts(self, layout: str, dtypes: list[torch.dtype]) -> None:
        for reduction in (NONE, MIN):
            compare(make(layout, 37, dtypes), MIXED, reduction)

    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, MIN])
    @pytest.mark.parametrize("batch", [1, 1100])
    def test_batch_level_goals(self, batch: int, reduction: int) -> None:
        compare(make("batch-level", batch, [FLOAT]), MIXED, reduction)
        compare([on_device(torch.tensor(0.3)), on_device(torch.tensor(0.2))], None, reduction)

    @pytest.mark.parametrize("count", [1, 2, 17, 64])
    def test_counts(self, count: int) -> None:
        constraints = (MIXED * 11)[:count]
        for batch in (3, 70):
            x = torch.rand(batch, count, generator=torch.Generator().manual_seed(count)) * 1.5
            compare([on_device(x)], constraints, MEAN)
            compare([on_device(x[:, k].contiguous()) for k in range(count)], constraints, MIN)

    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, MIN])
    @pytest.mark.parametrize("batch", [36, 700])
    def test_ties(self, batch: int, reduction: int) -> None:
        x = torch.tensor([0.5, 0.25]).repeat_interleave(3).repeat(batch, 1)
        for k in range(6):
            x[k::7, k] = 0.0625
            x[k::7, 5] = 0.0625
        compare([on_device(x)], None, reduction)
        compare([on_device(c) for c in x.t().contiguous()], [Minimize(0.3)] * 6, reduction)
        # All deficits are 0, by different curves.
        compare([on_device(torch.tensor([[0.1, 0.0, 0.1, 0.5, 0.25, 0.2]]))], MIXED, reduction)

    @pytest.mark.parametrize("reduction", [NONE, MIN])
    @pytest.mark.parametrize("kind", CONSTRAINTS)
    @pytest.mark.parametrize("dtype", [HALF, FLOAT, DOUBLE])
    def test_nan_and_infinite(self, dtype: torch.dtype, kind: str, reduction: int) -> None:
        inf, nan = float("inf"), float("nan")
        for bad in ([inf], [-inf], [nan], [0.0, -0.0, -1.0], [inf, nan, -inf], [30000.0, -30000.0]):
            x = torch.rand(21, 6, generator=torch.Generator().manual_seed(1)) + 0.02
            for k, value in enumerate(bad * 4):
                x[k + 3, k % 6] = value
                x[k + 3, 5] = value
            compare([on_device(x.to(dtype))], CONSTRAINTS[kind], reduction)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_sample_in_a_late_program(self, value: float) -> None:
        x = torch.rand(2000, 6, generator=torch.Generator().manual_seed(2)) + 0.02
        x[1999, 3] = x[1234, 4] = x[1234, 2] = value
        for reduction in (MEAN, SUM, MIN):
            compare([on_device(x)], CONSTRAINTS["linear"], reduction)

    def test_far_out_and_close_in(self) -> None:
        """Test raw values ten thousand scales away and more, at the box's walls, and where log1p matters.

        The square r^2 overflows for some.
        """
        far = torch.tensor([1e3, 1e4, 3e7, 9e7, 3e8, 1e12, 3e19, 1e30, 1e-3, 1e-5, 1e-8, 1e-12])
        for constraint in (Minimize(1.3), MinimizeHard(1.3), Box(-1.0, 1.7), Upper(0.1, 0.7)):
            compare([on_device(far[:, None])], [constraint], NONE)
        wall = torch.linspace(-1.2, 1.2, 97)
        compare([on_device(wall[:, None])], [Box(-1.01, 1.02)], NONE)
        tiny = torch.tensor([1e-30, 2e-38, 1e-39, 1e-44, 1.0, 0.9999999, 1.5])
        out = [
            fn([tiny[:, None].to(DEVICE)], None, [], NONE, False)[0] for fn in (triton_ops.min_goal, reference.min_goal)
        ]
        torch.testing.assert_close(*out, rtol=3e-7, atol=1e-7)

    def test_infeasible_sample_stops_any_gradient(self) -> None:
        x = on_device(torch.tensor([[float("inf"), 1.0], [0.5, 1.0]]))
        (loss,) = triton_ops.min_goal([x], *table([Minimize(1.0)] * 2, FLOAT), NONE, False)
        (grad,) = torch.autograd.grad(loss, x, torch.tensor([float("nan"), 2.0], device=DEVICE))
        assert grad.tolist() == [[0.0, 0.0], [0.0, 2.0]]

    def test_wants_only_some_gradients(self) -> None:
        goals = make("batch-level", 9, [FLOAT])
        for k in (0, 4):
            goals[k].requires_grad_(False)
        loss, *_ = triton_ops.min_goal(goals, *table(MIXED, FLOAT), MEAN, True)
        loss.backward()
        assert [g.grad is None for g in goals] == [True, False, False, False, True, False]
        with torch.no_grad():
            assert not triton_ops.min_goal(goals, *table(MIXED, FLOAT), MEAN, False)[0].requires_grad

    def test_equal_inputs_give_equal_bits(self) -> None:
        first, second = (call(triton_ops.min_goal, make("batch-level", 1500, [FLOAT]), MIXED, MEAN) for _ in range(2))
        for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        ("reduction", "layout"), [(NONE, "rows"), (MEAN, "batch-level"), (SUM, "columns"), (MIN, "batch-level")]
    )
    def test_gradcheck(self, reduction: int, layout: str) -> None:
        params, curves = table(MIXED, DOUBLE)
        goals = make(layout, 5, [DOUBLE])
        torch.autograd.gradcheck(lambda *g: triton_ops.min_goal(g, params, curves, reduction, False), goals)

    @pytest.mark.parametrize(
        ("reduction", "layout"), [(NONE, "rows"), (MEAN, "batch-level"), (SUM, "columns"), (MIN, "batch-level")]
    )
    def test_gradgradcheck(self, reduction: int, layout: str) -> None:
        params, curves = table(MIXED, DOUBLE)
        goals = make(layout, 5, [DOUBLE])
        torch.autograd.gradgradcheck(lambda *g: triton_ops.min_goal(g, params, curves, reduction, False), goals)

    def test_new_parameters_need_no_new_call(self) -> None:
        params, curves = table(MIXED, FLOAT)
        goals = make("columns", 5, [FLOAT])
        before = triton_ops.min_goal(goals, params, curves, SUM, False)[0].item()
        params[:, 1:3] *= 2
        assert triton_ops.min_goal(goals, params, curves, SUM, False)[0].item() != before

    @pytest.mark.parametrize(("reduction", "layout"), [(NONE, "rows"), (MIN, "batch-level")])
    def test_opcheck(self, reduction: int, layout: str) -> None:
        torch.use_deterministic_algorithms(False)  # opcheck also compares unrequested outputs
        for params, curves in (table(MIXED, FLOAT), (None, [])):
            args = (make(layout, 5, [FLOAT]), params, curves, reduction, True, True)
            torch.library.opcheck(torch.ops.bomkern.min_goal_triton.default, args)
        loss, winner, slope, *_ = torch.ops.bomkern.min_goal_triton(*args)
        kinds = [2] if layout == "rows" else [2, 6, -1, 2, 6, 2]
        pull = (torch.ones_like(loss), winner, slope.detach(), kinds, reduction, 5, 6 if layout == "rows" else 0)
        torch.library.opcheck(torch.ops.bomkern.min_goal_triton_backward.default, pull)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_into_one_graph(self, backend: str) -> None:
        params, curves = table(MIXED, FLOAT)

        def step(goals: list[Tensor]) -> tuple[Tensor, ...]:
            return triton_ops.min_goal([g * 1.5 for g in goals], params, curves, MEAN, True)

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for batch in (5, 8):  # the second size makes B symbolic
            goals = make("batch-level", batch, [FLOAT, HALF])
            got, want = compiled(goals), step(goals)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got[0], goals), torch.autograd.grad(want[0], goals))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is that process")
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, r"\d{3} passed", 600)


@pytest.mark.skipif(INTERPRET, reason="the interpreter serves the CPU")
def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if importlib.util.find_spec("triton") is not None:
        assert "TRITON_INTERPRET" in str(triton_ops.why_not("cpu"))
        with pytest.raises(RuntimeError, match="impl 'triton' cannot serve here: triton serves cuda tensors, not cpu"):
            triton_ops.min_goal([torch.rand(3)], None, [], MEAN, False)
        assert (triton_ops.why_not("cuda") is None) == torch.cuda.is_available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_ops.why_not("cuda") == "triton is not installed"


@needs_triton
@pytest.mark.slow
def test_compiles_for_sm_90_without_spills() -> None:
    check_no_spills(__name__, 20)


# The code below runs as a script: it records every launch, and compiles it for a device that is not here.


def record_launches() -> Launches:
    import bomkern.kernels.min_goal.triton as kernels

    from bomkern.dispatch.triton.min_goal import _allocate as allocate

    launches: Launches = []
    record(kernels, ("forward", "finish", "backward_columns", "backward_rows", "finish_scalars"), launches)

    def both(goals: list[Tensor], constraints: list[Constraint] | None, reduction: int) -> None:
        outputs, batch, count, dtype = allocate(goals, reduction, True, True)
        params, curves = table(constraints, dtype)
        kernels.launch_forward(goals, params, curves, reduction, True, True, batch, count, dtype, outputs)
        grads = [torch.empty(g.shape, dtype=g.dtype) for g in goals]
        kernels.launch_backward(grads, outputs[0], outputs[1], outputs[2], reduction, batch, count)

    for count in (9, 64):
        mixed = (MIXED * 11)[:count]
        wide, many = {9: 16, 64: 64}[count], 20000
        for cells in (1024, 4096):  # one program, in either configuration
            both([torch.empty(cells // wide, count)], mixed, MEAN)
        both([torch.empty(4096 // wide) for _ in range(count)], mixed, MIN)
        both([torch.empty(many, count)], mixed, MEAN)
        both([torch.empty(many) for _ in range(count)], mixed, MEAN)
        both([torch.empty(many, dtype=HALF) if k % 2 else torch.empty(()) for k in range(count)], None, MEAN)
    both([torch.empty(many, 9, dtype=DOUBLE)], MIXED + MIXED[:3], MEAN)
    both([torch.empty(many, dtype=d) for d in (HALF, BF16, DOUBLE)], MIXED[:3], MEAN)
    return launches


if __name__ == "__main__":
    compile_all(record_launches(), ("K", "BLOCK", "num_warps", "REDUCTION", "WHOLE"))
