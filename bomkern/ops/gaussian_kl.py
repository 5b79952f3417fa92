"""`gaussian_kl`: the KL divergence of each posterior from a Gaussian prior, in one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..common.blame import number_fix
from ..common.checks import as_whole, check_matrices, check_number
from ..dispatch import select


def gaussian_kl(
    mu: Tensor, logvar: Tensor, block_size: int | None = None, rho: float = 0.0, *, impl: str | None = None
) -> Tensor:
    """Compute ``KL(N(mu, diag exp(logvar)) || N(0, S))`` of each sample, in nats.

    If S = I, it is ``sum_d (mu_d^2 + exp(logvar_d) - 1 - logvar_d) / 2`` (Kingma & Welling 2014, appendix B). With a
    ``block_size``, S is block-diagonal, and each block is ``(1 - rho) I + rho 11'``: dimensions of a block have the
    correlation rho. The last block holds the remaining dimensions: 20 in blocks of 8 are blocks of 8, 8 and 4.

    The divergence is the sum over the blocks. Let a block have n dimensions, the mean m and the variance v. By the
    formula for two normal distributions (Kullback 1959, chapter 9) it adds
    ``(tr(S^-1 diag v) + m' S^-1 m - n + log det S - sum log v) / 2``, where
    ``S^-1 = (I - rho 11' / (1 - rho + n rho)) / (1 - rho)`` and
    ``log det S = (n - 1) log(1 - rho) + log(1 - rho + n rho)``. Nothing is divided by the number of blocks or by n, so
    a shorter block counts by its own dimensions. A block of one dimension has a standard normal prior.

    Clamp: above ``logvar = 80`` the tangent continues the exponential, because exp overflows float32 at 88.7. Value and
    gradient stay finite there, and the gradient still points down.

    Args:
        mu, logvar: [B, D] means and log-variances. float16, bfloat16, float32 or float64, any strides.
        block_size: dimensions of a block of the prior, 1 to D; None means 1.
        rho: correlation within a block, ``-1 / (block_size - 1) < rho < 1``; must be 0 without ``block_size``.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        [B], float32 (float64 if any input is float64), at least 0 up to rounding. mu and logvar get gradient.

    Raises:
        ValueError: an argument has an invalid shape, device or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

    Example:
        >>> kl = gaussian_kl(mu, logvar)
        >>> loss = min_goal_loss([recon, kl], [Minimize(0.1), Minimize(120.0)])
    """
    size = 1 if block_size is None else as_whole(block_size)
    if size is None:
        raise TypeError(f"block_size must be an int or None, got {type(block_size).__name__}{number_fix(block_size)}")
    rho = check_number("rho", rho)
    if block_size is None and rho != 0:
        raise ValueError(f"block_size must be given where rho is not 0, got None and rho {rho}")
    if not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_matrices(mu=mu, logvar=logvar)  # raises
    serve: Callable[..., Tensor] = select.resolve("gaussian_kl", mu.device.type, impl)
    return serve(mu, logvar, size, float(rho))
