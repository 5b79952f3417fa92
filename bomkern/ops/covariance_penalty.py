"""`covariance_penalty`: squared covariances between the dimensions of a code, by a library's matrix product."""

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
    """Compute the squared off-diagonal covariances ``sum_{i != j} C_ij^2 / D`` (VICReg, Bardes et al. 2022).

    With ``x = z - mean(z)`` and ``C = x'x / (B - 1)``, a sample's part is ``B / (B - 1) x_b' offdiag(C) x_b / D``. The
    mean of the parts over the batch is the penalty; a single part can be negative. Independent columns of variance 1
    give ``(D - 1) / (B - 1)`` by chance: use that as the *ideal* of a goal.

    Args:
        z: [B, D] samples, B >= 2. float16, bfloat16, float32 or float64, any strides. If D > B, the B x B product of
            the samples replaces the D x D product of the columns, and the diagonal is subtracted afterwards. Columns
            whose variances differ by orders of magnitude then lose digits; normalized columns do not.
        normalize: use correlations instead of covariances: x is divided by each column's standard deviation, which has
            gradient too. A column counts as constant if its deviation is at most eps |mean|, with the eps of the
            compute dtype. It contributes 0 and gets no gradient. Deviations whose squares overflow give NaN.
        reduction: "sample" returns the parts, [B]; "batch" returns their mean, 0-dim, for less work.
        process_group: the ranks that share the batch, each with the same number B of samples. C is that of the whole
            batch: a D x D product is summed, in plain PyTorch whatever ``impl`` says. Each rank gets the parts of its
            own samples, as in one process with the whole batch. DistributedDataParallel averages the gradients to those
            of that process.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        [B] or 0-dim, float32 (float64 for float64). z gets gradient, through C too.

    Raises:
        ValueError: an argument has an invalid shape or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

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
