"""Test latent_statistics: every implementation against the reference in float64, and against the separate ops."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bomkern import active_units, gaussian_kl, latent_statistics
from bomkern.ops.latent_statistics import LatentStatistics
from tests.support.servers import only_cpu, servers
from tests.support.statistics import (
    LARGE,
    LAYOUTS,
    PULLS,
    SHAPES,
    check,
    check_far,
    check_only_the_gradients_wanted,
    check_places,
    check_same_bits,
    codes,
    leaves,
    run,
    shuffled,
)

IMPLS = pytest.mark.parametrize("server", servers("latent_statistics"))
NAMES = LatentStatistics._fields
KL, Z_MEAN, MU_VARIANCE, ACTIVE, EFFECTIVE = 0, 3, 6, 7, 8
MIXED = [*(("float16",) * 3, ("bfloat16",) * 3), ("float16", "float32", "bfloat16"), ("float32", "bfloat16", "float32")]


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), SHAPES)
def test_oracle(server: tuple[str, str], batch: int, dims: int) -> None:
    check(latent_statistics, codes(batch, dims), server)


@IMPLS
@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize(("batch", "dims"), [(2, 3), (37, 12), (1030, 70)])
def test_each_field_alone(server: tuple[str, str], batch: int, dims: int, field: str) -> None:
    """Each field's gradients are tested alone, because another field's would hide them."""
    check(latent_statistics, codes(batch, dims), server, fields=[NAMES.index(field)])


@IMPLS
@pytest.mark.parametrize("fields", [(0, 1), (2, 4), (3, 5, 7), (6, 8), (4, 6), (7, 8)])
def test_some_fields(server: tuple[str, str], fields: tuple[int, ...]) -> None:
    check(latent_statistics, codes(37, 12), server, fields=fields)


@IMPLS
@pytest.mark.parametrize(("batch", "dims"), LARGE)
def test_larger_than_every_tile(server: tuple[str, str], batch: int, dims: int) -> None:
    check(latent_statistics, codes(batch, dims), server)
    check(latent_statistics, codes(batch, dims), server, fields=range(3, 9))


@IMPLS
@pytest.mark.parametrize("fields", [None, range(3, 9)], ids=["all", "columns"])
@pytest.mark.parametrize("dtypes", MIXED)
def test_dtypes(server: tuple[str, str], dtypes: tuple[str, ...], fields: range | None) -> None:
    inputs = tuple(x.to(getattr(torch, t)) for x, t in zip(codes(20, 21), dtypes, strict=True))
    check(latent_statistics, inputs, server, fields=fields)


@IMPLS
def test_float64(server: tuple[str, str]) -> None:
    for fields in (None, range(3, 9)):
        check(latent_statistics, codes(70, 9, torch.float64), server, slack=1e-13, fields=fields)
        z, mu, logvar = codes(20, 5)
        check(latent_statistics, (z, mu.double(), logvar.half()), server, slack=1e-13, fields=fields)


@IMPLS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(server: tuple[str, str], layout: str) -> None:
    lay = LAYOUTS[layout]
    unit = 1.0 if "for all" in layout else 0.0  # equal rows or columns cancel
    check(latent_statistics, codes(37, 12), server, lay=lay, unit=unit)
    for k in range(3):  # each input has its own strides

        def call(*inputs: torch.Tensor, impl: str | None, k: int = k) -> LatentStatistics:
            return latent_statistics(*(lay(x) if i == k else x for i, x in enumerate(inputs)), impl=impl)  # type: ignore[misc]

        check(call, codes(37, 12), server, unit=unit)


@IMPLS
@pytest.mark.parametrize("pull", PULLS)
@pytest.mark.parametrize("fields", [None, range(3, 9)], ids=["all", "columns"])
def test_gradients_from_above(server: tuple[str, str], pull: str, fields: range | None) -> None:
    # The gradients of a mean's sum and of a variance's sum cancel over the batch, not in each element.
    check(latent_statistics, codes(40, 12), server, pull=PULLS[pull], fields=fields)


@IMPLS
@pytest.mark.parametrize(("threshold", "temperature"), [(0.01, 0.005), (1.0, 2.0), (-0.5, 0.3)])
def test_threshold_and_temperature(server: tuple[str, str], threshold: float, temperature: float) -> None:
    call = functools.partial(latent_statistics, threshold=threshold, temperature=temperature)
    check(call, codes(50, 40), server, fields=[ACTIVE], slack=1e-6 + 1e-7 / temperature)
    check(call, codes(50, 40), server, fields=[EFFECTIVE])


@IMPLS
def test_only_the_gradients_wanted(server: tuple[str, str]) -> None:
    check_only_the_gradients_wanted(latent_statistics, codes(40, 12), server)


@IMPLS
def test_gradcheck(server: tuple[str, str]) -> None:
    impl, device = server
    inputs = leaves(codes(5, 4, torch.float64), device=device)
    assert torch.autograd.gradcheck(functools.partial(latent_statistics, impl=impl), inputs)


@IMPLS
def test_tangent_beyond_80(server: tuple[str, str]) -> None:
    impl, device = server
    z, mu, _ = codes(30, 12)
    logvar = torch.linspace(-120, 200, 360).reshape(12, 30).t().contiguous()
    check(latent_statistics, (z, mu, logvar), server)
    check(latent_statistics, (z, mu, logvar), server, fields=[1, 2])
    values, grads = run(latent_statistics, leaves((z, mu, logvar), device=device), impl)
    assert all(x.isfinite().all() for x in (*values, *grads))
    together = gaussian_kl(*(x.to(device) for x in (mu, logvar)), impl="reference")
    assert torch.allclose(values[KL], together, rtol=1e-5)


@IMPLS
def test_far_from_zero(server: tuple[str, str]) -> None:
    z, mu, logvar = codes(300, 24)
    call = functools.partial(latent_statistics, threshold=1.0)
    far = (z / z.std(0) + 1e4, mu / mu.std(0) + 1e4, logvar)
    check_far(call, far, server)

    def columns(z: torch.Tensor, mu: torch.Tensor, impl: str | None) -> tuple[torch.Tensor, ...]:
        return call(z, mu, logvar.to(z), impl=impl)[3:]

    check_far(columns, far[:2], server)


@IMPLS
def test_far_from_zero_in_float64(server: tuple[str, str]) -> None:
    """At 1e8 deviations from zero, over several blocks of rows, differences from the first value stay exact."""
    z, mu, logvar = codes(300, 9, torch.float64)
    far = ((z + 1e8).round(decimals=6), (mu - 1e8).round(decimals=6), logvar)
    for fields in (range(4, 7), [ACTIVE, EFFECTIVE]):
        check(latent_statistics, far, server, fields=fields, slack=1e-12)


@IMPLS
def test_an_outlier_in_the_first_row(server: tuple[str, str]) -> None:
    z, mu, logvar = (x.clone() for x in codes(3000, 24))
    for x in (z, mu):
        x[0] += torch.linspace(500, 1500, 24)
    call = functools.partial(latent_statistics, threshold=500.0, temperature=200.0)
    for fields in (None, range(3, 7), [ACTIVE], [EFFECTIVE]):
        check(call, (z, mu, logvar), server, fields=fields, slack=1e-5)


@IMPLS
def test_constant_columns(server: tuple[str, str]) -> None:
    """The variance is exactly 0, the mean exactly the constant, and the gradient of the variance exactly 0."""
    impl, device = server
    z, mu, logvar = (x.clone() for x in codes(1000, 7))
    for x in (z, mu):
        x[:, 2], x[:, 5] = 0.1, -12345.678
    inputs = leaves((z, mu, logvar), device=device)
    values, (grad_z, grad_mu, _) = run(latent_statistics, inputs, impl, fields=[4, 6, 7, 8])
    code = LatentStatistics(*values)
    for mean, variance, x, grad in (
        (code.z_mean, code.z_variance, z, grad_z),
        (code.mu_mean, code.mu_variance, mu, grad_mu),
    ):
        assert not variance[[2, 5]].any() and (variance[[0, 1, 3, 4, 6]] > 0).all()
        assert torch.equal(mean[[2, 5]].cpu(), x[0, [2, 5]])
        assert not grad[:, [2, 5]].any() and grad[:, [0, 1, 3, 4, 6]].any()
    collapsed = leaves((z, torch.full_like(mu, 0.1), logvar), device=device)
    values, (_, grad_mu, _) = run(latent_statistics, collapsed, impl, fields=[MU_VARIANCE, ACTIVE, EFFECTIVE])
    assert values[EFFECTIVE] == 0 and not values[MU_VARIANCE].any() and not grad_mu.any()


@IMPLS
def test_nan_goes_where_it_should(server: tuple[str, str]) -> None:
    nan, column, row = torch.nan, [2], [3]
    masks = check_places(latent_statistics, codes(40, 6), server, {(0, 3, 2): nan})  # z
    assert {NAMES[k]: m.nonzero().flatten().tolist() for k, m in enumerate(masks[:9]) if m.any()} == {
        "z_mean": column,
        "z_variance": column,
    }
    masks = check_places(latent_statistics, codes(40, 6), server, {(2, 3, 2): nan})  # logvar
    assert {NAMES[k]: m.nonzero().flatten().tolist() for k, m in enumerate(masks[:9]) if m.any()} == {
        "kl": row,
        "logvar_mean": row,
        "logvar_square": row,
    }
    assert masks[11].nonzero().tolist() == [[3, 2]] and not masks[9].any() and not masks[10].any()
    masks = check_places(latent_statistics, codes(40, 6), server, {(1, 3, 2): nan})  # mu
    assert {NAMES[k] for k, m in enumerate(masks[:9]) if m.any()} == {
        "kl",
        "mu_mean",
        "mu_variance",
        "active",
        "effective",
    }
    for fields in ([KL], [Z_MEAN], [MU_VARIANCE], [ACTIVE], [EFFECTIVE], [KL, MU_VARIANCE]):
        for k in range(3):
            for number in (nan, -torch.inf):
                check_places(latent_statistics, codes(40, 6), server, {(k, 3, 2): number}, fields=fields)


@only_cpu("latent_statistics")
@pytest.mark.parametrize(("batch", "dims"), [(5000, 70), (40, 3000), (3, 4), (50_000, 1)])
def test_same_bits_at_any_number_of_threads(batch: int, dims: int) -> None:
    check_same_bits(latent_statistics, codes(batch, dims))


def separate(*inputs: torch.Tensor, impl: str | None) -> tuple[torch.Tensor, ...]:
    z, mu, logvar = inputs
    moments = [torch.var_mean(x.double(), 0) for x in (z, mu)]
    columns = [part.to(z.dtype) for variance, mean in moments for part in (mean, variance)]
    kl, units = gaussian_kl(mu, logvar, impl=impl), active_units(mu, impl=impl)
    return kl, logvar.mean(1), logvar.square().mean(1), *columns, *units


@IMPLS
@settings(max_examples=20)
@given(batch=st.integers(2, 40), dims=st.integers(1, 12), seed=st.integers(0, 99), shift=st.integers(-4, 4))
def test_properties(server: tuple[str, str], batch: int, dims: int, seed: int, shift: int) -> None:
    """The results and gradients equal those of the separate ops.

    Samples and dimensions may come in any order.
    """
    impl, device = server
    z, mu, logvar = codes(batch, dims)
    inputs = leaves((z + shift, mu + shift, logvar), device=device)
    close = {"rtol": 1e-4, "atol": 2e-5}
    values, grads = run(latent_statistics, inputs, impl)
    parts, theirs = run(separate, inputs, "reference")
    for name, a, b in zip(
        (*NAMES, "grad z", "grad mu", "grad logvar"), (*values, *grads), (*parts, *theirs), strict=True
    ):
        assert torch.allclose(a, b, **close), name
    order, columns = shuffled(batch, seed, device), shuffled(dims, seed, device)
    moved = latent_statistics(*(x[order][:, columns] for x in inputs), impl=impl)  # type: ignore[misc]
    for k, (a, b) in enumerate(zip(moved, values, strict=True)):
        assert torch.allclose(a, b[order] if k < 3 else b[columns] if k < ACTIVE else b, **close), NAMES[k]
