"""The nine goals. Each is a pure function with one raw value per sample, [B], lower is better.

Every docstring states the formula, the *ideal* (the value a goal could reach alone) and the *nadir* (no better than
doing nothing); `NINE` holds both as numbers. B samples, D latents. Those of the latent code alone share one
`bomkern.latent_statistics` of it. A goal is a record in `NINE`: the trainer, its presets, plots and reports read those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bomkern import LatentStatistics, Lazy, consistency_variance, covariance_penalty, lazy, total_correlation
from bomkern.common.process_group import ranks_of

from . import features as see
from .networks import Pass

RECONSTRUCTION_WEIGHTS = {"pixel": 0.55, "ssim": 0.15, "edge": 0.15, "perceptual": 0.15}


class Anchor(NamedTuple):
    """Deficit 0 at ``ideal``, 1 at ``nadir``."""

    ideal: float
    nadir: float


class Trivial(NamedTuple):
    """Mean errors of trivial answers on the data, 0-dim each: what makes raw values mean the same on any data."""

    pixel: Tensor  # squared error of the mean-colour image
    ssim: Tensor  # its 1 - SSIM
    edge: Tensor  # its squared edge error, which is the mean squared edge of the data
    perceptual: Tensor  # its filter-bank distance
    colour: Tensor  # squared difference of the mean colours of two unrelated images
    histogram: Tensor  # Cramer distance of their colours
    swap: Tensor  # `cross_recon` of the better trivial swap


def kl_divergence(code: LatentStatistics) -> Tensor:
    """Information the latent holds about the image, in nats: ``KL(N(mu, exp(logvar)) || N(0, I))``.

    Ideal 0 (the prior). Nadir 120, a budget: a code that spends more has not compressed.
    """
    return code.kl


def disentanglement(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    order: Tensor,
    impl: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Total correlation of the latent in nats, ``TC_b - mean(TC of the batch with every column permuted)``.

    The second term is the same estimator where the latents are independent by construction; it removes the offset that
    B and D put on the first. Ideal 0, the sampling floor: single rows scatter around it, only their mean is bounded.
    Nadir 20.

    Args:
        z, mu, logvar: [B, D].
        order: [B, D] int64, a permutation of the rows for each column.
        impl, group: of `bomkern.total_correlation`.
    """
    how: Any = {"impl": impl, "process_group": group}
    shuffled = total_correlation(z.gather(0, order), mu.gather(0, order), logvar.gather(0, order), **how)
    ranks = ranks_of(group)
    return total_correlation(z, mu, logvar, **how) - ranks.total(shuffled.mean()) / ranks.size


def capacity(code: LatentStatistics) -> Tensor:
    """Latents that idle: ``((1 - active) + (1 - effective)) / 2`` of `bomkern.active_units`, in [0, 1].

    Ideal 0 (all in use, all alike), nadir 1. A property of the batch, the same for every sample.
    """
    return (1 - (code.active + code.effective) / 2).expand(len(code.kl))


def behavioral_separation(
    colour: Tensor, colour_moved: Tensor, edge: Tensor, edge_moved: Tensor, trivial: Trivial
) -> Tensor:
    """What leaks between the parts: ``(|colour - colour'|^2 / V_colour + |edge - edge'|^2 / V_edge) / 2``.

    colour' is the mean colour after unit noise on the structure, edge' the edges after unit noise on the appearance; V
    are the differences of unrelated images and the edge energy of the data. Ideal 0; nadir 1, noise on one part changes
    the other's business as much as another image would.

    Args:
        colour, colour_moved: [B, 3]. edge, edge_moved: [B, 2, s, s].
    """
    leak_colour = (colour - colour_moved).square().mean(1) / trivial.colour
    leak_edge = (edge - edge_moved).square().mean((1, 2, 3)) / trivial.edge
    return (leak_colour + leak_edge) / 2


def latent_stats(
    z: Tensor, code: LatentStatistics, impl: str | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Health of the latent: mean squared correlation + weak dimensions + log-variance.

    ``covariance_penalty(z, normalized) / (D - 1) + mean_d max(0, 1 - std(z_d)) + mean_d (logvar_bd / 4)^2``. Never
    negative; ideal ``1 / (B - 1)``, what B samples of independent columns correlate by chance. Nadir 1: every latent a
    copy of another, or of no spread, or posteriors e^2 narrower than the prior.

    Args:
        z: [B, D]. code: its statistics. impl, group: of `bomkern.covariance_penalty`.
    """
    penalty = covariance_penalty(z, normalize=True, reduction="batch", process_group=group, impl=impl)
    correlation = penalty / (z.shape[1] - 1)
    deviation = code.z_variance.clamp(min=1e-12).sqrt()  # the root has no slope at 0
    return correlation + (1 - deviation).clamp(min=0).mean() + code.logvar_square / 16


def reconstruction(recon: Tensor, image: Tensor, recon_edges: Tensor, image_edges: Tensor, trivial: Trivial) -> Tensor:
    """``0.55 pixel + 0.15 (1 - SSIM) + 0.15 edge + 0.15 perceptual``, each over its mean for the mean-colour image.

    Pixel and edge (Sobel) are mean squared errors, perceptual is `features.early_vision`. Ideal 0; nadir 1, which is
    what answering every image with its own mean colour costs.

    Args:
        recon, image: [B, 3, S, S]. recon_edges, image_edges: [B, 2, s, s], `features.edges` of them.
    """
    with torch.no_grad():
        target = see.early_vision(image)
    weight = RECONSTRUCTION_WEIGHTS
    return (
        weight["pixel"] / trivial.pixel * (recon - image).square().mean((1, 2, 3))
        + weight["ssim"] / trivial.ssim * see.dissimilarity(recon, image)
        + weight["edge"] / trivial.edge * (recon_edges - image_edges).square().mean((1, 2, 3))
        + weight["perceptual"] / trivial.perceptual * see.perceptual_distance(see.early_vision(recon), target)
    )


def cross_recon(swap: Tensor, swap_edges: Tensor, edges: Tensor, appearance: Tensor, trivial: Trivial) -> Tensor:
    """Structure of one image in the colours of another: ``(edge + colour + histogram) / 3 / trivial.swap``.

    Squared edge error against the structure's image; squared difference of mean colour, and Cramer distance of the
    colour histograms, against the appearance's image; each over its trivial value. Ideal 0; nadir 1, the better of two
    trivial swaps: the appearance's mean colour, and the structure's image unchanged.

    Args:
        swap, appearance: [B, 3, S, S]. swap_edges, edges: [B, 2, s, s], of the swap and of the structure's image.
    """
    edge = (swap_edges - edges).square().mean((1, 2, 3)) / trivial.edge
    colour = (see.mean_colour(swap) - see.mean_colour(appearance)).square().mean(1) / trivial.colour
    with torch.no_grad():
        target = see.colour_distribution(appearance)
    histogram = (see.colour_distribution(swap) - target).square().mean((1, 2)) / trivial.histogram
    return (edge + colour + histogram) / 3 / trivial.swap


def realism(logits: Tensor) -> Tensor:
    """``1 - mean over patches of D(recon)``, D the discriminator's probability of "photograph".

    Ideal 0.5, a discriminator that cannot tell; below it the discriminator is wrong more often than
    right. Nadir 1, certain.

    Args:
        logits: [B, 1, s, s].
    """
    return 1 - torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).mean((1, 2, 3))


def consistency(views: Tensor, variance: Tensor, impl: str | None = None) -> Tensor:
    """How far the structure moves between views of one image: variance over the views / variance over the batch.

    ``mean_d Var_v(mu_vbd) / mean_d Var_b(mu_0bd)``, the denominator without gradient, so that shrinking the latent
    does not help. Ideal 0; nadir 1, views as unlike as two images.

    Args:
        views: [V, B, D] structure means, V >= 2.
        variance: [D], of the first view over the batch.
        impl: of `bomkern.consistency_variance`.
    """
    return consistency_variance(views, impl=impl) / variance.detach().mean().clamp(min=1e-8)


def trivial_answers(images: Tensor) -> Trivial:
    """Measure `Trivial` on images of the training data, [N, 3, S, S] with unrelated neighbours."""
    other, grey = images.roll(1, 0), see.flat(images)
    edge = see.edges(images).square().mean((1, 2, 3))
    colour = (see.mean_colour(images) - see.mean_colour(other)).square().mean()
    distribution = see.colour_distribution(images)
    histogram = (distribution - distribution.roll(1, 0)).square().mean()
    one = torch.ones((), device=images.device)
    found = Trivial(
        pixel=(images - grey).square().mean(),
        ssim=see.dissimilarity(grey, images).mean(),
        edge=edge.mean(),
        perceptual=see.perceptual_distance(see.early_vision(grey), see.early_vision(images)).mean(),
        colour=colour,
        histogram=histogram,
        swap=one,
    )
    as_colour = cross_recon(grey.roll(1, 0), see.edges(grey), see.edges(images), other, found).mean()
    unchanged = cross_recon(images, see.edges(images), see.edges(images), other, found).mean()
    return found._replace(swap=torch.minimum(as_colour, unchanged))


class Step(NamedTuple):
    """What a goal's value is computed from. Tensors that several goals read are here once; those of images are lazy."""

    out: Pass  # the forward pass
    image: Tensor  # [B, 3, S, S]
    logits: Tensor | Lazy  # of the discriminator for out.recon
    order: Tensor  # [B, D] int64, a permutation of the rows for each latent
    trivial: Trivial
    impl: str | None  # the implementation of the statistics that have kernels
    group: dist.ProcessGroup | None  # the processes that share the batch
    code: LatentStatistics
    edges: Tensor  # of the image, [B, 2, s, s]
    recon_edges: Tensor | Lazy
    swap_edges: Tensor | Lazy
    moved_edges: Tensor | Lazy  # after noise on the appearance
    colour: Tensor | Lazy  # [B, 3]
    moved_colour: Tensor | Lazy  # after noise on the structure


class Goal(NamedTuple):
    """A goal of the trainer.

    Attributes:
        name: in logs, plots and checkpoints.
        value: its raw values [B] in a step.
        ideal: may depend on the batch size. nadir: see `Anchor`.
        diagnosis: the hand-set scale of the preset "diagnosis"; None calibrates it.
        moving: whether its anchors move in the preset "moving".
    """

    name: str
    value: Callable[[Step], Tensor | Lazy]
    ideal: float | Callable[[int], float]
    nadir: float
    diagnosis: float | None = None
    moving: bool = False


NINE = (
    Goal("kl_divergence", lambda s: kl_divergence(s.code), 0.0, 120.0),
    Goal(
        "disentanglement",
        lambda s: disentanglement(s.out.z, s.out.mu, s.out.logvar, s.order, s.impl, s.group),
        ideal=0.0,
        nadir=20.0,
    ),
    Goal("capacity", lambda s: capacity(s.code), 0.0, 1.0, diagnosis=0.4),
    Goal(
        "behavioral_separation",
        lambda s: lazy(behavioral_separation, s.colour, s.moved_colour, s.recon_edges, s.moved_edges, s.trivial),
        ideal=0.0,
        nadir=1.0,
    ),
    Goal(
        "latent_stats",
        lambda s: latent_stats(s.out.z, s.code, s.impl, s.group),
        ideal=lambda batch: 1 / (batch - 1),
        nadir=1.0,
    ),
    Goal(
        "reconstruction",
        lambda s: lazy(reconstruction, s.out.recon, s.image, s.recon_edges, s.edges, s.trivial),
        ideal=0.0,
        nadir=1.0,
    ),
    Goal(
        "cross_recon",
        lambda s: lazy(cross_recon, s.out.swap, s.swap_edges, s.edges, s.image.roll(-1, 0), s.trivial),
        ideal=0.0,
        nadir=1.0,
    ),
    Goal("realism", lambda s: lazy(realism, s.logits), 0.5, 1.0, diagnosis=2.0, moving=True),
    Goal(
        "consistency",
        lambda s: consistency(s.out.views, s.code.mu_variance[: s.out.views.shape[2]], s.impl),
        ideal=0.0,
        nadir=1.0,
        diagnosis=500.0,
    ),
)
GOALS = tuple(goal.name for goal in NINE)


def anchors(batch_size: int) -> dict[str, Anchor]:
    """Return the ideal and nadir of every goal. Only one ideal depends on the batch size."""
    return {g.name: Anchor(g.ideal(batch_size) if callable(g.ideal) else g.ideal, g.nadir) for g in NINE}
