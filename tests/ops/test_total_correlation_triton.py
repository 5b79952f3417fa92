"""Test the parts of `total_correlation` that are specific to Triton: chunks, splits, two ways to sum, configurations.

test_total_correlation.py compares every implementation with the reference. These tests run on a GPU if there is one,
otherwise in Triton's interpreter. `TRITON_INTERPRET=1 pytest FILE` shows each test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import reference
from bomkern.dispatch import triton as triton_ops
from tests.support.tolerances import assert_as_good_as_eager
from tests.support.triton_device import BF16, DEVICE, DOUBLE, FLOAT, HALF, INTERPRET, needs_triton, run_interpreted
from tests.support.triton_recorder import Launches, check_no_spills, compile_all, record


def make(batch: int, dims: int, low: float = -2.0, high: float = 1.0, dtype: torch.dtype = FLOAT) -> list[Tensor]:
    """Return z, mu and logvar as leaves that require grad, with log-variances from ``low`` to ``high``."""
    draw = torch.Generator().manual_seed(batch * 1000 + dims)
    mu = torch.randn(batch, dims, generator=draw)
    logvar = torch.rand(batch, dims, generator=draw) * (high - low) + low
    z = mu + torch.randn(batch, dims, generator=draw) * torch.exp(0.5 * logvar)
    return [x.to(DEVICE, dtype).requires_grad_() for x in (z, mu, logvar)]


def call(
    fn: Any, latents: list[Tensor], size: int | None, stratified: bool, cut: tuple[int, int] | None = None
) -> list[Tensor]:
    """Return the result and the gradients for a fixed incoming gradient, for all rows or those of a cut."""
    z, mu, logvar = latents
    out = fn(*latents, size, stratified) if cut is None else fn(z[slice(*cut)], mu, logvar, size, stratified, cut[0])
    pull = torch.linspace(0.5, 2.0, len(out), device=out.device, dtype=out.dtype)
    return [out, *torch.autograd.grad(out, latents, pull)]


def compare(
    latents: list[Tensor], size: int | None = None, stratified: bool = False, cut: tuple[int, int] | None = None
) -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in latents]
    mine = call(triton_ops.total_correlation, latents, size, stratified, cut)
    eager = call(reference.total_correlation, latents, size, stratified, cut)
    exact = call(reference.total_correlation, doubles, size, stratified, cut)
    for got, want, true in zip(mine, eager, exact, strict=True):
        assert got.dtype == want.dtype
        assert_as_good_as_eager(got, want, true)
    return mine


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns about intended infinities
class TestKernels:
    __test__ = INTERPRET or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def poison(self) -> Iterator[None]:
        """Fill fresh buffers with NaN, so that elements that a kernel leaves unwritten are detected."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(
        ("size", "stratified"), [(None, False), (5 * 10**9, False), (300, True), (5 * 10**9, True)]
    )
    @pytest.mark.parametrize(("batch", "dims"), [(2, 3), (70, 9)])
    def test_estimators(self, batch: int, dims: int, size: int | None, stratified: bool) -> None:
        compare(make(batch, dims), size, stratified)

    @pytest.mark.parametrize(("size", "stratified"), [(None, False), (300, False), (300, True)])
    @pytest.mark.parametrize("cut", [(0, 1), (0, 40), (129, 130), (90, 130)])
    def test_some_rows(self, cut: tuple[int, int], size: int | None, stratified: bool) -> None:
        """Rows are padded to 128 and components to 256, so a wrong stride is detected."""
        compare(make(130, 5), size, stratified, cut)

    def test_some_rows_one_dimension(self) -> None:
        for x in call(triton_ops.total_correlation, make(9, 1), 50, True, (2, 7)):
            assert (x == 0).all()

    @pytest.mark.parametrize("cut", [None, (3, 143)])
    @pytest.mark.parametrize("stratified", [False, True])
    def test_chunks_and_splits(
        self, stratified: bool, cut: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import bomkern.kernels.total_correlation.triton as kernels

        latents = make(150, 2)
        whole = compare(latents, 1000, stratified, cut)
        monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)  # 128 rows, then the rest
        monkeypatch.setattr(kernels, "LEAST", 2)  # four splits of each
        parts = compare(latents, 1000, stratified, cut)
        monkeypatch.setattr(kernels, "PROGRAMS", 1)  # no splits, also not of the joint
        for one, two, three in zip(whole, parts, compare(latents, 1000, stratified, cut), strict=True):
            torch.testing.assert_close(one, two)
            torch.testing.assert_close(one, three)

    @pytest.mark.parametrize("stratified", [False, True])
    def test_far_from_everything(self, stratified: bool) -> None:
        """Sums of exponentials underflow for some samples, and log-variances are far apart for others."""
        latents = make(40, 3)
        with torch.no_grad():
            latents[0][5] += 60
            latents[0][7, 1] -= 200
            latents[0][9] = latents[0][8]
        compare(latents, 50, stratified)
        compare(make(60, 5, -30, 20), 60, stratified)

    @pytest.mark.parametrize(("batch", "dims"), [(1, 4), (9, 1), (1, 1)])
    def test_nothing_to_share_is_zero_to_the_bit(self, batch: int, dims: int) -> None:
        for x in call(triton_ops.total_correlation, make(batch, dims), None, False):
            assert (x == 0).all()
        if batch > 1:
            out, *grads = call(triton_ops.total_correlation, make(batch, dims), 50, True)
            assert (out == 0).all() and all((g == 0).all() for g in grads)
        latents = make(batch, dims)
        with torch.no_grad():
            latents[0][0, 0] = torch.nan
        assert all(x[0].isnan().any() for x in call(triton_ops.total_correlation, latents, None, False))

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_nan(self, which: int) -> None:
        latents = make(70, 3)
        with torch.no_grad():
            latents[which][3, 1] = torch.nan
            latents[0][6] += 60  # a sum in the same program that underflows
        out, *grads = call(triton_ops.total_correlation, latents, 100, True)
        rows = torch.ones(70, dtype=torch.bool) if which else torch.arange(70) == 3
        assert torch.equal(out.isnan().cpu(), rows)
        assert torch.equal(grads[0].isnan().any(1).cpu(), rows)
        assert grads[1][:, 1].isnan().all() and grads[2][:, 1].isnan().all()

    def test_equal_inputs_give_equal_bits(self) -> None:
        first, second = (call(triton_ops.total_correlation, make(70, 3), 500, True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_wants_only_some_gradients(self) -> None:
        every = call(triton_ops.total_correlation, make(9, 3), None, False)[1:]
        for k in range(3):
            latents = make(9, 3)
            for other in set(range(3)) - {k}:
                latents[other].requires_grad_(False)
            triton_ops.total_correlation(*latents, None, False).backward(torch.linspace(0.5, 2.0, 9, device=DEVICE))
            assert [x.grad is not None for x in latents] == [i == k for i in range(3)]
            torch.testing.assert_close(latents[k].grad, every[k])

    def test_opcheck(self) -> None:
        torch.use_deterministic_algorithms(False)  # opcheck also compares unrequested outputs
        mixed = [x.detach().to(t) for x, t in zip(make(5, 3), (HALF, BF16, FLOAT), strict=True)]
        z, *posteriors = make(5, 3)
        some = [z.detach()[1:3].requires_grad_(), *posteriors]
        for latents, first in ((make(5, 3), None), (mixed, None), (some, 1)):
            given = (*latents, 50, True, first)
            torch.library.opcheck(torch.ops.bomkern.total_correlation_triton.default, (*given, first is None))
            out, log_q, joint, marginal = torch.ops.bomkern.total_correlation_triton(*given, True)
            for want, more in (([True] * 3, log_q.detach()), ([False, True, False], None)):
                pull = (torch.ones_like(out), *(x.detach() for x in latents), joint, marginal, 50, True, first, want)
                torch.library.opcheck(torch.ops.bomkern.total_correlation_triton_backward.default, (*pull, more))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is that process")
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, r"\d\d passed", 600)


@needs_triton
@pytest.mark.skipif(INTERPRET, reason="the interpreter serves the CPU")
def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="total_correlation: impl 'triton' cannot serve here: triton serves cuda"):
        triton_ops.total_correlation(*(torch.rand(3, 2) for _ in range(3)), None, False)


@needs_triton
@pytest.mark.slow
def test_compiles_for_sm_90_without_spills() -> None:
    check_no_spills(__name__, 50)


# The code below runs as a script, see tests/ops/test_min_goal_triton.py.


def record_launches() -> Launches:
    import bomkern.kernels.total_correlation.triton as kernels
    import bomkern.kernels.total_correlation.triton_tiles as tiles

    from bomkern.dispatch.triton.total_correlation import _allocate as allocate

    launches: Launches = []
    record(tiles, ("prepare",), launches)
    record(kernels, ("marginals", "joint_parts", "finish", "joint_weights", "pull_rows", "pull_components"), launches)

    def both(
        z: Tensor, mu: Tensor, logvar: Tensor, size: int | None, stratified: bool, want: list[bool], first: int = 0
    ) -> None:
        for parts in (False, True):
            out, log_q, joint, marginal = allocate(z, mu, logvar, size, stratified, first, parts)
            other = log_q if parts else None
            kernels.launch_forward(z, mu, logvar, size, stratified, first, out, other, joint, marginal)
            kernels.launch_backward(out, other, z, mu, logvar, joint, marginal, size, stratified, first, want)

    def empty(batch: int, dims: int, *dtypes: torch.dtype) -> list[Tensor]:
        return [torch.empty(batch, dims, dtype=dtype) for dtype in (dtypes * 3)[:3]]

    every = [True, True, True]
    for stratified in (False, True):
        both(*empty(200, 10, FLOAT), 60000, stratified, every)
        both(*empty(200, 10, DOUBLE), 60000, stratified, every)
    both(*empty(4096, 128, FLOAT), None, False, every)
    both(*empty(1, 1, FLOAT), None, False, every)
    both(*empty(200, 10, HALF, BF16, FLOAT), None, False, [True, False, False])
    both(*empty(200, 10, BF16, HALF, DOUBLE), None, False, [False, True, False])
    both(*empty(200, 10, FLOAT), None, False, [False, False, True])
    for rows, first in ((1, 7), (50, 100), (64, 64)):  # one row, and row counts that are and are not a multiple of 16
        z, *posteriors = empty(200, 10, FLOAT)
        both(z[:rows], *posteriors, 60000, True, every, first)
        both(z[:rows], *posteriors, None, False, every, first)
    return launches


if __name__ == "__main__":
    compile_all(record_launches(), ("STRATIFIED", "CD", "num_warps", "LINE"))
