"""`latent_statistics`: what a trainer asks of its latent code, from one read of it."""

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
    """What `latent_statistics` returns; every field has gradients."""

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
    """`gaussian_kl`, `active_units` and the moments of a latent code, from one read of each input, and one in backward.

    Args:
        z: [B, D] samples, B >= 2. float16, bfloat16, float32 or float64, any strides.
        mu, logvar: [B, D] mean and log-variance of the posteriors; see `gaussian_kl` for the clamp at ``logvar = 80``.
        threshold, temperature: see `active_units`.
        process_group: the ranks that share the batch, each with B samples of it, the same number: what is of the batch
            is of all of theirs, for which 4 D numbers are gathered; what is by sample, of a rank's own. Gradients are
            such that DistributedDataParallel averages them to those of one process with the whole batch.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        `LatentStatistics`, float32 (float64 if any input is float64). Gradients for all three inputs.

    Raises:
        ValueError: a shape, device or number that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> code = latent_statistics(z, mu, logvar)
        >>> loss = min_goal_loss([recon, code.kl, 1 - code.active], [Minimize(0.1), Minimize(120.0), Minimize(1.0)])
    """
    check_number("threshold", threshold)
    check_number("temperature", temperature)
    if not isinstance(z, Tensor) or not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_latents(z, mu, logvar)  # raises
    serve = select.resolve("latent_statistics", z.device.type, impl)
    found = LatentStatistics(*serve(z, mu, logvar, float(threshold), float(temperature)))
    ranks = ranks_of(process_group)
    if ranks.size == 1:
        return found
    ranks.check_shape("z", z)
    means, variances = torch.stack([found.z_mean, found.mu_mean]), torch.stack([found.z_variance, found.mu_variance])
    mean, variance = reference.merged_moments(means, variances, len(z), ranks)
    active, effective = reference.units_of(variance[1], float(threshold), float(temperature))
    return found._replace(
        z_mean=mean[0],
        mu_mean=mean[1],
        z_variance=variance[0],
        mu_variance=variance[1],
        active=active,
        effective=effective,
    )
