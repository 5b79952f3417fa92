"""`latent_statistics`: the statistics of a latent code that a trainer needs, from one read of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .. import reference
from ..common.checks import check_latents, check_number
from ..common.process_group import ranks_of
from ..dispatch import select


class LatentStatistics(NamedTuple):
    """Result of `latent_statistics`; every field has a gradient."""

    kl: Tensor  # [B] nats, `gaussian_kl` to the standard normal
    logvar_mean: Tensor  # [B] mean over D
    logvar_square: Tensor  # [B] mean over D of the square
    z_mean: Tensor  # [D] over the batch
    z_variance: Tensor  # [D] unbiased, over the batch
    mu_mean: Tensor  # [D]
    mu_variance: Tensor  # [D]
    active: Tensor  # 0-dim, `active_units` of mu
    effective: Tensor  # 0-dim


def latent_statistics(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    threshold: float = 0.1,
    temperature: float = 0.05,
    *,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> LatentStatistics:
    """Compute `gaussian_kl`, `active_units` and the moments of a latent code.

    Each input is read once in forward and once in backward.

    Args:
        z: [B, D] samples, B >= 2. float16, bfloat16, float32 or float64, any strides.
        mu, logvar: [B, D] mean and log-variance of the posteriors; see `gaussian_kl` for the clamp at ``logvar = 80``.
        threshold, temperature: see `active_units`.
        process_group: the ranks that share the batch, each with the same number B of samples. Statistics of the batch
            are those of the whole batch, for which 4 D numbers are gathered; those per sample are of the rank's own
            samples. DistributedDataParallel averages the gradients to those of one process with the whole batch.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        `LatentStatistics`, float32 (float64 if any input is float64). All three inputs get gradient.

    Raises:
        ValueError: an argument has an invalid shape, device or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

    Example:
        >>> code = latent_statistics(z, mu, logvar)
        >>> loss = min_goal_loss([recon, code.kl, 1 - code.active], [Minimize(0.1), Minimize(120.0), Minimize(1.0)])
    """
    threshold = check_number("threshold", threshold)
    temperature = check_number("temperature", temperature)
    if not isinstance(z, Tensor) or not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_latents(z, mu, logvar)  # raises
    serve = select.resolve("latent_statistics", z.device.type, impl)
    local = LatentStatistics(*serve(z, mu, logvar, float(threshold), float(temperature)))
    ranks = ranks_of(process_group)
    if ranks.size == 1:
        return local
    ranks.check_shape("z", z)
    means, variances = torch.stack([local.z_mean, local.mu_mean]), torch.stack([local.z_variance, local.mu_variance])
    mean, variance = reference.merged_moments(means, variances, len(z), ranks)
    active, effective = reference.units_of(variance[1], float(threshold), float(temperature))
    return local._replace(
        z_mean=mean[0],
        mu_mean=mean[1],
        z_variance=variance[0],
        mu_variance=variance[1],
        active=active,
        effective=effective,
    )
