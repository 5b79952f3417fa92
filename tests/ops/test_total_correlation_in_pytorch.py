"""Test total_correlation in PyTorch: compile, opcheck, poison, threads, instruction sets, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bomkern
from bomkern import total_correlation
from tests.support.processes import run_on_instruction_set, run_tests
from tests.support.servers import servers
from tests.support.syncs import CountSyncs
from tests.support.total_correlation import ESTIMATORS, latents, leaves, run

IMPLS = pytest.mark.parametrize("server", servers("total_correlation"))
COMPILED = pytest.mark.skipif(bomkern.dispatch.select.extension is None, reason="not compiled")


@COMPILED
@pytest.mark.parametrize("first", [None, 0, 5])
@pytest.mark.parametrize("which", ESTIMATORS)
def test_opcheck(which: str, first: int | None) -> None:
    size, estimator = ESTIMATORS[which]
    z, *posteriors = leaves(latents(9, 4))
    z = z if first is None else z.detach()[first : first + 4].requires_grad_()
    settings = (size, estimator == "mss", first)
    torch.library.opcheck(torch.ops.bomkern.total_correlation.default, (z, *posteriors, *settings))
    plain = [x.detach() for x in (z, *posteriors)]
    _, joint, marginal = torch.ops.bomkern.total_correlation(*plain, *settings)
    for want in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            torch.ops.bomkern.total_correlation_backward.default,
            (torch.rand(len(z)), *plain, joint, marginal, *settings, want),
        )


@IMPLS
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("inductor", None)])
def test_compile_fullgraph(server: tuple[str, str], backend: str, dynamic: bool | None) -> None:
    impl, device = server
    torch._dynamo.reset()

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        return total_correlation(*(x * 1.5 for x in inputs), 5000, "mss", impl=impl).mean()

    # The reference loops over chunks, whose number a compiled graph must know.
    dynamic = False if impl == "reference" else dynamic
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (24, 40):
        ours, theirs = leaves(latents(batch, 6), device=device), leaves(latents(batch, 6), device=device)
        got, want = compiled(*ours), step(*theirs)
        assert torch.allclose(got, want, rtol=1e-5)
        got.backward()
        want.backward()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@IMPLS
def test_no_host_sync(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(latents(40, 6), device=device)
    with CountSyncs() as counter:
        total_correlation(*inputs, 5000, "mss", impl=impl).sum().backward()
    assert not counter.seen


@IMPLS
def test_every_element_is_written(server: tuple[str, str]) -> None:
    """Fresh buffers and workspaces are filled with NaN, and no result contains the filling."""
    impl, device = server
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        for batch, dims in ((1, 1), (33, 5), (70, 33)):
            for which in ("plain", "mss"):
                if batch > 1 or which == "plain":
                    results = run(leaves(latents(batch, dims), device=device), impl, ESTIMATORS[which])
                    assert all(x.isfinite().all() for x in results)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("batch", "dims"), [(300, 40), (500, 3)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int) -> None:
    inputs = leaves(latents(batch, dims))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(inputs, None, (5000, "mss")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@COMPILED
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_other_instruction_sets(simd: str) -> None:
    """Run the oracle tests on the narrower vectors of other CPUs."""
    run_on_instruction_set(
        simd, "tests/ops/test_total_correlation.py", "cpu-cpu and (oracle or layouts or nan or extremes or dtypes)"
    )


@COMPILED
def test_forward_mode_is_refused() -> None:
    inputs = latents(8, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda z: total_correlation(z, *inputs[1:]), (inputs[0],), (inputs[0],))


@IMPLS
def test_backward_twice_needs_retain_graph(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(latents(8, 3), device=device)
    value = total_correlation(*inputs, impl=impl).sum()
    value.backward(retain_graph=True)
    first = inputs[0].grad.clone()  # type: ignore[union-attr]
    value.backward()
    assert torch.equal(inputs[0].grad, 2 * first)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_an_input_changed_before_backward_is_noticed() -> None:
    z, mu, logvar = leaves(latents(8, 3))
    moved = mu * 1
    value = total_correlation(z, moved, logvar).sum()
    with torch.no_grad():
        moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def good(**change: Any) -> dict[str, Any]:
    return {"z": torch.rand(4, 3), "mu": torch.rand(4, 3), "logvar": torch.rand(4, 3), **change}


BAD = [
    (good(z=torch.rand(4)), ValueError, "^z must have shape"),
    (good(z=torch.rand(2, 4, 3)), ValueError, "^z must have shape"),
    (good(mu=torch.rand(4)), ValueError, "^mu must have shape"),
    (good(mu=torch.rand(3, 4)), ValueError, "^mu must have the shape of z"),
    (good(logvar=torch.rand(1, 3)), ValueError, "^logvar must have the shape of z"),
    (good(z=torch.rand(0, 3), mu=torch.rand(0, 3), logvar=torch.rand(0, 3)), ValueError, "^z must hold"),
    (good(z=torch.rand(4, 0), mu=torch.rand(4, 0), logvar=torch.rand(4, 0)), ValueError, "^z must hold"),
    (good(z=None), TypeError, "^z must be a tensor"),
    (good(mu=[0.5]), TypeError, "^mu must be a tensor"),
    (good(logvar=0.5), TypeError, "^logvar must be a tensor"),
    (good(mu=torch.ones(4, 3, dtype=torch.int64)), TypeError, "^mu must be float16"),
    (good(logvar=torch.ones(4, 3, dtype=torch.complex64)), TypeError, "^logvar must be float16"),
    (good(mu=torch.rand(4, 3, device="meta")), ValueError, "^mu is on meta"),
    (good(logvar=torch.rand(4, 3).to_sparse()), TypeError, "^logvar must be a dense"),
    (good(estimator="mcs"), ValueError, "^estimator"),
    (good(estimator=None), ValueError, "^estimator"),
    (good(estimator="mss"), ValueError, "^dataset_size must be given"),
    (good(dataset_size=3), ValueError, "^dataset_size must be at least"),
    (good(dataset_size=-1), ValueError, "^dataset_size must be at least"),
    (good(dataset_size=10.0), TypeError, "^dataset_size must be an int"),
    (good(dataset_size=True), TypeError, "^dataset_size must be an int"),
    (
        {**{k: torch.rand(1, 3) for k in ("z", "mu", "logvar")}, "dataset_size": 9, "estimator": "mss"},
        ValueError,
        "^z must hold at least 2",
    ),
    (good(impl="fast"), ValueError, "^impl"),
]


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize(("arguments", "error", "names"), BAD)
def test_bad_input_is_named(impl: str | None, arguments: Any, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        total_correlation(**{"impl": impl, **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_graph_replay() -> None:
    inputs = leaves(latents(64, 16), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs, "cuda", (5000, "mss"))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs, "cuda", (5000, "mss"))
    for scale in (1.0, 0.5):
        with torch.no_grad():
            inputs[0].mul_(scale)
        graph.replay()
        for a, b in zip(results, run(inputs, "cuda", (5000, "mss")), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_triton_passes_the_same_oracle_tests() -> None:
    """Run tests/ops/test_total_correlation.py on Triton's interpreter.

    It must be chosen before triton is imported.
    """
    pytest.importorskip("triton")
    minutes = "130-130 or 300-33 or dimensions or properties or gradcheck"
    run_tests("tests/ops/test_total_correlation.py", f"triton-cpu and not ({minutes})", TRITON_INTERPRET="1")
