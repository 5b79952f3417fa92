"""`active_units`: the fraction of a latent code that is in use, from one pass over its columns."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist

from .. import reference
from ..common.checks import check_matrices, check_number
from ..common.process_group import ranks_of
from ..dispatch import select


def active_units(
    mu: Tensor,
    threshold: float = 0.1,
    temperature: float = 0.05,
    *,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the active and the effective fraction of the dimensions.

    With the batch variance ``v_d = Var_b(mu_bd)``:

        active    = mean_d sigmoid((v_d - threshold) / temperature)
        effective = exp(-sum_d p_d log p_d) / D,  p_d = v_d / sum v

    Burda et al. 2016 ("Importance weighted autoencoders", section 5.2) count a unit as active if ``v_d > 0.01``; the
    sigmoid softens this count so that it has a gradient. The effective dimension is the exponential of the spectral
    entropy (Roy & Vetterli 2007) of the variances, without a rotation. The effective fraction is 1 if all dimensions
    vary alike, 1/D if a single one varies, and 0, without gradient, if none does. It does not depend on units.

    Args:
        mu: [B, D] posterior means, B >= 2. float16, bfloat16, float32 or float64, any strides.
        threshold: variance at which a dimension counts as half active, in units of mu squared.
        temperature: softness of the threshold, in the same units, > 0.
        process_group: the ranks that share the batch, each with the same number B of samples. The variances are those
            of the whole batch: 2 D numbers are gathered, in plain PyTorch whatever ``impl`` says. All ranks get the
            same values. DistributedDataParallel averages the gradients to those of one process with the whole batch.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        (active, effective), 0-dim each, in [0, 1] up to rounding, float32 (float64 for float64). Gradient for mu.

    Raises:
        ValueError: an argument has an invalid shape or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

    Example:
        >>> active, effective = active_units(mu)
        >>> idle = 1 - (active + effective) / 2
    """
    threshold = check_number("threshold", threshold)
    temperature = check_number("temperature", temperature)
    if not isinstance(mu, Tensor):
        check_matrices(mu=mu)  # raises
    ranks = ranks_of(process_group)
    if ranks.size > 1:
        ranks.check_shape("mu", mu)
        return reference.active_units(mu, float(threshold), float(temperature), ranks)
    active, effective = select.resolve("active_units", mu.device.type, impl)(mu, float(threshold), float(temperature))
    return active, effective
