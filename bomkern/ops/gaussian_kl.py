"""`gaussian_kl`: the information cost of a code, per sample, in one pass."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..common.checks import check_matrices, check_number
from ..dispatch import select


def gaussian_kl(
    mu: Tensor, logvar: Tensor, block_size: int | None = None, rho: float = 0.0, *, impl: str | None = None
) -> Tensor:
    """``KL(N(mu, diag exp(logvar)) || N(0, S))`` of each sample, in nats.

    With S = I, ``sum_d (mu_d^2 + exp(logvar_d) - 1 - logvar_d) / 2`` (Kingma & Welling 2014, appendix B). With a
    ``block_size``, S is block-diagonal, each block ``(1 - rho) I + rho 11'``: dimensions of a block correlate by rho.
    The last block has what is left of D: 20 dimensions in blocks of 8 are blocks of 8, 8 and 4.

    The divergence is the sum of those of the blocks, each with its own number n of dimensions: by the formula for two
    normal distributions (Kullback 1959, chapter 9), with m the block's ``mu`` and v its ``exp(logvar)``, a block adds
    ``(tr(S^-1 diag v) + m' S^-1 m - n + log det S - sum log v) / 2``, where
    ``S^-1 = (I - rho 11' / (1 - rho + n rho)) / (1 - rho)`` and
    ``log det S = (n - 1) log(1 - rho) + log(1 - rho + n rho)``. Nothing is divided by the number of blocks or by n, so
    that a shorter block counts by the dimensions it has. A block of one dimension has a standard normal prior.

    Clamp: above ``logvar = 80`` the exponential goes on as its tangent, because exp overflows float32 at 88.7: value
    and gradient stay finite there, and the gradient still points down.

    Args:
        mu, logvar: [B, D] means and log-variances. float16, bfloat16, float32 or float64, any strides.
        block_size: dimensions of a block of the prior, 1 to D; None is 1.
        rho: correlation within a block, ``-1 / (block_size - 1) < rho < 1``; 0 without ``block_size``.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        [B], float32 (float64 if any input is float64), at least 0 up to rounding. Gradients for mu and logvar.

    Raises:
        ValueError: a shape, device or number that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> kl = gaussian_kl(mu, logvar)
        >>> loss = min_goal_loss([recon, kl], [Minimize(0.1), Minimize(120.0)])
    """
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int)):
        raise TypeError(f"block_size must be an int or None, got {type(block_size).__name__}")
    check_number("rho", rho)
    if block_size is None and rho != 0:
        raise ValueError(f"block_size must be given where rho is not 0, got None and rho {rho}")
    if not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_matrices(mu=mu, logvar=logvar)  # raises
    serve: Callable[..., Tensor] = select.resolve("gaussian_kl", mu.device.type, impl)
    return serve(mu, logvar, 1 if block_size is None else block_size, float(rho))
