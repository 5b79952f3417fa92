"""The nine goals. Each is a pure function that returns one raw value per sample, [B]; lower is better.

Every docstring states the formula, the *ideal* (the value that the goal could reach alone) and the *nadir* (a value no
better than that of doing nothing); `NINE` holds both as numbers. B is the number of samples, D that of latents. Goals
of the latent code alone share one call of `bomkern.latent_statistics`. Each goal is a record in `NINE`, from which the
trainer, its presets, plots and reports read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    """Raw values with deficit 0, ``ideal``, and deficit 1, ``nadir``."""

    ideal: float
    nadir: float


class Trivial(NamedTuple):
    """Mean errors of trivial answers on the data, 0-dim each, by which raw values are divided to be comparable."""

    pixel: Tensor  # squared error of the mean-colour image
    ssim: Tensor  # its 1 - SSIM
    edge: Tensor  # its squared edge error, which is the mean squared edge of the data
    perceptual: Tensor  # its filter-bank distance
    colour: Tensor  # squared difference of the mean colours of two unrelated images
    histogram: Tensor  # Cramer distance of their colours
    swap: Tensor  # `cross_recon` of the better trivial swap


def kl_divergence(code: LatentStatistics) -> Tensor:
    """Return the information of the latent about the image in nats, ``KL(N(mu, exp(logvar)) || N(0, I))``.

    Ideal 0 (the prior). Nadir 120, a budget: a code with more information has not compressed the image.
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
    """Compute the total correlation of the latent in nats, ``TC_b - mean(TC of the batch with every column permuted)``.

    The second term is the same estimator for latents that are independent by construction. It removes the offset of the
    first, which depends on B and D. Ideal 0, the sampling floor: single rows scatter around it, and only their mean is
    bounded. Nadir 20.

    Args:
        z, mu, logvar: [B, D].
        order: [B, D] int64, a permutation of the rows for each column.
        impl, group: options of `bomkern.total_correlation`.
    """
    options: Any = {"impl": impl, "process_group": group}
    shuffled = total_correlation(z.gather(0, order), mu.gather(0, order), logvar.gather(0, order), **options)
    ranks = ranks_of(group)
    correlation: Tensor = total_correlation(z, mu, logvar, **options)
    return correlation - ranks.total(shuffled.mean()) / ranks.size


def _row_by_row(fn: Any) -> Any:
    """Mark a function whose rows are independent, so that `bomkern.lazy` need not check it."""
    fn.independent_rows = True
    return fn


@_row_by_row
def correlation_above_chance(
    z: Tensor,
    shuffled: Tensor,
    posterior: tuple[Tensor, Tensor],
    by_chance: tuple[Tensor, Tensor],
    impl: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Compute `disentanglement` for some rows, each less the value of its own row of the batch with permuted columns.

    The mean over all rows is that of `disentanglement`.

    Args:
        z: [R, D], samples of R of the posteriors.
        shuffled: [R, D], the same rows of the batch with every column permuted.
        posterior: mu and logvar, [B, D] each.
        by_chance: mu and logvar with every column permuted, [B, D] each.
        impl, group: options of `bomkern.total_correlation`.
    """
    options: Any = {"impl": impl, "process_group": group}
    by_chance_alone: Tensor = total_correlation(shuffled, *by_chance, **options)
    correlation: Tensor = total_correlation(z, *posterior, **options)
    return correlation - by_chance_alone


def capacity(code: LatentStatistics) -> Tensor:
    """Return the part of the latents that is unused, ``((1 - active) + (1 - effective)) / 2``, in [0, 1].

    ``active`` and ``effective`` are those of `bomkern.active_units`. Ideal 0 (all latents are used alike), nadir 1. The
    value is a property of the batch, the same for every sample.
    """
    return (1 - (code.active + code.effective) / 2).expand(len(code.kl))


def behavioral_separation(
    colour: Tensor, colour_moved: Tensor, edge: Tensor, edge_moved: Tensor, trivial: Trivial
) -> Tensor:
    """Compute the leak between the parts, ``(|colour - colour'|^2 / V_colour + |edge - edge'|^2 / V_edge) / 2``.

    colour' is the mean colour after unit noise on the structure, and edge' the edges after unit noise on the
    appearance. V_colour is the squared difference of unrelated images, V_edge the edge energy of the data. Ideal 0;
    nadir 1: noise on one part changes the domain of the other as much as another image would.

    Args:
        colour, colour_moved: [B, 3]. edge, edge_moved: [B, 2, s, s].
    """
    leak_colour = (colour - colour_moved).square().mean(1) / trivial.colour
    leak_edge = (edge - edge_moved).square().mean((1, 2, 3)) / trivial.edge
    return (leak_colour + leak_edge) / 2


def latent_stats(
    z: Tensor, code: LatentStatistics, impl: str | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the health of the latent: mean squared correlation + weak dimensions + log-variance.

    ``covariance_penalty(z, normalized) / (D - 1) + mean_d max(0, 1 - std(z_d)) + mean_d (logvar_bd / 4)^2``, which is
    never negative. Ideal ``1 / (B - 1)``, the correlation of B samples of independent columns by chance. Nadir 1: every
    latent is a copy of another or without spread, or posteriors are e^2 narrower than the prior.

    Args:
        z: [B, D].
        code: the statistics of the latent code.
        impl, group: options of `bomkern.covariance_penalty`.
    """
    penalty = covariance_penalty(z, normalize=True, reduction="batch", process_group=group, impl=impl)
    correlation = penalty / (z.shape[1] - 1)
    deviation = code.z_variance.clamp(min=1e-12).sqrt()  # the root has no slope at 0
    return correlation + (1 - deviation).clamp(min=0).mean() + code.logvar_square / 16


def reconstruction(recon: Tensor, image: Tensor, recon_edges: Tensor, image_edges: Tensor, trivial: Trivial) -> Tensor:
    """Compute ``0.55 pixel + 0.15 (1 - SSIM) + 0.15 edge + 0.15 perceptual``.

    Each term is divided by its mean for the mean-colour image. Pixel and edge (Sobel) are mean squared errors, and
    perceptual is a distance of `features.early_vision`. Ideal 0; nadir 1, the value of answering every image with its
    own mean colour.

    Args:
        recon, image: [B, 3, S, S].
        recon_edges, image_edges: [B, 2, s, s], their `features.edges`.
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
    """Compute the error of a swap, structure of one image in the colours of another.

    The formula is ``(edge + colour + histogram) / 3 / trivial.swap``: the squared edge error against the structure's
    image, and the squared difference of mean colours and the Cramer distance of colour histograms against the
    appearance's image. Each is divided by its trivial value. Ideal 0; nadir 1, the better of two trivial swaps: the
    appearance's mean colour, and the unchanged image of the structure.

    Args:
        swap, appearance: [B, 3, S, S].
        swap_edges, edges: [B, 2, s, s], edges of the swap and of the structure's image.
    """
    edge = (swap_edges - edges).square().mean((1, 2, 3)) / trivial.edge
    colour = (see.mean_colour(swap) - see.mean_colour(appearance)).square().mean(1) / trivial.colour
    with torch.no_grad():
        target = see.colour_distribution(appearance)
    histogram = (see.colour_distribution(swap) - target).square().mean((1, 2)) / trivial.histogram
    return (edge + colour + histogram) / 3 / trivial.swap


def realism(logits: Tensor) -> Tensor:
    """Compute ``1 - mean over patches of D(recon)``, where D is the discriminator's probability of "photograph".

    Ideal 0.5: the discriminator cannot tell; at lower values it is wrong more often than right. Nadir 1: the
    discriminator is certain.

    Args:
        logits: [B, 1, s, s].
    """
    return 1 - torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).mean((1, 2, 3))


@_row_by_row
def consistency(mean: Tensor, view: Tensor, variance: Tensor, impl: str | None = None) -> Tensor:
    """Compute the variance of the structure over views of one image, relative to its variance over the batch.

    The formula is ``mean_d Var_v(mu_vbd) / mean_d Var_b(mu_0bd)``. The denominator has no gradient, so that shrinking
    the latent does not help. Ideal 0; nadir 1: views differ as much as two images do.

    Args:
        mean, view: [B, D] structure means of the image and of its other view.
        variance: [D], variance of the first view over the batch.
        impl: option of `bomkern.consistency_variance`.
    """
    return consistency_variance(torch.stack([mean, view]), impl=impl) / variance.detach().mean().clamp(min=1e-8)


def trivial_answers(images: Tensor) -> Trivial:
    """Measure the errors of trivial answers on images of the training data, [N, 3, S, S], with unrelated neighbours."""
    other, grey = images.roll(1, 0), see.flat(images)
    edge = see.edges(images).square().mean((1, 2, 3))
    colour = (see.mean_colour(images) - see.mean_colour(other)).square().mean()
    distribution = see.colour_distribution(images)
    histogram = (distribution - distribution.roll(1, 0)).square().mean()
    trivial = Trivial(
        pixel=(images - grey).square().mean(),
        ssim=see.dissimilarity(grey, images).mean(),
        edge=edge.mean(),
        perceptual=see.perceptual_distance(see.early_vision(grey), see.early_vision(images)).mean(),
        colour=colour,
        histogram=histogram,
        swap=torch.ones((), device=images.device),
    )
    as_colour = cross_recon(grey.roll(1, 0), see.edges(grey), see.edges(images), other, trivial).mean()
    unchanged = cross_recon(images, see.edges(images), see.edges(images), other, trivial).mean()
    return trivial._replace(swap=torch.minimum(as_colour, unchanged))


class Step(NamedTuple):
    """The tensors of a step from which goals are computed. Those of images that several goals read are lazy."""

    out: Pass  # the forward pass
    image: Tensor  # [B, 3, S, S]
    logits: Tensor | Lazy  # of the discriminator for out.recon
    order: Tensor  # [B, D] int64, a permutation of the rows for each latent
    trivial: Trivial
    impl: str | None  # the implementation of the statistics that have kernels
    group: dist.ProcessGroup | None  # the processes that share the batch
    by_rows: bool  # whether each goal is computed for some of the rows
    lazy: Callable[..., Any]  # `bomkern.lazy`, or what makes lazies of compiled functions
    code: LatentStatistics
    edges: Tensor | Lazy  # of the image, [B, 2, s, s]
    recon_edges: Tensor | Lazy
    swap_edges: Tensor | Lazy
    moved_edges: Tensor | Lazy  # after noise on the appearance
    colour: Tensor | Lazy  # [B, 3]
    moved_colour: Tensor | Lazy  # after noise on the structure


class Goal(NamedTuple):
    """A goal of the trainer.

    Attributes:
        name: the name in logs, plots and checkpoints.
        value: returns the raw values [B] of a step.
        ideal: see `Anchor`; it may be a function of the batch size.
        nadir: see `Anchor`.
        diagnosis: the hand-set scale of the preset "diagnosis"; None calibrates it.
        moving: whether the anchors move in the preset "moving".
    """

    name: str
    value: Callable[[Step], Tensor | Lazy]
    ideal: float | Callable[[int], float]
    nadir: float
    diagnosis: float | None = None
    moving: bool = False


def _disentanglement(s: Step) -> Tensor | Lazy:
    out = s.out
    if not s.by_rows:
        return disentanglement(out.z, out.mu, out.logvar, s.order, s.impl, s.group)
    z, mu, logvar = (x.gather(0, s.order) for x in (out.z, out.mu, out.logvar))
    options: dict[str, Any] = {"posterior": (out.mu, out.logvar), "by_chance": (mu, logvar)}
    return lazy(partial(correlation_above_chance, **options, impl=s.impl, group=s.group), out.z, z)


def _consistency(s: Step) -> Lazy:
    variance = s.code.mu_variance[: s.out.mean.shape[1]]
    return lazy(partial(consistency, variance=variance, impl=s.impl), s.out.mean, s.out.view)


NINE = (
    Goal("kl_divergence", lambda s: kl_divergence(s.code), 0.0, 120.0),
    Goal(
        "disentanglement",
        _disentanglement,
        ideal=0.0,
        nadir=20.0,
    ),
    Goal("capacity", lambda s: capacity(s.code), 0.0, 1.0, diagnosis=0.4),
    Goal(
        "behavioral_separation",
        lambda s: s.lazy(behavioral_separation, s.colour, s.moved_colour, s.recon_edges, s.moved_edges, s.trivial),
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
        lambda s: s.lazy(reconstruction, s.out.recon, s.image, s.recon_edges, s.edges, s.trivial),
        ideal=0.0,
        nadir=1.0,
    ),
    Goal(
        "cross_recon",
        lambda s: s.lazy(cross_recon, s.out.swap, s.swap_edges, s.edges, s.image.roll(-1, 0), s.trivial),
        ideal=0.0,
        nadir=1.0,
    ),
    Goal("realism", lambda s: s.lazy(realism, s.logits), 0.5, 1.0, diagnosis=2.0, moving=True),
    Goal(
        "consistency",
        _consistency,
        ideal=0.0,
        nadir=1.0,
        diagnosis=500.0,
    ),
)
GOALS = tuple(goal.name for goal in NINE)


OF_IMAGES = behavioral_separation, reconstruction, cross_recon, realism  # functions of rows in plain PyTorch


def anchors(batch_size: int) -> dict[str, Anchor]:
    """Return the ideal and nadir of every goal. Only one ideal depends on the batch size."""
    return {g.name: Anchor(g.ideal(batch_size) if callable(g.ideal) else g.ideal, g.nadir) for g in NINE}
