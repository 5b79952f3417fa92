"""`total_correlation` by streaming kernels, and its cheap companion from the covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _impl
from ._check import FLOATS, check_latents

ESTIMATORS = {"mws": False, "mss": True}


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None = None,
    estimator: str = "mws",
    *,
    impl: str | None = None,
) -> Tensor:
    """Total correlation of a latent code, per sample, in nats: ``log q(z_b) - sum_d log q(z_bd)``.

    q is the mixture of the batch's posteriors ``N(mu_i, exp(logvar_i))`` (Chen et al. 2018, "Isolating sources of
    disentanglement", section 4 and appendix C). With ``t_bid = log N(z_bd; mu_id, exp(logvar_id))`` and weights w,

        TC_b = log sum_i w_bi exp(sum_d t_bid) - sum_d log sum_i w_bi exp(t_bid).

    The B x B x D temporary never exists: memory is O(B D), in backward too, which computes the exponentials again.

    Args:
        z: [B, D] samples, one from each posterior. float16, bfloat16, float32 or float64, any strides.
        mu, logvar: [B, D] mean and log-variance of the posteriors. -87 < logvar < 87 in float32.
        dataset_size: N, the number of samples that the model trains on, for the weights; None weighs plainly 1/B.
        estimator: "mws", minibatch weighted sampling: w = 1/(N B). "mss", minibatch stratified sampling: with
            M = B - 1, 1/N for a sample's own component, (N - M)/(N M) for the next one, 1/M for the rest.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the device.

    Returns:
        [B], float32 (float64 if any input is float64). Gradients for z, mu and logvar. NaN in z makes its row NaN;
        in mu or logvar, every row.

    The estimates carry large offsets that depend on B, N and D. Independent latents, mu ~ N(0, 1), deviations 0.5,
    D = 10, N = 4,000: the truth is 0 for the data's distribution and 1.0 for the mixture of these 4,000 posteriors; at
    B = 256 MSS gives 0.6, plain 1/B 2.7 and MWS, which is always plain + (D - 1) log N, 77. So a goal made of it needs
    an *ideal*: ``Minimize(scale, ideal)`` with the value that independent latents have, which the same call on a batch
    with every column permuted gives (`bomkern train` does that), and never a bare ``exp(-x / scale)``.

    Raises:
        ValueError: a shape, device, size or name that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why.

    Example:
        >>> tc = total_correlation(z, mu, logvar)
        >>> loss = min_goal_loss([recon, tc], [Minimize(0.1), Minimize(20.0, ideal=floor)])
    """
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be 'mws' or 'mss', got {estimator!r}")
    if dataset_size is not None and (isinstance(dataset_size, bool) or not isinstance(dataset_size, int)):
        raise TypeError(f"dataset_size must be an int or None, got {type(dataset_size).__name__}")
    if not isinstance(z, Tensor) or not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_latents(z, mu, logvar)  # raises
    serve = _impl.resolve("total_correlation", z.device.type, impl)
    return serve(z, mu, logvar, dataset_size, ESTIMATORS[estimator])


def gaussian_total_correlation(z: Tensor) -> Tensor:
    """Total correlation of the Gaussian with the sample covariance C of z, in nats: ``(sum_d log C_dd - log det C)/2``.

    The batch-level companion of `total_correlation`: one D x D Cholesky factor, no posterior, and no offset from
    weights. It sees linear dependence only, and is the exact total correlation where z is Gaussian. Independent columns
    give about ``D (D - 1) / (4 (B - 1))`` by chance.

    Args:
        z: [B, D], B > D >= 1: fewer samples have a singular covariance. float16, bfloat16, float32 or float64.

    Returns:
        0-dim, float32 (float64 for float64), at least 0 up to rounding. inf, without gradient, where a column is
        constant or, to within rounding, a linear function of others. NaN where z has one, or an infinity.

    Raises:
        ValueError: z is not [B, D] with B > D.
        TypeError: z is not a tensor of a float dtype.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    if z.dtype not in FLOATS:
        raise TypeError(f"z must be float16, bfloat16, float32 or float64, got {z.dtype}")
    if z.dim() != 2 or z.shape[1] == 0 or z.shape[0] <= z.shape[1]:
        raise ValueError(f"z must have shape [B, D] with more samples than dimensions, got {list(z.shape)}")
    x = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    constant = x.amax(0) == x.amin(0)  # asked before the mean, whose rounding can leave a spread
    x = x - x.mean(0)
    x = x / torch.where(constant, 1, x.detach().abs().amax(0))  # no scale: squares neither overflow nor vanish
    # The correlation matrix has the same total correlation as the covariance.
    x = x / torch.where(constant, 1, x.norm(dim=0))
    correlation = x.T @ x
    with torch.no_grad():
        factor, failed = torch.linalg.cholesky_ex(correlation)
        # What is left of a copied column's variance, 1, is the rounding of the product.
        left = factor.diagonal().square()
        singular = (failed != 0) | constant.any() | (left < 32 * torch.finfo(x.dtype).eps).any()
        worst = torch.where(correlation.isfinite().all(), torch.inf, torch.nan).to(x.dtype)
    identity = torch.eye(len(left), dtype=x.dtype, device=x.device)
    regular = torch.where(singular, identity, correlation)  # or backward would divide by zero
    return torch.where(singular, worst, -torch.linalg.cholesky_ex(regular)[0].diagonal().log().sum())
