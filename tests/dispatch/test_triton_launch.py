"""Test Triton's launches without a GPU: its own JIT, compiler and launcher run on a stub of libcuda.

The interpreter and `triton.compile` bypass the code that binds a call's arguments and passes them to the kernel. No
other test would detect a failure there. tests/support/stub_cuda has the stub and the calls. `pytest -s` shows Python's
time per call.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.profiler import ProfilerActivity, profile

from tests.support import stub_cuda
from tests.support.processes import ROOT
from tests.support.stub_cuda.cases import CASES, LAUNCHES, Case, both_ways
from tests.support.triton_device import needs_triton


class Sizes(NamedTuple):
    """Batch sizes with an equal number of programs, and the kernels compiled anew for ``odd`` sizes and for ``least``.

    Triton specializes for sizes that are a multiple of 16, and for 1. For B this pays off in kernels that then access
    16 bytes at a time, or need fewer registers for their masks. The other kernels use do_not_specialize.
    """

    op: str
    kind: str
    name: str
    even: tuple[int, ...]
    odd: tuple[int, ...]
    anew: int
    least: tuple[int, int] | None = None


FEW, MANY = ((96, 16, 112), (90, 7, 83)), ((3008, 4096, 2064), (3001, 2049, 3333))
SIZES = [
    Sizes("min_goal", "one program", "columns-mean", *FEW, 2, (1, 2)),
    Sizes("min_goal", "many programs", "columns-mean", *MANY, 2),
    Sizes("min_goal", "many programs", "rows-mean", *MANY, 2),
    Sizes("goal_set", "one program", "columns-mean", *FEW, 2, (1, 2)),
    Sizes("goal_set", "0-dim goals", "mean", *MANY, 2),
    Sizes("total_correlation", "one chunk", "float", (96, 112, 16), (90, 67, 7), 0, (2, 0)),
    Sizes("total_correlation", "one chunk", "no size", (96, 112, 16), (90, 67, 7), 0, (1, 0)),
    Sizes("total_correlation", "one chunk", "some rows", (96, 128, 64), (90, 67, 9), 0),
    Sizes("gaussian_kl", "always", "float", *FEW, 2, (1, 2)),
    Sizes("consistency_variance", "always", "float", *FEW, 2, (1, 2)),
    Sizes("active_units", "one program", "float", *FEW, 2, (2, 0)),
    Sizes("active_units", "many programs", "float", *MANY, 2),
    Sizes("latent_statistics", "one program", "float", *FEW, 2, (2, 0)),
    Sizes("latent_statistics", "many programs", "float", *MANY, 2),
    Sizes("covariance_penalty", "sample", "float", (96, 80, 128), (90, 67, 121), 5),
    Sizes("covariance_penalty", "sample, D > B", "float", (96, 80), (90, 67), 7),
    Sizes("covariance_penalty", "batch", "float", (96, 80, 128), (90, 67, 121), 4),
]

STUB = stub_cuda.FOLDER in os.environ
# Events that the profiler sees and a GPU does not run: memory, views of it, and parts of counted events.
NO_KERNEL = re.compile(
    r"(new_)?empty(_strided|_like)?|view(_as)?|_?reshape(_alias)?|as_strided_?|slice|select|t|transpose|unbind|expand"
    r"|detach|alias|narrow|squeeze_|unsqueeze_|resolve_conj|resolve_neg|split(_with_sizes)?|contiguous"
    r"|promote_types|to|_to_copy|fill_"
)


def cases() -> list[Any]:
    """Return all cases; the first of each row of `LAUNCHES` is quick, unless the row is a variant."""
    quick: dict[tuple[str, str], str] = {}
    found = []
    for case in (case for of_op in CASES.values() for case in of_op):
        first = quick.setdefault((case.op, case.kind), case.name) == case.name
        marks = [] if first and ("," not in case.kind or case.op != "covariance_penalty") else [pytest.mark.slow]
        found.append(pytest.param(case, id=f"{case.op}-{case.kind}-{case.name}", marks=marks))
    return found


def find(op: str, kind: str, name: str) -> Case:
    (case,) = (case for case in CASES[op] if (case.kind, case.name) == (kind, name))
    return case


def kernels_of_torch(call: Callable[[], None]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    names = (event.name.removeprefix("aten::") for event in seen.events() if event.name.startswith("aten::"))
    return [name for name in names if not NO_KERNEL.fullmatch(name)]


def microseconds(call: Callable[[], None], times: int = 200) -> float:
    for _ in range(20):
        call()
    taken = []
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken) / 1e3


@pytest.fixture(scope="module")
def stub() -> stub_cuda.Stub:
    return stub_cuda.install()


class TestLaunches:
    __test__ = STUB

    @pytest.mark.parametrize("case", cases())
    def test_launches(self, case: Case, stub: stub_cuda.Stub) -> None:
        forward, backward = both_ways(case)
        stub.launches()
        forward()
        there = stub.launches()
        backward()
        back = stub.launches()
        loaded = stub.loaded
        beside = kernels_of_torch(forward), kernels_of_torch(backward)
        counts = (len(there), len(back), len(beside[0]), len(beside[1]))
        assert counts == LAUNCHES[case.op][case.kind], f"{there} {back} {beside}"
        assert stub.launches() == there + back
        assert stub.loaded == loaded, "an equal call was compiled again"

    @pytest.mark.slow
    @pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{s.op}-{s.kind}-{s.name}")
    def test_what_another_batch_compiles(self, sizes: Sizes, stub: stub_cuda.Stub) -> None:
        case = find(*sizes[:3])

        def compiled(*batches: int) -> int:
            before = stub.loaded
            for batch in batches:
                forward, backward = both_ways(case, batch)
                forward()
                backward()
            return stub.loaded - before

        stub.forget()
        compiled(sizes.even[0])
        assert compiled(*sizes.even[1:]) == 0
        assert compiled(sizes.odd[0]) == sizes.anew
        assert compiled(*sizes.odd[1:]) == 0
        if sizes.least is not None:
            assert compiled(sizes.least[0]) == sizes.least[1]
        stub.forget()

    @pytest.mark.slow
    @pytest.mark.parametrize("op", CASES)
    def test_time_of_python(self, op: str, stub: stub_cuda.Stub) -> None:
        import triton

        usual = ("columns-mean", "float"), ("one program", "one chunk", "always", "sample")
        case = next(case for case in CASES[op] if case.name in usual[0] and case.kind in usual[1])
        forward, backward = both_ways(case)
        there, back = microseconds(forward), microseconds(backward)
        stub.forget()
        print(f"\ntriton {triton.__version__} {op}, {case.kind}: {there:.0f} us forward, {back:.0f} us backward")
        assert there + back < 1e5


@pytest.fixture(scope="session")
def folder(built_once: Any) -> Path:
    """Return the folder of the stub and of Triton's compiled kernels, shared by all processes of a run."""
    if stub_cuda.compiler() is None:
        pytest.skip("no C compiler, which Triton needs too")
    made: Path = built_once("stub-cuda", str(stub_cuda.command(Path())), [stub_cuda.SOURCE], stub_cuda.build)
    return made


@needs_triton
@pytest.mark.skipif(STUB, reason="this is that process")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ops", ["goal", "not goal"])
def test_on_a_stub(ops: str, marks: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"{__file__}::TestLaunches"]
    env = stub_cuda.environment(folder)
    done = subprocess.run(
        [*command, "-k", ops, "-m", marks], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] or done.stderr[-2000:]
    assert re.search(r"\d passed", done.stdout), done.stdout[-2000:]
