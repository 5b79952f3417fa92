"""Losses of trivial answers that take more than a line to compute, for `bomkern.anchors`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..common.data_values import in_float64, rows_of, samples_of
from ..ops.total_correlation import total_correlation

WINDOW = 7  # side of the uniform window of SSIM
ROWS = 4096  # rows of a Monte Carlo estimate, at least
REPEATS = 4  # batches of it, at least
Similarity = Callable[[Tensor, Tensor], "Tensor | float"]


def loss_of_flat_images(images: Tensor, similarity: Similarity | None, data_range: float) -> float:
    """Return ``1 - SSIM`` of each image's mean colour, the mean over images [N, C, H, W].

    Raises:
        ValueError: an image has another shape or range, or the similarity is not finite; the message names it.
    """
    if images.dim() != 4 or (similarity is None and min(images.shape[2:]) < WINDOW):
        sides = "" if similarity else f" with sides of at least {WINDOW}"
        raise ValueError(f"images must be [N, C, H, W]{sides}, got shape {list(images.shape)}")
    dtype = images.dtype if images.is_floating_point() else torch.float32
    total = 0.0
    for part in rows_of("images", images):
        low, high = float(part.min()), float(part.max())
        if high - low > data_range * (1 + 1e-6):
            raise ValueError(
                f"images must not exceed data_range, {data_range:g}, got values from {low:g} to {high:g}: "
                f"write data_range={high - low:.3g}, or whatever the goal's SSIM is given"
            )
        flat = part.mean((2, 3), keepdim=True).expand_as(part)
        with torch.no_grad():
            if similarity is None:
                alike = ssim(flat, part, data_range)
            else:
                alike = torch.as_tensor(similarity(*(x.to(images.device, dtype) for x in (flat, part))))
        total += (1 - float(alike.mean())) * len(part)
    loss = total / len(images)
    if not math.isfinite(loss):
        raise ValueError(f"similarity must be finite for images and their mean colours, got {1 - loss}")
    return loss


def ssim(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Compute SSIM (Wang et al. 2004) with a uniform window and no padding. Two [N, C, H, W] -> [N]."""
    ma, mb, aa, bb, ab = (avg_pool2d(x, WINDOW, stride=1) for x in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    variance = aa - ma * ma + bb - mb * mb
    alike = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2) / ((ma * ma + mb * mb + c1) * (variance + c2))
    return alike.mean((1, 2, 3))


class Latents:
    """Batches of posteriors whose latents are independent.

    Args:
        batch, dims: B and D.
        deviation: that of each posterior. Means are drawn so that all samples together are N(0, I).
        mu, logvar: posteriors [N, D] to draw each latent from, in place of normal ones.
    """

    def __init__(self, batch: int, dims: int, deviation: float, mu: object = None, logvar: object = None) -> None:
        self._shape, self._deviation = (batch, dims), deviation
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._known: list[Tensor] = []
        for name, given in (("posteriors: mu", mu), ("posteriors: logvar", logvar)) if mu is not None else ():
            x = in_float64(name, samples_of(name, given)).cpu()
            same = not self._known or x.shape == self._known[0].shape
            if x.dim() != 2 or len(x) < batch or x.shape[1] != dims or not same:
                raise ValueError(f"{name} must be [N, {dims}] with N of at least {batch}, got shape {list(x.shape)}")
            self._known.append(x)

    def total_correlation(self, dataset_size: int | None, estimator: str) -> float:
        """Return the mean that `bomkern.total_correlation` estimates, over batches drawn with a seed of their own."""
        total, repeats = 0.0, max(REPEATS, -(-ROWS // self._shape[0]))
        for _ in range(repeats):
            mu, logvar = self._batch()
            z = mu + torch.exp(logvar / 2) * self._normal()
            total += float(total_correlation(z, mu, logvar, dataset_size, estimator).mean())
        return total / repeats

    def with_copies(self, copies: int) -> float:
        """Return the total correlation in nats, of normal latents, if each mean is that of ``copies`` others too.

        Samples of such a group of n have the correlation ``rho = Var(mu) / (Var(mu) + mean sigma^2)``, and the group's
        total correlation is ``-log((1 - rho)^(n - 1) (1 + (n - 1) rho)) / 2``.
        """
        if self._known:
            mu, logvar = self._known
            means, noise = mu.var(0, correction=0), logvar.exp().mean(0)
        else:
            noise = torch.full((self._shape[1],), self._deviation**2, dtype=torch.float64, device="cpu")
            means = 1 - noise
        rho = means / (means + noise)
        return float((copies * torch.log1p(-rho) + torch.log1p(copies * rho)).sum()) / (-2 * (copies + 1))

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return mu and logvar of a batch, [B, D] each."""
        if not self._known:
            mu = math.sqrt(1 - self._deviation**2) * self._normal()
            return mu, torch.full_like(mu, 2 * math.log(self._deviation))
        mu, logvar = self._known
        order = torch.rand(mu.shape, generator=self._generator, device="cpu").argsort(0)[: self._shape[0]]
        return mu.gather(0, order), logvar.gather(0, order)

    def _normal(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator, dtype=torch.float64, device="cpu")
