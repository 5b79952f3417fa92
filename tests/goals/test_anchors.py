"""Test `bomkern.anchors`: each nadir is the loss that the trivial predictor really has on the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bomkern import (
    anchors,
    covariance_penalty,
    gaussian_total_correlation,
    total_correlation,
)
from tests.support.anchors import both, drawn
from tests.support.properties import seeds

few = settings(max_examples=20)


def test_every_function_is_public_and_documented() -> None:
    for name in anchors.__all__:
        assert getattr(anchors, name).__doc__
    assert sorted(anchors.__all__) == list(anchors.__all__)


# Against the loss of the trivial predictor.

Loss = Callable[[Tensor, Tensor], Tensor]
Answer = Callable[[Tensor], Tensor]
REGRESSION: dict[str, tuple[Any, Loss, Answer]] = {
    "mse": (anchors.mse, F.mse_loss, lambda y: y.mean(0)),
    "mae": (anchors.mae, F.l1_loss, lambda y: y.median(0).values),
}


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("shape", [(7,), (64, 5), (33, 3, 4, 4)])
def test_regression(name: str, shape: tuple[int, ...]) -> None:
    anchor, loss, trivial = REGRESSION[name]
    y = 3 * drawn(*shape) + 10
    answer = trivial(y).expand_as(y)
    assert both(anchor(y)) == (0.0, pytest.approx(loss(answer, y).item(), rel=1e-13))
    total = loss(answer, y).item() * y[0].numel()
    assert both(anchor(y, reduction="sum")) == (0.0, pytest.approx(total, rel=1e-13))


@pytest.mark.parametrize("name", REGRESSION)
def test_no_other_constant_is_better(name: str) -> None:
    anchor, loss, trivial = REGRESSION[name]
    y = drawn(50).exp()
    for away in (-0.1, 0.01, 0.3):
        assert loss((trivial(y) + away).expand_as(y), y) > both(anchor(y))[1]


@pytest.mark.parametrize("shape", [(200,), (8, 6, 6)])
def test_cross_entropy(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1))
    labels[0] = -100
    counts = labels[labels >= 0].bincount(minlength=5).double()
    logits = (counts / counts.sum()).log().view(1, 5, *(1,) * (len(shape) - 1)).expand(shape[0], 5, *shape[1:])
    loss = F.cross_entropy(logits, labels).item()
    assert both(anchors.cross_entropy(labels)) == (0.0, pytest.approx(loss, rel=1e-13))
    assert both(anchors.per_token(labels)) == both(anchors.cross_entropy(labels, 5))
    assert both(anchors.cross_entropy(counts=counts, classes=5)) == both(anchors.cross_entropy(labels))


def test_cross_entropy_with_class_weights() -> None:
    labels, weight = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)
    counts = weight * labels.bincount()
    logits = (counts / counts.sum()).log().expand(6, 3)
    nadir = both(anchors.cross_entropy(counts=counts))[1]
    assert nadir == pytest.approx(F.cross_entropy(logits, labels, weight).item(), rel=1e-13)


def test_cross_entropy_of_classes_alone() -> None:
    assert both(anchors.cross_entropy(classes=10)) == (0.0, pytest.approx(math.log(10)))


@pytest.mark.parametrize("soft", [False, True])
def test_binary_cross_entropy(soft: bool) -> None:
    y = torch.sigmoid(2 * drawn(40, 3))
    y = y if soft else (y > 0.6).double()
    loss = F.binary_cross_entropy(y.mean(0).expand_as(y), y).item()
    perfect = F.binary_cross_entropy(y, y).item()
    assert both(anchors.bce(y)) == (pytest.approx(perfect, abs=1e-14), pytest.approx(loss, rel=1e-13))
    assert both(anchors.bce(y, reduction="sum"))[1] == pytest.approx(3 * loss, rel=1e-13)
    assert both(anchors.bce(y))[0] > 0.3 if soft else both(anchors.bce(y > 0.5)) == both(anchors.bce(y))


def test_a_contrastive_loss_of_a_collapsed_code() -> None:
    code = F.normalize(torch.ones(16, 4, dtype=torch.float64), dim=1)
    loss = F.cross_entropy(code @ code.T / 0.1, torch.arange(16))
    assert both(anchors.info_nce(16)) == (0.0, pytest.approx(loss.item(), rel=1e-13))


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (2, 1, 9, 21)])
def test_ssim_of_mean_colours_is_that_of_the_trainer(shape: tuple[int, ...]) -> None:
    see = pytest.importorskip("bomkern.train.features")
    images = torch.sigmoid(drawn(*shape))
    loss = see.dissimilarity(see.flat(images), images).mean().item()
    assert both(anchors.ssim(images)) == (0.0, pytest.approx(loss, rel=1e-10))
    assert both(anchors.ssim(images, maximize=True)) == (1.0, pytest.approx(1 - loss, rel=1e-8))


def test_ssim_by_a_function_of_the_user() -> None:
    images = torch.sigmoid(drawn(300, 3, 8, 8)).float()

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.float32
        return F.cosine_similarity(a.flatten(1), b.flatten(1))

    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    expected = similarity(flat, images).mean().item()
    assert both(anchors.ssim(images, maximize=True, similarity=similarity))[1] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="similarity must be finite"):
        anchors.ssim(images, similarity=lambda a, b: math.nan)


def test_ssim_of_another_range() -> None:
    images = torch.sigmoid(drawn(4, 3, 8, 8))
    assert both(anchors.ssim(255 * images, data_range=255.0))[1] == pytest.approx(both(anchors.ssim(images))[1])
    with pytest.raises(ValueError, match=r"images must not exceed data_range, 1, got .* write data_range=2\d\d"):
        anchors.ssim(255 * images)


def test_covariance_by_chance_and_with_copies() -> None:
    batch, dims = 64, 12
    chance = torch.stack([covariance_penalty(drawn(batch, dims, seed=s), normalize=True).mean() for s in range(200)])
    copies = [drawn(batch, dims // 3, seed=s).repeat(1, 3) for s in range(200)]
    copied = torch.stack([covariance_penalty(z, normalize=True).mean() for z in copies])
    ideal, nadir = both(anchors.covariance(batch, dims))
    assert (ideal, nadir) == (pytest.approx(11 / 63), pytest.approx(11 / 63 + 2))
    assert chance.mean().item() == pytest.approx(ideal, rel=0.03)
    assert copied.mean().item() == pytest.approx(nadir, rel=0.03)
    assert both(anchors.covariance(64, 2))[1] == 1  # one copy is all there can be
    one = drawn(64, 1, seed=0).expand(64, 4)  # all latents are one: nothing is worse
    assert both(anchors.covariance(64, 4, copies=9))[1] == pytest.approx(
        float(covariance_penalty(one, normalize=True).mean())
    )


def test_variance_hinge_of_a_collapsed_code() -> None:
    collapsed = torch.full((8, 4), 2.0)
    loss = (1 - collapsed.std(0)).clamp(min=0).mean()
    assert both(anchors.variance_hinge()) == (0.0, loss.item())


@pytest.mark.parametrize("options", [{}, {"dataset_size": 4000, "estimator": "mss"}, {"dataset_size": 4000}])
def test_total_correlation_of_independent_latents(options: dict[str, Any]) -> None:
    batch, dims, deviation = 64, 6, 0.4
    values = []
    for seed in range(100):
        mu, noise = drawn(2, batch, dims, seed=seed)
        mu = mu * math.sqrt(1 - deviation**2)
        z, logvar = mu + deviation * noise, torch.full_like(mu, 2 * math.log(deviation))
        values.append(total_correlation(z, mu, logvar, **options).mean())
    ideal, nadir = both(anchors.total_correlation(batch, dims, deviation=deviation, **options))
    assert torch.stack(values).mean().item() == pytest.approx(ideal, abs=0.1)
    assert both(anchors.total_correlation(batch, dims, deviation=deviation, relative=True)) == (
        0.0,
        pytest.approx(nadir - ideal),
    )


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("trained", [False, True])
def test_total_correlation_of_copies(copies: int, trained: bool) -> None:
    """The nadir adds what the closed form measures of samples, if groups of latents share their means."""
    batch, dims, deviation = 20_000, 12, 0.5
    means, noise = drawn(2, batch, dims)
    size = torch.linspace(0.5, 3, dims) if trained else torch.full((dims,), math.sqrt(1 - deviation**2))
    gap = 0.0
    for first in range(copies + 1):  # each latent is copied in one of these
        mu = means * size
        own = first + torch.arange(0, dims, copies + 1)
        z = mu[:, own].repeat_interleave(copies + 1, 1) + deviation * noise
        gap += gaussian_total_correlation(z).item() / (copies + 1)
    options: dict[str, Any] = {"copies": copies, "relative": True, "deviation": deviation}
    if trained:
        options["posteriors"] = (means * size, torch.full_like(means, 2 * math.log(deviation)))
    assert both(anchors.total_correlation(128, dims, **options))[1] == pytest.approx(gap, rel=0.03)


def test_total_correlation_of_given_posteriors() -> None:
    mu, logvar = drawn(256, 5), drawn(256, 5, seed=1) - 2
    mu[:, 1] = mu[:, 0]  # copies count as independent in the ideal
    ideal, _ = both(anchors.total_correlation(128, 5, posteriors=(mu, logvar)))
    values = []
    for seed in range(50):
        order = torch.rand(256, 5, generator=torch.Generator().manual_seed(seed)).argsort(0)[:128]
        m, v = mu.gather(0, order), logvar.gather(0, order)
        values.append(total_correlation(m + torch.exp(v / 2) * drawn(128, 5, seed=seed), m, v).mean())
    assert ideal == pytest.approx(torch.stack(values).mean().item(), abs=0.05)
    assert both(anchors.total_correlation(128, 5, posteriors=(mu.numpy(), logvar.float())))[0] == pytest.approx(
        ideal, abs=1e-4
    )


def test_the_misfits_of_u_equal_to_zero() -> None:
    f, g = 5 * drawn(100), drawn(30, 2)
    for anchored, data in (
        (anchors.residual(f), f),
        (anchors.boundary(g), g),
        (anchors.initial(g), g),
        (anchors.boundary(g, scale=1e-3), g),
    ):
        assert both(anchored) == (0.0, pytest.approx(F.mse_loss(torch.zeros_like(data), data).item(), rel=1e-13))


def test_a_boundary_of_zeros_takes_the_scale_of_the_solution() -> None:
    """The scale is exact for the first eigenfunction, which solves the equation with the largest amplitude."""
    x, y = torch.meshgrid(torch.arange(64) / 64 * 3, torch.arange(64) / 64 * 0.5, indexing="ij")
    u = torch.sin(math.pi * x / 3) * torch.sin(math.pi * y / 0.5)
    source = (math.pi**2 / 9 + math.pi**2 / 0.25) * u
    scale = anchors.solution_scale(source.flatten(), [3.0, 0.5])
    assert scale == pytest.approx(u.double().square().mean().sqrt().item(), rel=1e-6)
    assert both(anchors.boundary(torch.zeros(10), scale=scale)) == (0.0, pytest.approx(scale**2))
    assert both(anchors.initial([0.0, 0.0], scale=2.0)) == (0.0, 4.0)


def test_budgets() -> None:
    assert both(anchors.kl_budget(120)) == (0.0, 120.0)
    assert both(anchors.discriminator()) == (0.5, 1.0)


# Properties.

scales = st.floats(0.01, 100).flatmap(lambda x: st.sampled_from([x, -x]))


@few
@given(seeds, scales, st.floats(-100, 100), st.integers(2, 40))
def test_regression_scales_with_its_targets(seed: int, a: float, shift: float, n: int) -> None:
    y = drawn(n, 3, seed=seed)
    assert both(anchors.mse(a * y + shift))[1] == pytest.approx(a * a * both(anchors.mse(y))[1], rel=1e-6)
    assert both(anchors.mae(a * y + shift))[1] == pytest.approx(abs(a) * both(anchors.mae(y))[1], rel=1e-6)
    assert both(anchors.residual(a * y))[1] == pytest.approx(a * a * both(anchors.residual(y))[1], rel=1e-9)
    assert both(anchors.boundary(a * y))[1] == pytest.approx(a * a * both(anchors.boundary(y))[1], rel=1e-9)
    scale = anchors.solution_scale(y, [abs(a)] * 2)  # longer sides, larger solutions
    assert scale == pytest.approx(a * a * anchors.solution_scale(y, [1, 1]), rel=1e-9)


@few
@given(seeds, st.integers(2, 30))
def test_the_absolute_error_is_below_the_root_of_the_squared_one(seed: int, n: int) -> None:
    y = drawn(n, seed=seed)
    assert both(anchors.mae(y))[1] <= math.sqrt(both(anchors.mse(y))[1]) * (1 + 1e-9)


@few
@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.permutations(range(10)), st.integers(1, 4))
def test_entropy_depends_on_frequencies_alone(labels: list[int], names: list[int], times: int) -> None:
    assume(len(set(labels)) > 1)
    nadir = both(anchors.cross_entropy(labels, 10))[1]
    assert 0 < nadir <= math.log(len(set(labels))) + 1e-12
    assert both(anchors.per_token([names[c] for c in labels] * times))[1] == pytest.approx(nadir, rel=1e-12)


@few
@given(seeds, st.floats(0.05, 0.95))
def test_binary_entropy_is_even_and_below_log_2(seed: int, rate: float) -> None:
    y = torch.rand(30, 2, generator=torch.Generator().manual_seed(seed)).double() < rate
    assume(bool((y != y[0]).any()))
    ideal, nadir = both(anchors.bce(y))
    assert ideal == 0 and nadir <= math.log(2) + 1e-12
    assert both(anchors.bce(~y))[1] == pytest.approx(nadir, rel=1e-9)


@few
@given(st.integers(3, 4096), st.integers(2, 512))
def test_the_floor_of_a_covariance_is_below_its_nadir(batch: int, dims: int) -> None:
    ideal, nadir = both(anchors.covariance(batch, dims))
    assert 0 < ideal < nadir and nadir - ideal <= dims - 1 + 1e-9
    assert both(anchors.covariance(2 * batch, dims))[0] < ideal
