"""`active_units`: how much of a latent code is in use, from one pass over its columns."""

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
    """Fractions of the dimensions that are active, and effective. With the batch variance ``v_d = Var_b(mu_bd)``:

        active    = mean_d sigmoid((v_d - threshold) / temperature)
        effective = exp(-sum_d p_d log p_d) / D,  p_d = v_d / sum v

    Active units count ``v_d > 0.01`` in Burda et al. 2016 ("Importance weighted autoencoders", section 5.2), softened
    here so that there is a gradient. The effective dimension is the exponential of the spectral entropy (Roy & Vetterli
    2007) of the variances as they stand, without rotation: 1 where all vary alike, 1/D where one varies alone, 0
    (without gradient) where none does. Its units do not matter.

    Args:
        mu: [B, D] posterior means, B >= 2. float16, bfloat16, float32 or float64, any strides.
        threshold: the variance at which a dimension counts half, in units of mu squared.
        temperature: how soft the threshold is, in the same units, > 0.
        process_group: the ranks that share the batch, each with B samples of it, the same number: the variances of all
            of them, for which 2 D numbers are gathered, in plain PyTorch whatever ``impl`` says. All ranks get the same
            values, and gradients that DistributedDataParallel averages to those of one process with the whole batch.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        (active, effective), 0-dim each, in [0, 1] up to rounding, float32 (float64 for float64). Gradient for mu.

    Raises:
        ValueError: a shape or number that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> active, effective = active_units(mu)
        >>> idle = 1 - (active + effective) / 2
    """
    check_number("threshold", threshold)
    check_number("temperature", temperature)
    if not isinstance(mu, Tensor):
        check_matrices(mu=mu)  # raises
    ranks = ranks_of(process_group)
    if ranks.size > 1:
        ranks.check_shape("mu", mu)
        return reference.active_units(mu, float(threshold), float(temperature), ranks)
    active, effective = select.resolve("active_units", mu.device.type, impl)(mu, float(threshold), float(temperature))
    return active, effective
