"""Test the parts of goal_set that are specific to Triton: one program or many, and its configurations.

tests/ops/test_goal_set.py compares every implementation with the reference. These tests run on a GPU if there is one,
otherwise in Triton's interpreter. `TRITON_INTERPRET=1 pytest tests/ops/test_goal_set_triton.py` shows each test.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bomkern import ConstraintTable
from bomkern.dispatch import triton as triton_ops
from tests.support.goal_set_op import GROUPINGS, check, check_places, raw_values, run
from tests.support.goals import REDUCTIONS, SIX
from tests.support.triton_device import BF16, DEVICE, DOUBLE, FLOAT, HALF, INTERPRET, needs_triton, run_interpreted
from tests.support.triton_recorder import Launches, check_no_spills, compile_all, record

SERVER = ("triton", DEVICE)


# the interpreter's numpy warns about values that `where` discards
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = INTERPRET or DEVICE == "cuda"

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
    @pytest.mark.parametrize("mu", [0.0, 0.2])
    def test_many_programs(self, mu: float, groups: list[int], reduction: str) -> None:
        for batch in (90, 600):
            check(raw_values(batch), SERVER, groups=groups, mu=mu, reduction=reduction)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_batch_level_goals_of_many_programs(self, reduction: str) -> None:
        raw = raw_values(1100)
        raw[2], raw[5] = torch.tensor(0.3), torch.tensor(0.6, dtype=HALF)
        check(raw, SERVER, groups=[0, 0, 1, 1, 2, 3], mu=0.3, reduction=reduction)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_sample_in_a_late_program(self, value: float) -> None:
        places = {(1499, 3): value, (1234, 4): value, (1234, 0): value}
        for reduction in REDUCTIONS:
            check_places(raw_values(1500), SERVER, places, groups=[0, 0, 1, 2, 2, 3], mu=0.1, reduction=reduction)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
    def test_multipliers(self, groups: list[int], reduction: str) -> None:
        weights = [0.4, 0.0, 0.3, 0.1, 0.15, 0.05][: max(groups) + 1]
        for batch in (1, 90, 600):
            check(raw_values(batch), SERVER, groups=groups, reduction=reduction, multipliers=weights)
        places = {(599, 0): float("nan"), (7, 1): float("inf"), (8, 2): -float("inf")}
        check_places(raw_values(600), SERVER, places, groups=groups, reduction=reduction, multipliers=weights)

    def test_equal_inputs_give_equal_bits(self) -> None:
        first, second = (run(raw_values(1500), "triton", mu=0.1, device=DEVICE) for _ in range(2))
        for one, two in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize("reduction", [0, 3])
    @pytest.mark.parametrize("matrix", [False, True])
    def test_opcheck(self, matrix: bool, reduction: int) -> None:
        raw = [x.to(DEVICE).requires_grad_() for x in raw_values(5)]
        goals = [torch.stack(raw, 1).detach().requires_grad_()] if matrix else raw
        table, mu = ConstraintTable(SIX, DEVICE), torch.tensor(0.2, device=DEVICE)
        arguments = (goals, table.params, table.curves, [0, 0, 1, 2, 2, 3], mu, reduction, None, None, None, True)
        torch.library.opcheck(torch.ops.bomkern.goal_set_triton.default, arguments)
        loss, _, _, weight = torch.ops.bomkern.goal_set_triton(*arguments)
        index, dim = ([0], [2]) if matrix else ([1, 3], [1, 1])
        pull = (torch.ones_like(loss), weight.detach(), index, dim, [2] * len(index))
        torch.library.opcheck(torch.ops.bomkern.goal_set_triton_backward.default, pull)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_into_one_graph(self, backend: str) -> None:
        torch.compiler.reset()
        table, mu = ConstraintTable(SIX, DEVICE), torch.tensor(0.2, device=DEVICE)

        def step(goals: list[Tensor]) -> tuple[Tensor, ...]:
            return triton_ops.goal_set([g * 1.5 for g in goals], table.params, table.curves, [0, 0, 1, 2, 2, 3], mu, 1)

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for batch in (5, 8):  # the second size makes B symbolic
            goals = [x.to(DEVICE).requires_grad_() for x in raw_values(batch)]
            got, want = compiled(goals), step(goals)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got[0], goals), torch.autograd.grad(want[0], goals))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is that process")
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, r"\d\d passed", 900)


@needs_triton
@pytest.mark.slow
def test_compiles_for_sm_90_without_spills() -> None:
    check_no_spills(__name__, 20)


# The code below runs as a script, see tests/ops/test_min_goal_triton.py.


def record_launches() -> Launches:
    import bomkern.kernels.goal_set.triton as kernels

    from bomkern.dispatch import fakes

    launches: Launches = []
    record(kernels, ("forward", "finish", "backward_columns", "backward_rows", "finish_scalars"), launches)

    def both(
        goals: list[Tensor],
        groups: list[int],
        reduction: int,
        save: bool = True,
        weighed: bool = False,
        masked: bool = False,
    ) -> None:
        dtype = DOUBLE if any(g.dtype == DOUBLE for g in goals) else FLOAT
        table, mu = ConstraintTable((SIX * 11)[: len(groups)], dtype=dtype), torch.zeros((), dtype=dtype)
        given = (
            goals,
            table.params,
            table.curves,
            groups,
            mu,
            reduction,
            mu.new_ones(groups[-1] + 1) if weighed else None,
        )
        out = kernels.Outputs(*fakes.goal_set(*given, save))
        count = len(groups)
        present = torch.ones(count, len(out.bottleneck), dtype=torch.bool) if masked else None
        counts = mu.new_ones(2 + groups[-1] + count) if masked else None
        kernels.launch_forward(*given, present, counts, out)
        if save:
            grads = [torch.empty(g.shape, dtype=g.dtype) for g in goals]
            grads += [None] * (len(groups) - len(goals))
            kernels.launch_backward(grads, out.loss, out.weight)

    for count, wide in ((9, 16), (64, 64)):
        many, alone, pairs = 20_000, list(range(count)), [k // 2 for k in range(count)]
        for cells in (1024, 4096):  # one program, in either configuration
            both([torch.empty(cells // wide, count)], alone, 1)
        both([torch.empty(4096 // wide) for _ in range(count)], pairs, 3)
        both([torch.empty(many, count)], alone, 1)
        both([torch.empty(many) for _ in range(count)], alone, 1)
        both([torch.empty(many) for _ in range(count)], pairs, 3)
        both([torch.empty(many) for _ in range(count)], pairs, 1, weighed=True)
        both([torch.empty(many) for _ in range(count)], alone, 0, save=False)
        both([torch.empty(many) for _ in range(count)], pairs, 1, masked=True)
        both([torch.empty(4096 // wide, count)], pairs, 3, weighed=True, masked=True)
        both([torch.empty(many, dtype=HALF) if k % 2 else torch.empty(()) for k in range(count)], pairs, 1)
    both([torch.empty(20_000, 9, dtype=DOUBLE)], [0] * 9, 1)
    both([torch.empty(20_000, dtype=d) for d in (HALF, BF16, DOUBLE)], [0, 1, 1], 1)
    return launches


if __name__ == "__main__":
    compile_all(record_launches(), ("K", "G", "BLOCK", "num_warps", "REDUCTION", "SAVE", "WHOLE"))
