"""Anchors that nobody has to invent: each function returns a `bomkern.Anchored` made of what the user already has.

They are skill scores (Murphy 1988, "Skill scores based on the mean square error and their relationships to the
correlation coefficient"): deficit 0 is a perfect answer, and deficit 1 is the loss of the trivial predictor, which has
seen the targets but no input. Data may be tensors of any device and float dtype, NumPy arrays or sequences. They are
read in float64, a part at a time; random generators are left as they are. All losses are means over the samples.

Data that are not finite, empty or of the wrong kind raise a ValueError or TypeError that names the argument. So do data
for which the trivial answer is perfect, since no nadir follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .common.checks import check_flag, check_whole, finite_number
from .common.data_values import columns_of, counts_of_labels, in_float64, samples_of, tensor_of
from .goals.policies import Anchored
from .goals.trivial_losses import Latents, loss_of_flat_images

__all__ = [
    "bce",
    "boundary",
    "covariance",
    "cross_entropy",
    "discriminator",
    "info_nce",
    "initial",
    "kl_budget",
    "mae",
    "mse",
    "per_token",
    "residual",
    "solution_scale",
    "ssim",
    "total_correlation",
    "variance_hinge",
]
_LEAST = 1e-12  # a nadir nearer to its ideal than this part of it is rounding


def mse(targets: object, *, reduction: str = "mean") -> Anchored:
    """Anchor a squared error: 0, and the variance of the targets.

    The nadir is ``mean over outputs of Var(y)``, the error of answering the mean of the data. Deficits are then
    ``1 - R^2``. For the error of an answer that sees a part of the input, such as each image's mean colour, give that
    error: ``Anchored(0.0, float(((images - flat) ** 2).mean()))``.

    Args:
        targets: [N, ...], as the loss sees them.
        reduction: "mean" for a loss that is a mean over all elements of a sample, "sum" for their sum.
    """
    total = 0.0
    samples, outputs = _read("targets", targets, reduction)
    for part in columns_of("targets", samples):
        away = part - part[0]  # exactly 0 if all are equal
        total += float((away - away.mean(0)).square().mean(0).sum())
    return _anchored("targets", 0.0, total / outputs)


def mae(targets: object, *, reduction: str = "mean") -> Anchored:
    """Anchor an absolute error: 0, and the mean absolute deviation from the median.

    The nadir is ``mean over outputs of mean |y - median(y)|``, the error of the best constant answer.

    Args:
        targets: [N, ...], as the loss sees them.
        reduction: see `mse`.
    """
    total = 0.0
    samples, outputs = _read("targets", targets, reduction)
    for part in columns_of("targets", samples):
        total += float((part - part.median(0).values).abs().mean(0).sum())
    return _anchored("targets", 0.0, total / outputs)


def cross_entropy(
    labels: object = None, classes: int | None = None, *, counts: object = None, ignore_index: int = -100
) -> Anchored:
    """Anchor the cross-entropy of classes: 0, and the entropy of their frequencies in nats.

    The nadir is ``-sum_c p_c log p_c``, the loss of answering every sample with the frequencies p of the data.

    Args:
        labels: whole numbers of any shape, at least 0: [N], or [N, H, W] of a segmentation.
        classes: the number of classes, which all labels must be below. Without labels or counts, classes count as
            equally frequent: the nadir is ``log(classes)``.
        counts: in place of labels, how often each class occurs, [C]. For a loss with class weights w and
            ``reduction="mean"`` it is ``w * counts``.
        ignore_index: the label that the loss leaves out.
    """
    if classes is not None:
        classes = check_whole("classes", classes, 2)
    if labels is not None and counts is not None:
        raise TypeError("cross_entropy: give labels or counts, got both")
    if counts is not None:
        seen = in_float64("counts", tensor_of("counts", counts))
        if seen.dim() != 1 or not len(seen) or float(seen.min()) < 0 or float(seen.sum()) == 0:
            raise ValueError(f"counts must be [C], at least 0 and not all 0, got {_short(seen)}")
        if classes is not None and len(seen) != classes:
            raise ValueError(f"counts must have one entry for each of the {classes} classes, got {len(seen)}")
        return _entropy("counts", seen)
    if labels is not None:
        seen, most = counts_of_labels("labels", labels, ignore_index)
        if classes is not None and most >= classes:
            raise ValueError(f"labels must be below classes, {classes}, got {most}")
        return _entropy("labels", seen)
    if classes is None:
        raise TypeError("cross_entropy: give labels, counts or classes, got none of them")
    return _entropy("classes", torch.ones(classes, dtype=torch.float64, device="cpu"))


def bce(labels: object, *, reduction: str = "mean") -> Anchored:
    """Anchor a binary cross-entropy: the entropy of the labels themselves, and of their frequencies, in nats.

    With ``H(p) = -p log p - (1 - p) log(1 - p)`` the nadir is ``mean over outputs of H(mean y)``, the loss of the
    frequencies. The ideal is ``mean H(y)``, the loss of a perfect answer. It is 0 for labels of 0 and 1, and above 0
    for soft ones, such as the grey values of pixels.

    Args:
        labels: [N, ...], bools or numbers in [0, 1].
        reduction: see `mse`.
    """
    given = tensor_of("labels", labels)
    given = given.to(torch.int16) if given.dtype in (torch.bool, torch.uint8) else given
    low = high = 0.0
    samples, outputs = _read("labels", given, reduction)
    for part in columns_of("labels", samples):
        if float(part.min()) < 0 or float(part.max()) > 1:
            raise ValueError(
                f"labels must lie in [0, 1], got {_short(part)}: cross_entropy takes more classes than two"
            )
        low += float(_binary_entropy(part).mean(0).sum())
        high += float(_binary_entropy(part.mean(0)).sum())
    return _anchored("labels", low / outputs, high / outputs)


def per_token(tokens: object, ignore_index: int = -100) -> Anchored:
    """Anchor the cross-entropy of a language model, in nats per token: 0, and the entropy of the unigrams.

    The nadir is the loss of answering each position with the frequencies of the tokens. No model reaches 0 on text;
    with a reference model at hand, name its loss as the ideal: ``Anchored(reference, per_token(tokens).nadir)``.

    Args:
        tokens: whole numbers of any shape, [N, T].
        ignore_index: the token that the loss leaves out, such as that of padding.
    """
    return _entropy("tokens", counts_of_labels("tokens", tokens, ignore_index)[0])


def info_nce(batch: int) -> Anchored:
    """Anchor a contrastive loss: 0, and ``log(B)``.

    The nadir is the loss of a code that tells no candidate from another (van den Oord et al. 2018, "Representation
    learning with contrastive predictive coding").

    Args:
        batch: B, the number of candidates among which each sample must find its own. It is the batch size for CLIP and
            ``2 * batch size - 1`` for SimCLR; over several processes, that of all of them.
    """
    return Anchored(0.0, math.log(check_whole("batch", batch, 2)))


def ssim(
    images: object,
    *,
    maximize: bool = False,
    similarity: Callable[[Tensor, Tensor], Tensor | float] | None = None,
    data_range: float = 1.0,
) -> Anchored:
    """Anchor a structural similarity (Wang et al. 2004): a perfect copy, and each image's mean colour.

    For the dissimilarity ``1 - SSIM`` the ideal is 0 and the nadir ``mean(1 - SSIM(flat, image))``, where every pixel
    of ``flat`` is the mean of its channel in that image. With ``maximize`` they are 1 and ``mean(SSIM(flat, image))``.

    Args:
        images: [N, C, H, W].
        maximize: whether the raw value of the goal is SSIM itself.
        similarity: the SSIM that the goal uses, as a function of two batches of images that returns [n] or a mean. None
            is the mean over a uniform 7 x 7 window, without padding.
        data_range: the largest possible value minus the smallest.
    """
    check_flag("maximize", maximize)
    loss = loss_of_flat_images(
        samples_of("images", images), similarity, finite_number("data_range", data_range, above=0)
    )
    if loss <= _LEAST:
        _refuse("images", "each is of one colour")
    return Anchored(1.0, 1 - loss) if maximize else Anchored(0.0, loss)


def kl_budget(nats: float) -> Anchored:
    """Anchor a KL divergence from the prior: 0, and a budget of information.

    No trivial answer is bad at it: a code that holds nothing is perfect. So the nadir is what a code may cost.

    Args:
        nats: > 0, for each sample. One latent that tells e^2 values apart costs about 2.
    """
    return Anchored(0.0, finite_number("nats", nats, above=0))


def discriminator() -> Anchored:
    """Anchor the probability that a live discriminator takes a sample for a fake, ``1 - sigmoid(logits)``: 0.5 and 1.

    A good discriminator that cannot tell says 0.5 (Goodfellow et al. 2014, "Generative adversarial nets"). The nadir is
    a discriminator that is certain. ``-log sigmoid(logits)`` has the ideal log 2 and no nadir.
    """
    return Anchored(0.5, 1.0)


def covariance(batch: int, dims: int, *, copies: int = 2) -> Anchored:
    """Anchor `bomkern.covariance_penalty`, of one code: chance, and latents that each have ``copies`` copies.

    The floor is ``(D - 1) / (B - 1)``, the sum of squared correlations over D of independent columns. The nadir is
    ``floor + copies``: each exact copy adds 1. All latents being one, D - 1, is the most that a code can reach, and too
    far away to pull at one. Both hold for ``normalize=True``, and for columns whose variance is 1, as VICReg's hinge
    makes them.

    Args:
        batch: B, at least 3, over all processes.
        dims: D, at least 2.
        copies: > 0; no more than ``dims - 1`` are possible.
    """
    check_whole("batch", batch, 3)
    check_whole("dims", dims, 2)
    floor = (dims - 1) / (batch - 1)
    return Anchored(floor, min(floor + check_whole("copies", copies), dims - 1))


def variance_hinge(target: float = 1.0) -> Anchored:
    """Anchor VICReg's ``mean_d max(0, target - std(z_d))`` (Bardes et al. 2022): 0, and a collapsed code.

    Args:
        target: > 0, the standard deviation that is asked for; the nadir.
    """
    return Anchored(0.0, finite_number("target", target, above=0))


def total_correlation(
    batch: int,
    dims: int,
    *,
    deviation: float = 0.5,
    posteriors: tuple[Tensor, Tensor] | None = None,
    copies: int = 2,
    dataset_size: int | None = None,
    estimator: str = "mws",
    relative: bool = False,
) -> Anchored:
    """Anchor `bomkern.total_correlation`: independent latents, and latents whose means each have ``copies`` copies.

    The ideal is a Monte Carlo mean of the estimator itself, whose offset depends on B, D, N and the posteriors: every
    latent is drawn, or permuted, on its own. The nadir adds the total correlation in nats of normal latents of which
    ``copies + 1`` share a mean, each with its own noise: 19.8 for 64 latents. The offset moves while posteriors change
    in training. So prefer a goal that subtracts the estimate for a batch with permuted columns, as `bomkern train`
    does, and ``relative=True``. An estimate cannot see dependence where a code holds far more than log B nats.

    Args:
        batch: B, at least 2, over all processes.
        dims: D, at least 2.
        deviation: that of each posterior, in (0, 1). Means are drawn so that all samples together are N(0, I).
        posteriors: mu and logvar, [N, D] with N >= B, in place of ``deviation``: those of a trained model.
        copies: at least 1; no more than ``dims - 1`` are possible.
        dataset_size, estimator: the options of `bomkern.total_correlation`.
        relative: anchor the estimate minus that of independent latents: the ideal is 0.
    """
    batch, dims = check_whole("batch", batch, 2), check_whole("dims", dims, 2)
    check_flag("relative", relative)
    spread = finite_number("deviation", deviation, above=0)
    if spread >= 1:
        raise ValueError(f"deviation must lie between 0 and 1, that of the prior, got {spread:g}")
    latents = Latents(batch, dims, spread) if posteriors is None else Latents(batch, dims, spread, *posteriors)
    nats = latents.with_copies(min(check_whole("copies", copies), dims - 1))
    if nats <= _LEAST:
        _refuse("posteriors", "means that do not vary do not depend on one another")
    floor = 0.0 if relative else latents.total_correlation(dataset_size, estimator)
    return Anchored(floor, floor + nats)


def residual(source: object) -> Anchored:
    """Anchor the squared residual of a differential equation ``N[u] = f``: 0, and ``mean f^2``.

    The nadir is the residual of ``u = 0``, where ``N[0] = 0``. If f is 0, as in Burgers' or the wave equation,
    ``u = 0`` solves it: give the residual of another trivial answer, such as the initial values kept for all times.

    Args:
        source: f at the points of the domain, [N] or [N, equations]; the loss is a mean over all elements.
    """
    nadir = _mean_square("source", source)
    if nadir == 0:
        _refuse("source", "it is 0, and u = 0 solves the equation", "give the residual of another answer, not of u = 0")
    return Anchored(0.0, nadir)


def boundary(values: object, *, scale: float | None = None) -> Anchored:
    """Anchor the squared misfit at a boundary ``u = g``: 0, and ``max(mean g^2, scale^2)``.

    ``mean g^2`` is the misfit of ``u = 0``. Where g is 0, that answer is perfect. A nadir near 0 would make the goal
    so steep that training stays at ``u = 0`` and never solves the equation. The trivial answer is then the opposite
    one: it solves the equation and ignores the boundary. Its values there are about as large as the source makes them,
    which `solution_scale` returns. Without a source, take the root mean square of the initial values, or of the other
    boundaries.

    Args:
        values: g at points of the boundary, [N] or [N, outputs].
        scale: > 0, the size of a solution that nothing holds at the boundary. Needed where all values are 0.
    """
    return _conditions("values", values, scale)


def initial(values: object, *, scale: float | None = None) -> Anchored:
    """Anchor the squared misfit of initial values, or of their derivatives: see `boundary`.

    Args:
        values: at points of the domain, [N] or [N, outputs].
        scale: see `boundary`. The rate of a wave that starts at rest is about its amplitude times its frequency.
    """
    return _conditions("values", values, scale)


def solution_scale(source: object, lengths: Sequence[float]) -> float:
    """Return the size of a solution of ``-Laplace u = f`` that no boundary holds: ``rms(f) / (pi^2 sum_i 1 / L_i^2)``.

    The divisor is the first eigenvalue of the Laplacian in a box. So this is the largest solution, in the mean square,
    that a source of this size has in it, and the ``scale`` of `boundary`. For another equation of second order divide
    the source by the coefficient of its second derivatives.

    Args:
        source: f at the points of the domain, [N]; not all 0.
        lengths: the sides of the box that holds the domain, one for each dimension of space, > 0.
    """
    sides = [finite_number("lengths", side, above=0) for side in lengths]
    square = _mean_square("source", source)
    if not sides:
        raise ValueError("lengths must have one entry for each dimension of space, got none")
    if square == 0:
        _refuse("source", "it is 0", "take the root mean square of the initial or boundary values")
    return math.sqrt(square) / (math.pi**2 * sum(side**-2 for side in sides))


# What the functions share.


def _read(name: str, given: object, reduction: str) -> tuple[Tensor, int]:
    """Return data of several samples, and the number by which a sum over a sample's elements is divided."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', over the elements of a sample, got {reduction!r}")
    samples = samples_of(name, given, 2)
    return samples, samples[0].numel() if reduction == "mean" else 1


def _mean_square(name: str, given: object) -> float:
    samples = samples_of(name, given)
    return sum(float(part.square().sum()) for part in columns_of(name, samples)) / samples.numel()


def _conditions(name: str, given: object, scale: float | None) -> Anchored:
    square = _mean_square(name, given)
    if scale is not None:
        square = max(square, finite_number("scale", scale, above=0) ** 2)
    if square == 0:
        _refuse(
            name, "they are 0, and u = 0 meets them", "give scale=, such as anchors.solution_scale(source, lengths)"
        )
    return Anchored(0.0, square)


def _anchored(name: str, ideal: float, nadir: float) -> Anchored:
    if nadir - ideal <= _LEAST * nadir:
        _refuse(name, "all samples are alike")
    return Anchored(ideal, nadir)


def _refuse(
    name: str, what: str, fix: str = "leave the goal out, or give Anchored(0.0, nadir) with an error that you know"
) -> NoReturn:
    raise ValueError(f"no nadir follows from {name}: {what}, so that the trivial answer is perfect; {fix}")


def _short(x: Tensor) -> str:
    return f"values from {float(x.min()):g} to {float(x.max()):g}" if x.numel() else f"shape {list(x.shape)}"


def _entropy(name: str, counts: Tensor) -> Anchored:
    return _anchored(name, 0.0, float(torch.special.entr(counts / counts.sum()).sum()))


def _binary_entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy
