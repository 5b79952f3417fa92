"""Test the nine goals and their statistics: shapes, ideals, nadirs and gradients."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("lightning_fabric")

import torch
from torch import Tensor

from bomkern import LatentStatistics, latent_statistics
from bomkern.train import features as see
from bomkern.train import nine_goals as goal

B, D, S = 16, 6, 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int = B, seed: int = 0) -> Tensor:
    """Return smooth coloured images with contours, in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(S, S), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def trivial() -> goal.Trivial:
    return goal.trivial_answers(pictures(64, seed=9))


def permutations(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)).argsort(0)


def test_every_goal_has_an_anchor_and_no_other() -> None:
    anchors = goal.anchors(32)
    assert tuple(anchors) == goal.GOALS and len(goal.GOALS) == 9
    assert all(a.nadir > a.ideal for a in anchors.values())
    assert anchors["realism"].ideal == 0.5 and anchors["latent_stats"].ideal == 1 / 31


def code_of(mu: Tensor, logvar: Tensor | None = None) -> LatentStatistics:
    return latent_statistics(mu, mu, torch.zeros_like(mu) if logvar is None else logvar)


def test_kl_divergence_is_that_of_torch_and_zero_at_the_prior() -> None:
    mu, logvar = draw(B, D), draw(B, D, seed=1)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(goal.kl_divergence(code_of(mu, logvar)), exact)
    assert goal.kl_divergence(code_of(torch.zeros(B, D))).abs().max() == 0


def test_disentanglement_is_total_correlation_less_that_of_permuted_columns() -> None:
    z, mu, logvar, order = draw(B, D), draw(B, D, seed=1), draw(B, D, seed=2), permutations(B, D)

    def definition(*latents: Tensor) -> Tensor:
        z, mu, logvar = latents
        density = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z[:, None])  # [b, i, d]
        return density.sum(2).logsumexp(1) - density.logsumexp(1).sum(1) + (D - 1) * math.log(B)

    apart = definition(*(torch.stack([x[order[:, d], d] for d in range(D)], dim=1) for x in (z, mu, logvar)))
    expected = definition(z, mu, logvar) - apart.mean()
    torch.testing.assert_close(goal.disentanglement(z, mu, logvar, order), expected, rtol=1e-5, atol=1e-4)


def test_disentanglement_takes_the_implementation_asked_for() -> None:
    latents, order = [draw(B, D, seed=k) for k in range(3)], permutations(B, D)
    same = goal.disentanglement(*latents, order, "reference")
    torch.testing.assert_close(goal.disentanglement(*latents, order), same, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        goal.disentanglement(*latents, order, "cuda")


def test_disentanglement_is_zero_for_independent_latents_and_large_for_copies() -> None:
    rows = 512
    order, tight = permutations(rows, 3), torch.full((rows, 3), -3.0)
    mu = draw(rows, 3)
    z = mu + draw(rows, 3, seed=1) * math.exp(-1.5)
    assert goal.disentanglement(z, mu, tight, order).mean().abs() < 0.15
    copies = mu[:, :1].expand(rows, 3)
    z = copies + draw(rows, 3, seed=2) * math.exp(-1.5)
    value = goal.disentanglement(z, copies, tight, order)
    assert value.shape == (rows,) and value.mean() > 1.5


def test_capacity_stays_within_0_and_1() -> None:
    for mu in (torch.zeros(B, D), draw(B, D) * 1e4, torch.eye(B, D) * 1e3, draw(B, D) * 1e-6):
        value = goal.capacity(code_of(mu))
        assert value.shape == (B,) and (value >= 0).all() and (value <= 1).all()
    signs = torch.tensor([[1.0], [-1.0]]).repeat(B // 2, D)
    assert goal.capacity(code_of(signs)).max() < 1e-3  # all dimensions are used alike, which is the ideal
    one = torch.zeros(B, D)
    one[:, 0] = signs[:, 0]
    assert goal.capacity(code_of(one)).min() > (1 - 0.35 + 1 - 1.001 / D) / 2


def test_behavioral_separation_counts_each_leak(trivial: goal.Trivial) -> None:
    image = pictures()
    colour, edge = see.mean_colour(image), see.edges(image)
    still = goal.behavioral_separation(colour, colour, edge, edge, trivial)
    assert still.shape == (B,) and still.abs().max() == 0
    other = image.roll(1, 0)
    moved_colour = goal.behavioral_separation(colour, see.mean_colour(other), edge, edge, trivial)
    moved_edge = goal.behavioral_separation(colour, colour, edge, torch.zeros_like(edge), trivial)
    assert 0.2 < moved_colour.mean() < 1.2 and moved_edge.mean().item() == pytest.approx(0.5, rel=0.3)


def test_latent_stats_at_its_floor_and_at_its_nadir() -> None:
    rows = 4096

    def value_of(z: Tensor, logvar: float = 0.0) -> Tensor:
        return goal.latent_stats(z, code_of(z, torch.full((rows, D), logvar)))

    value = value_of(draw(rows, D))
    assert value.shape == (rows,) and (value >= 0).all() and value.mean() < 0.03
    assert value_of(draw(rows, 1).expand(rows, D)).mean().item() == pytest.approx(1, abs=0.03)
    assert value_of(draw(rows, D), -4.0).mean().item() == pytest.approx(1, abs=0.05)
    assert value_of(draw(rows, D) * 1e-3).mean().item() == pytest.approx(1, abs=0.05)
    collapsed = torch.zeros(rows, D, requires_grad=True)
    value_of(collapsed).sum().backward()
    assert value_of(collapsed).isfinite().all() and collapsed.grad.isfinite().all()
    floors = torch.stack([correlation_alone(draw(B, 40, seed=s)) for s in range(200)])
    assert floors.mean().item() == pytest.approx(goal.anchors(B)["latent_stats"].ideal, rel=0.05)


def correlation_alone(z: Tensor) -> Tensor:
    """Return the correlation's part only: deviations are 1, log-variances 0."""
    z = (z - z.mean(0)) / z.std(0)
    return goal.latent_stats(z, code_of(z)).mean()


def test_reconstruction_is_0_for_the_image_and_1_for_its_mean_colour() -> None:
    images = pictures(64)
    trivial = goal.trivial_answers(images)
    edge = see.edges(images)
    exact = goal.reconstruction(images, images, edge, edge, trivial)
    assert exact.shape == (64,) and exact.abs().max() < 1e-4
    grey = see.flat(images)
    assert goal.reconstruction(grey, images, see.edges(grey), edge, trivial).mean().item() == pytest.approx(1, rel=1e-3)


def test_cross_recon_is_0_for_the_perfect_swap_and_1_for_the_better_trivial_one() -> None:
    images = pictures(64)
    trivial, edge, other = goal.trivial_answers(images), see.edges(images), images.roll(1, 0)
    assert goal.cross_recon(images, edge, edge, images, trivial).abs().max() < 1e-6
    grey = see.flat(other)
    trivials = [
        goal.cross_recon(grey, see.edges(grey), edge, other, trivial).mean().item(),
        goal.cross_recon(images, edge, edge, other, trivial).mean().item(),
    ]
    assert min(trivials) == pytest.approx(1, rel=1e-3)


def test_realism_is_one_half_for_a_discriminator_that_cannot_tell() -> None:
    assert goal.realism(torch.zeros(B, 1, 4, 4)).tolist() == [0.5] * B
    assert goal.realism(torch.full((B, 1, 4, 4), -50.0)).tolist() == [1.0] * B
    assert (goal.realism(torch.full((B, 1, 4, 4), 50.0)) < 1e-6).all()


def test_consistency_is_0_for_equal_views_1_for_unrelated_and_blind_to_scale() -> None:
    def value_of(views: Tensor) -> Tensor:
        return goal.consistency(*views, code_of(views[0]).mu_variance)

    mu = draw(2048, D)
    assert value_of(torch.stack([mu, mu])).abs().max() == 0
    unrelated = torch.stack([mu, draw(2048, D, seed=1)])
    assert value_of(unrelated).mean().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(value_of(unrelated * 1e-2), value_of(unrelated))
    leaf = unrelated.clone().requires_grad_()
    value_of(leaf).sum().backward()
    assert (leaf.grad * leaf).sum() > 0  # shrinking reduces the variance, and the denominator does not compensate


def test_features_of_constant_and_shifted_images() -> None:
    constant = torch.full((2, 3, S, S), 0.3)
    assert see.edges(constant).abs().max() < 1e-6
    assert see.early_vision(constant)[0].max() == pytest.approx(1e-2, rel=1e-3)
    assert see.dissimilarity(constant, constant).abs().max() < 1e-5
    ramp = torch.linspace(0, 1, S).expand(1, 3, S, S)
    across, down = see.edges(ramp)[0]
    torch.testing.assert_close(across, torch.full_like(across, 2 / (S - 1)))
    assert down.abs().max() < 1e-6
    distribution = see.colour_distribution(pictures())
    assert distribution.shape == (B, 6, see.BINS) and (distribution.diff(dim=2) >= 0).all()


def test_ssim_is_that_of_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    a = pictures(4)
    b = (a + 0.1 * draw(4, 3, S, S)).clamp(0, 1)
    theirs = [
        structural_similarity(
            x.double().numpy(),
            y.double().numpy(),
            win_size=7,
            channel_axis=0,
            data_range=1,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert (1 - see.dissimilarity(a, b)).tolist() == pytest.approx(theirs, abs=1e-4)


def test_views_keep_their_range_and_their_contours() -> None:
    image = pictures()
    view = see.photometric(image, draw(B, 6))
    assert view.min() >= 0 and view.max() <= 1 and not torch.equal(view, image)
    torch.testing.assert_close(see.photometric(image, torch.zeros(B, 6)), image)
    a, b = see.edges(image).flatten(1), see.edges(view).flatten(1)
    assert torch.cosine_similarity(a, b).mean() > 0.9
