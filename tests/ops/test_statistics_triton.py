"""Test the parts of the five statistics that are specific to Triton: tiles, splits, launches and configurations.

test_NAME.py compares every implementation with the reference. These tests run on a GPU if there is one, otherwise in
Triton's interpreter. `TRITON_INTERPRET=1 pytest FILE` shows each test.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern.dispatch import triton as triton_ops
from tests.support.statistics import OPS, Inputs, check, check_far, check_second_derivative, codes, leaves, run, views
from tests.support.triton_device import BF16, DEVICE, DOUBLE, FLOAT, HALF, INTERPRET, needs_triton, run_interpreted
from tests.support.triton_recorder import Launches, check_no_spills, compile_all, record

SERVER = ("triton", DEVICE)
EVERY = pytest.mark.parametrize("name", OPS)
PENALTIES = [
    functools.partial(bomkern.covariance_penalty, normalize=normalize, reduction=reduction)
    for normalize in (False, True)
    for reduction in ("sample", "batch")
]


def mean_pull(value: Tensor) -> Tensor:
    """Return the incoming gradient that `.mean()` gives: one expanded number."""
    return (value.new_ones(()) / value.numel()).expand(value.shape)


def op_arguments(name: str, dtypes: tuple[torch.dtype, ...] = (FLOAT,) * 3) -> list[tuple[Any, ...]]:
    """Return the arguments of some calls of torch.ops.bomkern.NAME_triton."""
    z, mu, logvar = (x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(codes(5, 4, DOUBLE), dtypes, strict=True))
    written: dict[str, list[tuple[Any, ...]]] = {
        "gaussian_kl": [(mu, logvar, 1, 0.0), (mu, logvar, 2, 0.5), (mu, logvar, 3, 0.5)],
        "consistency_variance": [([z, mu, logvar], 1.0), ([torch.stack([z, z * 2]).detach().requires_grad_()], 0.5)],
        "active_units": [(mu, 0.1, 0.05)],
        "latent_statistics": [(z, mu, logvar, 0.1, 0.05)],
        "covariance_penalty": [
            (z, True, True, True),
            (z[:3].detach(), False, True, True),
            (z.detach(), True, False, False),
        ],
    }
    if name in written:
        return written[name]
    inputs = OPS[name].make(5, 4)
    return [(*(x.to(DEVICE, t).requires_grad_() for x, t in zip(inputs, dtypes, strict=False)), *OPS[name].numbers)]


# the interpreter's numpy warns about values that `where` discards
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestKernels:
    __test__ = INTERPRET or DEVICE == "cuda"

    @pytest.fixture(autouse=True)
    def poison(self) -> Iterator[None]:
        """Fill fresh buffers with NaN, so that elements that a kernel leaves unwritten are detected."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would need an environment variable
        assert torch.empty(3, device=DEVICE).new_empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    @EVERY
    @pytest.mark.parametrize(("batch", "dims"), [(2, 3), (17, 70), (150, 9), (6, 260)])
    @pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
    def test_oracle(self, name: str, batch: int, dims: int, dtype: torch.dtype) -> None:
        inputs = tuple(x.to(dtype) for x in OPS[name].make(batch, dims))
        check(OPS[name].call, inputs, SERVER, slack=1e-6 if dtype == FLOAT else 1e-12)

    @EVERY
    @pytest.mark.parametrize("half", [HALF, BF16])
    def test_dtypes(self, name: str, half: torch.dtype) -> None:
        inputs = OPS[name].make(9, 6)
        check(OPS[name].call, tuple(x.to(half) for x in inputs), SERVER)
        check(OPS[name].call, tuple(x.to(t) for x, t in zip(inputs, (half, FLOAT, HALF), strict=False)), SERVER)

    @EVERY
    @pytest.mark.parametrize("transposed", [False, True])
    def test_layouts(self, name: str, transposed: bool) -> None:
        def lay(x: Tensor) -> Tensor:
            return x.t().contiguous().t() if transposed else torch.stack([x * 7, x], -1)[..., 1]

        check(OPS[name].call, OPS[name].make(20, 6), SERVER, lay=lay, pull=mean_pull)
        check(OPS[name].call, OPS[name].make(20, 6), SERVER, lay=lambda x: lay(x)[:, :1].expand(-1, 6), unit=0.1)

    @pytest.mark.parametrize("name", ["active_units", "latent_statistics"])
    def test_one_launch_or_two(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One program for everything and many programs for parts give the same results."""
        import bomkern.kernels.active_units.triton_moments as moments

        inputs = leaves(OPS[name].make(70, 24), device=DEVICE)
        whole = run(OPS[name].call, inputs, "triton")
        monkeypatch.setattr(moments, "WHOLE", 0)
        monkeypatch.setattr(moments, "COLS", 8)  # tiles of 512 or 256 rows
        rows = run(OPS[name].call, inputs, "triton")
        plan = moments.plan
        kernels = sys.modules[f"bomkern.kernels.{name}.triton"]
        monkeypatch.setattr(kernels, "plan", lambda batch, dims, dtype, cells=0: plan(batch, dims, dtype, 64))
        cut = run(OPS[name].call, inputs, "triton")  # tiles of 8 rows
        monkeypatch.setattr(moments, "PROGRAMS", 6)  # each program takes five tiles
        few = run(OPS[name].call, inputs, "triton")
        for other in (rows, cut, few):
            for one, two in zip((*whole[0], *whole[1]), (*other[0], *other[1]), strict=True):
                torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("call", PENALTIES)
    @pytest.mark.parametrize(("batch", "dims"), [(150, 24), (24, 150)])
    def test_splits_of_a_penalty(self, call: Any, batch: int, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
        import bomkern.kernels.active_units.triton_moments as moments
        import bomkern.kernels.covariance_penalty.triton as kernels
        import bomkern.kernels.covariance_penalty.triton_columns as columns

        inputs = OPS["covariance_penalty"].make(batch, dims)
        pulls = [{}, {"pull": mean_pull}]
        whole = [run(call, leaves(inputs, device=DEVICE), "triton", **pull) for pull in pulls]
        plan, cut, tile = moments.plan, columns._cut, kernels.tile
        monkeypatch.setattr(moments, "WHOLE", 0)
        monkeypatch.setattr(columns, "plan", lambda batch, dims, dtype: plan(batch, dims, dtype, 512))
        monkeypatch.setattr(columns, "_cut", lambda batch, dims, cells: cut(batch, dims, 256))
        monkeypatch.setattr(kernels, "tile", lambda cells, dims, most=1024: tile(256, dims, 16))
        for pull, one in zip(pulls, whole, strict=True):
            check(call, inputs, SERVER, slack=2e-6, unit=1.0 if dims > batch else 0.0, **pull)
            two = run(call, leaves(inputs, device=DEVICE), "triton", **pull)
            for x, y in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("dims", "block", "rho"),
        [
            *((12, 3, -0.4), (14, 7, 0.9), (2060, 1030, 0.1), (1100, 2, 0.5)),
            *((20, 8, 0.6), (13, 12, -0.05), (1060, 1030, 0.1), (2060, 1031, 0.1), (1101, 2, 0.5)),
        ],
    )
    def test_blocks(self, dims: int, block: int, rho: float) -> None:
        """A tile holds several blocks.

        Widths are no powers of two or exceed a tile, and the last block is shorter.
        """
        inputs = codes(3, dims)[1:]
        unit = inputs[0].square().sum(1).max().item() / min(1 - rho, 1 - rho + block * rho)
        call = functools.partial(bomkern.gaussian_kl, block_size=block, rho=rho)
        check(call, inputs, SERVER, unit=unit)
        check(call, tuple(x.double() for x in inputs), SERVER, slack=1e-12)

    @pytest.mark.parametrize("count", [2, 9, 16])
    def test_views(self, count: int) -> None:
        check(OPS["consistency_variance"].call, views(5, 7, count), SERVER)

    @pytest.mark.parametrize("outlier", [0.0, 1e4])
    def test_far_from_zero(self, outlier: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Means are 1e4, and then the first sample, from which all differences are taken, is twice as far."""
        import bomkern.kernels.active_units.triton_moments as moments

        monkeypatch.setattr(moments, "WHOLE", 0)
        wide = torch.randn(2, 600, 9, generator=torch.Generator().manual_seed(0)) + 1e4
        wide[:, 0] += outlier
        z, mu = wide

        def fields(*inputs: Tensor, impl: str) -> tuple[Tensor, ...]:
            made = bomkern.latent_statistics(*inputs, threshold=1.0, impl=impl)
            return made[:7] if outlier else made

        check_far(fields, (z, mu, codes(600, 9)[2]), SERVER)
        check_far(OPS["consistency_variance"].call, (z, mu), SERVER)
        # If one sample makes columns nearly equal, the gradients of their comparisons are pure rounding.
        for call in [] if outlier else PENALTIES:
            check_far(call, (z[:100],), SERVER)

    def test_constant_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import bomkern.kernels.active_units.triton_moments as moments

        for limit in (moments.WHOLE, 0):
            monkeypatch.setattr(moments, "WHOLE", limit)
            mu = codes(600, 5)[1].to(DEVICE)
            mu[:, 1], mu[:, 3] = 1e4 / 3, -7.1
            mu.requires_grad_()
            made = bomkern.latent_statistics(mu, mu, mu, impl="triton")
            assert made.mu_variance[1] == 0 and made.z_variance[3] == 0
            (grad,) = torch.autograd.grad(
                bomkern.active_units(mu, impl="triton"), mu, [torch.ones((), device=DEVICE)] * 2
            )
            assert not grad[:, [1, 3]].any() and grad[:, 0].any()
            for call in PENALTIES:
                (grad,) = torch.autograd.grad(call(mu, impl="triton").sum(), mu)
                assert not grad[:, [1, 3]].any() and grad[:, 0].any()
        flat = torch.full((40, 3), 0.7, device=DEVICE).requires_grad_()
        _, effective = bomkern.active_units(flat, impl="triton")
        assert effective == 0 and not torch.autograd.grad(effective, flat)[0].any()

    def test_products_ignore_autocast(self) -> None:
        for batch, dims in ((40, 9), (9, 40)):
            inputs = leaves(OPS["covariance_penalty"].make(batch, dims), device=DEVICE)
            for call in PENALTIES:
                want = run(call, inputs, "triton")
                with torch.autocast(DEVICE, BF16):
                    got = run(call, inputs, "triton")
                assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])

    @EVERY
    def test_equal_inputs_give_equal_bits(self, name: str) -> None:
        inputs = leaves(OPS[name].make(300, 20), device=DEVICE)
        first, second = (run(OPS[name].call, inputs, "triton") for _ in range(2))
        for one, two in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
            assert torch.equal(one, two)

    @EVERY
    def test_gradcheck(self, name: str) -> None:
        calls = PENALTIES if name == "covariance_penalty" else [OPS[name].call]
        for call, (batch, dims) in itertools.product(calls, ((4, 3), (3, 4)) if len(calls) > 1 else ((4, 3),)):
            inputs = leaves(OPS[name].make(batch, dims), DOUBLE, DEVICE)
            assert torch.autograd.gradcheck(functools.partial(call, impl="triton"), inputs, fast_mode=True)

    @EVERY
    @pytest.mark.parametrize("dtypes", [(FLOAT,) * 3, (HALF, BF16, FLOAT)])
    def test_opcheck(self, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
        torch.use_deterministic_algorithms(False)  # opcheck also compares unrequested outputs
        forward = getattr(torch.ops.bomkern, f"{name}_triton").default
        backward = getattr(torch.ops.bomkern, f"{name}_triton_backward").default
        for arguments in op_arguments(name, dtypes):
            torch.library.opcheck(forward, arguments)
            out = forward(*arguments)
            plain = [
                x.detach() if isinstance(x, Tensor) else [v.detach() for v in x] if isinstance(x, list) else x
                for x in arguments
            ]
            for pull in backward_arguments(
                name, plain, [o.detach() for o in (out if isinstance(out, tuple) else (out,))]
            ):
                torch.library.opcheck(backward, pull)

    @EVERY
    def test_second_derivative(self, name: str) -> None:
        check_second_derivative(OPS[name].call, leaves(OPS[name].make(5, 4), DOUBLE, DEVICE), "triton")

    @EVERY
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_into_one_graph(self, name: str, backend: str) -> None:
        torch.use_deterministic_algorithms(False)
        torch.compiler.reset()

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            made = OPS[name].call(*(x * 1.5 for x in inputs), impl="triton")
            return (made,) if isinstance(made, Tensor) else tuple(made)

        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for batch in (6, 9):  # the second size makes B symbolic
            inputs = leaves(OPS[name].make(batch, 4), device=DEVICE)
            got, want = compiled(*inputs), step(*inputs)
            torch.testing.assert_close(got, want)
            grads = [torch.autograd.grad(sum(x.square().sum() for x in made), inputs) for made in (got, want)]
            torch.testing.assert_close(*grads)


def backward_arguments(name: str, given: list[Any], out: list[Tensor]) -> list[tuple[Any, ...]]:
    """Return calls of NAME_triton_backward, from the first op's arguments and results."""
    pull = torch.ones_like(out[0])
    if name == "gaussian_kl":
        return [(pull, *given, want) for want in ([True, True], [False, True])]
    if name == "consistency_variance":
        return [(pull, *given, [True] * len(given[0])), (pull, *given, [k == 0 for k in range(len(given[0]))])]
    if name == "active_units":
        return [(pull, None, given[0], out[2]), (None, pull, given[0], out[2]), (pull, pull, given[0], out[2])]
    if name == "latent_statistics":
        some = [torch.ones_like(x) if k % 2 else None for k, x in enumerate(out[:9])]
        every = [torch.ones_like(x) for x in out[:9]]
        return [(every, *given[:3], out[9], [True] * 3), (some, *given[:3], out[9], [True, False, True])]
    if name == "covariance_penalty":
        return [(pull, given[0], *out[1:], *given[1:3])] if given[3] else []
    inputs = tuple(given[: len(OPS[name].arguments)])
    return OPS[name].backward(getattr(torch.ops.bomkern, f"{name}_triton_backward"), inputs, tuple(out))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="this is that process")
def test_under_the_interpreter() -> None:
    run_interpreted(__file__, r"\d\d passed", 900)


@needs_triton
@pytest.mark.skipif(INTERPRET, reason="the interpreter serves the CPU")
@EVERY
def test_says_why_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot serve {name} here: triton serves cuda"):
        OPS[name].call(*OPS[name].make(3, 4), impl="triton")


@needs_triton
@pytest.mark.slow
def test_compiles_for_sm_90_without_spills() -> None:
    check_no_spills(__name__, 60)


# The code below runs as a script, see tests/ops/test_min_goal_triton.py.

KERNELS = {
    "gaussian_kl.triton": ("forward", "backward"),
    "consistency_variance.triton": ("forward", "backward"),
    "active_units.triton": ("forward", "finish", "backward"),
    "latent_statistics.triton": ("forward", "finish", "backward"),
    "covariance_penalty.triton": ("push", "dots", "squares", "total", "weigh"),
    "covariance_penalty.triton_columns": ("moments", "finish", "centre"),
}


def record_launches() -> Launches:
    import importlib

    launches: Launches = []
    for module, names in KERNELS.items():
        kernels = importlib.import_module(f"bomkern.kernels.{module}")
        record(kernels, names, launches)
    load = functools.cache(lambda op, _: importlib.import_module(f"bomkern.kernels.{op}.triton"))
    for name in OPS:
        sys.modules[f"bomkern.dispatch.triton.{name}"].load = load  # type: ignore[attr-defined]

    def both(call: Any, *inputs: Tensor, pull: Any = torch.ones_like) -> None:
        inputs = tuple(x.requires_grad_() for x in inputs)
        made = call(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        torch.autograd.grad(made, inputs, [pull(m) for m in made])

    def empty(batch: int, dims: int, *dtypes: torch.dtype, count: int = 3) -> Inputs:
        return tuple(torch.zeros(batch, dims, dtype=t) for t in itertools.islice(itertools.cycle(dtypes), count))

    halves = (HALF, BF16, FLOAT)
    for batch, dims, *dtypes in (
        (100, 24, FLOAT),
        (3000, 200, FLOAT),
        (200, 3000, FLOAT),
        (3000, 200, DOUBLE),
        (3000, 200, *halves),
        (100, 24, DOUBLE),
    ):
        z, mu, logvar = empty(batch, dims, *dtypes)
        both(lambda *x: triton_ops.gaussian_kl(*x, 1, 0.0), mu, logvar)
        both(lambda *x: triton_ops.gaussian_kl(*x, 4, 0.3), mu, logvar)
        both(lambda *x: triton_ops.gaussian_kl(*x, 7, 0.3), mu, logvar)
        both(lambda x: triton_ops.active_units(x, 0.1, 0.3), mu)
        both(lambda *x: triton_ops.latent_statistics(*x, 0.1, 0.3), z, mu, logvar)
    for count, *dtypes in ((2, FLOAT), (4, *halves), (4, DOUBLE), (16, *halves), (16, DOUBLE)):
        both(lambda *x: triton_ops.consistency_variance(x, 1.0), *empty(300, 200, *dtypes, count=count))
    for batch, dims, dtype, normalize, per_sample, expanded in itertools.chain(
        itertools.product((3000,), (200,), (FLOAT, DOUBLE), (True,), (False, True), (False, True)),
        itertools.product((200,), (300,), (FLOAT, DOUBLE), (True,), (False, True), (False, True)),
        [(40, 20, FLOAT, False, False, False), (40, 20, HALF, False, True, False)],
    ):
        call = functools.partial(triton_ops.covariance_penalty, normalize=normalize, per_sample=per_sample)
        both(call, torch.zeros(batch, dims, dtype=dtype), pull=mean_pull if expanded else torch.ones_like)
    return launches


if __name__ == "__main__":
    compile_all(record_launches(), ("V", "PLAIN", "IS_WHOLE", "DUAL", "CD", "num_warps", "ROWS", "COLS"))
