"""`covariance_penalty`: how far the dimensions of a code are from uncorrelated, around a library's matrix product."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch import distributed as dist

from .. import reference
from ..common.checks import check_flag, check_matrices
from ..common.process_group import ranks_of
from ..dispatch import select

REDUCTIONS = {"sample": True, "batch": False}


def covariance_penalty(
    z: Tensor,
    normalize: bool = False,
    *,
    reduction: str = "sample",
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """Squared off-diagonal covariances, ``sum_{i != j} C_ij^2 / D`` (VICReg, Bardes et al. 2022), or a sample's part.

    With ``x = z - mean(z)`` and ``C = x'x / (B - 1)``, a sample's part is ``B / (B - 1) x_b' offdiag(C) x_b / D``; the
    mean of the parts over the batch is the penalty. A single part can be negative. Independent columns of variance 1
    give ``(D - 1) / (B - 1)`` by chance: that is the *ideal* of a goal made of it.

    Args:
        z: [B, D] samples, B >= 2. float16, bfloat16, float32 or float64, any strides. Where D > B the B x B product of
            the samples is formed instead of the D x D one of the columns, diagonal and all, and the diagonal is taken
            out again: columns whose variances differ by orders of magnitude then cost digits, normalized ones do not.
        normalize: correlations instead of covariances: x is divided by each column's deviation, which has gradient
            too. A column that is constant to within rounding, deviation at most eps |mean| with the eps of the compute
            dtype, correlates with nothing: it counts 0 and gets no gradient. Deviations whose squares overflow
            give NaN.
        reduction: "sample", [B]; "batch", their mean, 0-dim, for less work.
        process_group: the ranks that share the batch, each with B samples of it, the same number: C of all of them, for
            which a D x D product is added up, in plain PyTorch whatever ``impl`` says. Each rank gets the parts of its
            own samples, as one process with the whole batch would, and gradients that DistributedDataParallel averages
            to that process's.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        [B] or 0-dim, float32 (float64 for float64). Gradient for z, through C too.

    Raises:
        ValueError: a shape or name that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> penalty = covariance_penalty(z, normalize=True)
        >>> goal = Minimize(1.0, ideal=(z.shape[1] - 1) / (len(z) - 1))
    """
    check_flag("normalize", normalize)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'sample' or 'batch', got {reduction!r}")
    if not isinstance(z, Tensor):
        check_matrices(z=z)  # raises
    ranks = ranks_of(process_group)
    if ranks.size > 1:
        ranks.check_shape("z", z)
        return reference.covariance_penalty(z, normalize, REDUCTIONS[reduction], ranks)
    serve: Callable[..., Tensor] = select.resolve("covariance_penalty", z.device.type, impl)
    return serve(z, normalize, REDUCTIONS[reduction])
