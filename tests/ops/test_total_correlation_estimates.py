"""Test the estimates of total correlation: their targets, their bias, and the closed form for Gaussians."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.convergence_total_correlation import DATASET_SIZE, Gaussians
from bomkern import gaussian_total_correlation, total_correlation

SETTING = Gaussians(dims=6, correlation=0.6, variance=0.5)
CORRELATED = torch.tensor([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 9.0]], dtype=torch.float64)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_of(covariance: Tensor) -> float:
    return float(covariance.diagonal().log().sum() - covariance.logdet()) / 2


def with_covariance(covariance: Tensor, rows: int) -> Tensor:
    """Return float64 samples whose sample covariance equals ``covariance``."""
    x = draw(rows, len(covariance), dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(rows - 1)
    return white @ torch.linalg.cholesky(covariance).T


# total_correlation with a known true value.


def errors(batch: int, repeats: int, **estimator: Any) -> tuple[float, float]:
    """Return the bias in nats and its standard error.

    Subtracting each sample's true value cancels the scatter between batches.
    """
    source = torch.Generator().manual_seed(batch)
    normal = torch.distributions.MultivariateNormal(torch.zeros(SETTING.dims), SETTING.covariance().float())
    alone = torch.distributions.Normal(0.0, math.sqrt(SETTING.covariance()[0, 0]))
    found = []
    for _ in range(repeats):
        z, mu, logvar = SETTING.draw(batch, source)
        truth = normal.log_prob(z) - alone.log_prob(z).sum(1)
        found.append((total_correlation(z, mu, logvar, **estimator) - truth).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std()) / math.sqrt(repeats)


SIZES = ((32, 64), (128, 32), (512, 12))  # sizes and numbers of batches


def test_plain_estimate_converges_within_its_bound() -> None:
    """The plain mean estimates the batch's own mixture q_B without bias, and E KL(q_B || q) <= log(1 + chi2 / B).

    So its bias for q lies between -sum_d log(1 + chi2_d / B) and log(1 + chi2 / B).
    """
    together, alone = SETTING.information()
    biases = []
    for batch, repeats in SIZES:
        bias, error = errors(batch, repeats)
        biases.append(bias)
        low, high = -SETTING.dims * math.log1p(alone / batch), math.log1p(together / batch)
        assert low - 4 * error <= bias <= high + 4 * error, (batch, bias, error)
    assert biases[0] > 1.5 * biases[1] > 1.5**2 * biases[2] > 0, biases
    assert biases[2] < 0.07 < SETTING.exact() / 10


def test_stratified_estimate_converges_from_below() -> None:
    biases = [errors(batch, repeats, dataset_size=DATASET_SIZE, estimator="mss")[0] for batch, repeats in SIZES]
    assert biases[0] < 1.5 * biases[1] < 1.5**2 * biases[2] < 0, biases
    assert biases[2] > -0.07


def test_mws_is_plain_and_an_offset() -> None:
    x = SETTING.draw(128, torch.Generator().manual_seed(0))
    offset = (SETTING.dims - 1) * math.log(5000)
    torch.testing.assert_close(total_correlation(*x, 5000, "mws"), total_correlation(*x) + offset)


def test_the_offsets_that_the_docstring_states() -> None:
    """Independent latents, mu ~ N(0, 1), deviations 0.5, D = 10, N = 4,000, B = 256."""
    n, batch, dims = 4000, 256, 10
    mu = draw(n, dims)
    z, logvar = mu + 0.5 * draw(n, dims, seed=1), torch.full((n, dims), math.log(0.25))
    each = [-2 * (z[:1000, None, d] - mu[:, d]).square() for d in range(dims)]  # D tensors [1000, N]; constants cancel
    mixture = sum(each).logsumexp(1) - sum(t.logsumexp(1) for t in each) + (dims - 1) * math.log(n)
    assert mixture.mean().item() == pytest.approx(1.0, abs=0.1)

    # without the last, which is not full
    batches = list(zip(*(x.split(batch) for x in (z, mu, logvar)), strict=True))[:15]

    def mean(*arguments: Any) -> float:
        return torch.stack([total_correlation(*x, *arguments).mean() for x in batches]).mean().item()

    assert mean(n, "mss") == pytest.approx(0.6, abs=0.1)
    assert mean() == pytest.approx(2.7, abs=0.1)
    assert mean(n, "mws") == pytest.approx(77.4, abs=0.1)


def test_permuted_columns_give_the_value_of_independent_latents() -> None:
    """Independent latents are near 0 relative to the docstring's ideal, and far from 0 without it."""
    independent, dependent = Gaussians(6, 0.0, 0.25), Gaussians(6, 0.8, 0.25)
    values = {}
    for setting in (independent, dependent):
        x = setting.draw(512, torch.Generator().manual_seed(1))
        order = torch.rand(512, 6, generator=torch.Generator().manual_seed(2)).argsort(0)
        floor = total_correlation(*(t.gather(0, order) for t in x)).mean()
        values[setting] = total_correlation(*x).mean() - floor, floor
    assert values[independent][0].abs() < 0.05 < 0.3 < values[independent][1]
    assert values[dependent][0] > 0.5 * dependent.exact()


# gaussian_total_correlation.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.half, 1e-3)]
)
def test_gaussian_is_exact_for_a_known_covariance(dtype: torch.dtype, tolerance: float) -> None:
    value = gaussian_total_correlation(with_covariance(CORRELATED, 200).to(dtype))
    assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(exact_of(CORRELATED), abs=tolerance)


def test_gaussian_sees_neither_shift_nor_scale_nor_order_and_is_zero_for_one_latent() -> None:
    z = with_covariance(CORRELATED, 200).float()
    scale = torch.tensor([1e-30, 1.0, -1e30])
    for same in (z + torch.tensor([10.0, -3.0, 0.5]), z * scale, z[:, [2, 0, 1]], z.repeat(2, 1), z.T.contiguous().T):
        torch.testing.assert_close(gaussian_total_correlation(same).item(), exact_of(CORRELATED), rtol=0, atol=3e-6)
    assert gaussian_total_correlation(z[:, :1]).abs() < 1e-6


def test_gaussian_gradients() -> None:
    z = draw(7, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_total_correlation, z)
    assert torch.autograd.gradgradcheck(gaussian_total_correlation, z)


def test_gaussian_floor_of_independent_columns() -> None:
    rows, dims, repeats = 100, 6, 400
    values = torch.stack([gaussian_total_correlation(draw(rows, dims, seed=s)) for s in range(repeats)])
    # 1 - R^2 of a column given k others is Beta((B - 1 - k) / 2, k / 2). Its mean log is a difference of digammas.
    half = (rows - 1 - torch.arange(dims, dtype=torch.float64)) / 2
    exact = (torch.digamma(half[0]) - torch.digamma(half)).sum().item() / 2
    assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / math.sqrt(repeats))
    assert exact == pytest.approx(dims * (dims - 1) / (4 * (rows - 1)), rel=0.05)
    assert (values > -1e-6).all()


def test_gaussian_converges_to_the_exact_value() -> None:
    error = {}
    for batch in (64, 1024, 16384):
        source = torch.Generator().manual_seed(batch)
        found = [gaussian_total_correlation(SETTING.draw(batch, source)[0]).item() for _ in range(16)]
        error[batch] = math.sqrt(sum((value - SETTING.exact()) ** 2 for value in found) / len(found))
    assert error[64] > 2 * error[1024] > 4 * error[16384] and error[16384] < 0.02


def dependent(kind: str, dtype: torch.dtype) -> Tensor:
    z = draw(300, 5, dtype=dtype)
    z[:, 4] = {
        "zero": torch.zeros(300),
        "constant": torch.full((300,), 0.1),  # the mean of 300 such numbers rounds to another number
        "copy": z[:, 0],
        "affine": 3 * z[:, 1] - 1.7,
        "sum": z[:, 0] - 2 * z[:, 2] + z[:, 3],
    }[kind]
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "constant", "copy", "affine", "sum"])
def test_gaussian_is_inf_without_gradient_where_a_column_is_no_latent(kind: str, dtype: torch.dtype) -> None:
    z = dependent(kind, dtype).requires_grad_()
    value = gaussian_total_correlation(z)
    assert value.item() == math.inf
    assert torch.autograd.grad(value, z)[0].abs().max() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gaussian_is_nan_where_z_is_not_finite(bad: float) -> None:
    z = draw(20, 3)
    z[4, 1] = bad
    assert gaussian_total_correlation(z).isnan()


@pytest.mark.parametrize(
    ("z", "error", "message"),
    [
        ([[1.0]], TypeError, "z must be a tensor, got list"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, "z must be float16.*got torch.int64"),
        (torch.ones(4), ValueError, r"z must have shape \[B, D\].*got \[4\]"),
        (torch.ones(2, 5, 2), ValueError, r"z must have shape .*got \[2, 5, 2\]"),
        (torch.ones(3, 3), ValueError, r"z must have .* more samples than dimensions, got \[3, 3\]"),
        (torch.ones(3, 0), ValueError, r"z must have .*got \[3, 0\]"),
    ],
)
def test_gaussian_names_what_is_wrong(z: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gaussian_total_correlation(z)
