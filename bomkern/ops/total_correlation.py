"""`total_correlation` by streaming kernels, and a cheap estimate from the covariance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import torch
from torch import Tensor
from torch import distributed as dist

from ..common.autocast import exactly
from ..common.blame import LAST_BATCH, matrix_fix
from ..common.checks import check_dense, check_flag, check_latents, check_rows, check_size
from ..common.process_group import ranks_of
from ..common.products import loses_digits
from ..dispatch import select
from ..reference.statistics import log_normal

ESTIMATORS = {"mws": False, "mss": True}


class KLParts(NamedTuple):
    """The three parts of the divergence from the prior N(0, 1), per sample, in nats; every part has a gradient.

    Their sum is ``log q(z_b | x_b) - log p(z_b)`` for any weights: the estimate by one sample of the KL term of the
    ELBO (Chen et al. 2018, "Isolating sources of disentanglement", equation 2).
    """

    mutual_information: Tensor  # [B] or [R], index-code mutual information, log q(z_b | x_b) - log q(z_b)
    total_correlation: Tensor  # log q(z_b) - sum_d log q(z_bd)
    dimension_wise_kl: Tensor  # sum_d log q(z_bd) - log p(z_bd)


@overload
def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: SupportsIndex | None = None,
    estimator: str = "mws",
    *,
    parts: Literal[False] = False,
    rows: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor: ...
@overload
def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: SupportsIndex | None = None,
    estimator: str = "mws",
    *,
    parts: Literal[True],
    rows: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> KLParts: ...
@overload
def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: SupportsIndex | None = None,
    estimator: str = "mws",
    *,
    parts: bool,
    rows: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor | KLParts: ...
def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: SupportsIndex | None = None,
    estimator: str = "mws",
    *,
    parts: bool = False,
    rows: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor | KLParts:
    """Compute the total correlation of a latent code, per sample, in nats: ``log q(z_b) - sum_d log q(z_bd)``.

    q is the mixture of the batch's posteriors ``N(mu_i, exp(logvar_i))`` (Chen et al. 2018, "Isolating sources of
    disentanglement", section 4 and appendix C). With ``t_bid = log N(z_bd; mu_id, exp(logvar_id))`` and weights w,

        TC_b = log sum_i w_bi exp(sum_d t_bid) - sum_d log sum_i w_bi exp(t_bid).

    The B x B x D temporary is never formed. Memory is O(B D), in backward too, which recomputes the exponentials.
    Second derivatives are computed in plain PyTorch, a chunk of rows at a time.

    Args:
        z: [B, D] samples, one from each posterior. float16, bfloat16, float32 or float64, any strides. With "mws" also
            [R, D], R <= B: samples of some of the posteriors, in any order. Time is then O(R B D).
        mu, logvar: [B, D] mean and log-variance of the posteriors. -87 < logvar < 87 in float32.
        dataset_size: N, the number of samples that the model trains on, for the weights; None weights each by 1/B. Any
            integer type; reading a 0-dim tensor waits for its device.
        estimator: "mws", minibatch weighted sampling: w = 1/(N B). "mss", minibatch stratified sampling: with
            M = B - 1, 1/N for a sample's own component, (N - M)/(N M) for the next one, 1/M for the rest.
        parts: return all of `KLParts`, from the same pass.
        rows: with ``parts``, [R] int64, the posterior from which each row of z was drawn; None: row b from posterior b.
            Required if R < B. "mws" only.
        process_group: the W ranks that share the batch, each with the same number B of samples. Each rank gets the
            values of its own samples under the mixture of all W B posteriors, as in one process with the whole batch.
            DistributedDataParallel averages the gradients to those of that process. mu and logvar are gathered and
            their gradients scattered: memory is O(W B D) and time O(W B^2 D) on each rank.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the device.

    Returns:
        [B], or [R], float32 (float64 if any input is float64); with ``parts`` three of these. z, mu and logvar get
        gradient. A NaN in z makes its row NaN; a NaN in mu or logvar makes every row NaN.

    The estimates have large offsets that depend on B, N and D. As an example, take independent latents with
    mu ~ N(0, 1), deviations 0.5, D = 10 and N = 4,000. The true value is 0 for the distribution of the data, and 1.0
    for the mixture of these 4,000 posteriors. At B = 256, MSS gives 0.6, plain 1/B gives 2.7, and MWS, which is always
    plain + (D - 1) log N, gives 77. A goal therefore needs an *ideal*: ``Minimize(scale, ideal)`` with the value of
    independent latents, never a bare ``exp(-x / scale)``. The same call on a batch with every column permuted returns
    that value, as `bomkern train` does.

    Raises:
        ValueError: an argument has an invalid shape, device or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why.

    Example:
        >>> tc = total_correlation(z, mu, logvar)
        >>> loss = min_goal_loss([recon, tc], [Minimize(0.1), Minimize(20.0, ideal=floor)])
        >>> mi, tc, kl = total_correlation(z, mu, logvar, dataset_size=len(data), parts=True)
        >>> loss = recon.mean() + (alpha * mi + beta * tc + gamma * kl).mean()  # of beta-TCVAE
    """
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be 'mws' or 'mss', got {estimator!r}")
    size = None if dataset_size is None else check_size("dataset_size", dataset_size)
    if not isinstance(z, Tensor) or not isinstance(mu, Tensor) or not isinstance(logvar, Tensor):
        check_latents(z, mu, logvar)  # raises
    serve: Callable[..., Any] = select.resolve("total_correlation", z.device.type, impl)
    stratified, ranks = ESTIMATORS[estimator], ranks_of(process_group)
    part = not stratified and z.dim() == mu.dim() == 2 and len(z) < len(mu)  # the order matters to "mss" alone
    if parts is not False or rows is not None:
        _check_parts(parts, rows, z, mu, stratified, part)
    first = 0 if part else None
    among = mu, logvar
    if ranks.size > 1:
        batch, dims, dtype = check_rows(z, mu, logvar, first)
        ranks.check_shape("z", z)
        # In the compute dtype: gradients in half precision would be rounded before they are summed.
        posteriors = ranks.gather(torch.cat([mu, logvar], 1).to(dtype)).flatten(0, 1)
        among, first = (posteriors[:, :dims], posteriors[:, dims:]), ranks.rank * batch
    if not parts:
        value: Tensor = serve(z, *among, size, stratified, first)
        return value
    value, log_q = serve(z, *among, size, stratified, first, parts=True)
    return _parts_of(value, log_q, z, *((mu, logvar) if rows is None else (mu[rows], logvar[rows])))


def _check_parts(parts: bool, rows: Tensor | None, z: Tensor, mu: Tensor, stratified: bool, part: bool) -> None:
    check_flag("parts", parts)
    if not parts:
        if rows is not None:
            raise ValueError("rows must be None without parts=True: total correlation alone does not depend on it")
    elif rows is None:
        if part:
            raise ValueError(
                f"rows must be given for {len(z)} of {len(mu)} samples: pass the index of each one's posterior"
            )
    elif not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
        given = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be an int64 tensor, got {given}: write torch.tensor(x, device=z.device)")
    elif stratified:
        raise ValueError(
            "rows must be None for estimator 'mss', which takes all samples in the order of their posteriors"
        )
    elif rows.dim() != 1 or len(rows) != len(z):
        raise ValueError(f"rows must have shape [{len(z)}], one index for each row of z, got {list(rows.shape)}")


def _parts_of(value: Tensor, log_q: Tensor, z: Tensor, mu: Tensor, logvar: Tensor) -> KLParts:
    """Return the parts from the total correlation and log q(z_b), [R] each, and the posterior of each row, [R, D]."""
    dtype, wide = value.dtype, log_q.dtype  # the parts are small differences of sums over D
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=z.device)
    posterior, prior = (log_normal(z, *of).sum(1, dtype=wide) for of in ((mu, logvar), (zero, zero)))
    return KLParts((posterior - log_q).to(dtype), value, (log_q - value - prior).to(dtype))


@exactly
def gaussian_total_correlation(z: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute the total correlation of a Gaussian with the sample covariance C of z, in nats.

    It is ``(sum_d log C_dd - log det C) / 2``, the batch-level companion of `total_correlation`: one D x D Cholesky
    factor, no posterior, and no offset from weights. It measures linear dependence only, and is exact if z is Gaussian.
    Independent columns give about ``D (D - 1) / (4 (B - 1))`` by chance.

    Args:
        z: [B, D], B > D >= 1: fewer samples have a singular covariance. float16, bfloat16, float32 or float64.
        process_group: the W ranks that share the batch, each with the same number B of samples. The covariance is that
            of all W B > D samples, for which D x D products are summed. See `total_correlation` for gradients.

    Returns:
        0-dim, float32 (float64 for float64), at least 0 up to rounding. It is inf, without gradient, if a column is
        constant or, to within rounding, a linear function of others. It is NaN if z has a NaN or an infinity.

    Raises:
        ValueError: z is not [B, D] with B > D.
        TypeError: z is not a tensor of a float dtype.
    """
    check_dense("z", z)
    ranks = ranks_of(process_group)
    if z.dim() != 2 or z.shape[1] == 0 or z.shape[0] == 0 or z.shape[0] * ranks.size <= z.shape[1]:
        several = f" of {ranks.size} ranks" if ranks.size > 1 else ""
        fix = LAST_BATCH if z.dim() == 2 else matrix_fix(z.shape)
        raise ValueError(
            f"z must have shape [B, D] with more samples than dimensions, got {list(z.shape)}{several}: {fix}"
        )
    ranks.check_shape("z", z)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    x = z.to(torch.float64 if loses_digits(z.device.type) else dtype)  # the gradient of its factor has products too
    low, high, mean = ranks.gather(torch.stack([-x.detach().amin(0), x.detach().amax(0), x.mean(0)])).unbind(1)
    lowest, highest, mean = -low.detach().amax(0), high.detach().amax(0), mean.mean(0)
    constant = highest == lowest  # before the mean is subtracted, whose rounding can leave a spread
    # Columns are scaled to [-1, 1], so that squares neither overflow nor vanish.
    x = (x - mean) / torch.where(constant, 1, torch.maximum(highest - mean, mean - lowest).detach())
    products = ranks.total(x.T @ x)
    # The correlation matrix has the same total correlation as the covariance.
    inverse = torch.where(constant, 1, products.diagonal()).rsqrt()
    correlation = products * inverse * inverse[:, None]
    with torch.no_grad():
        factor, failed = torch.linalg.cholesky_ex(correlation)
        # Of a copied column's variance, 1, only the rounding of the product remains.
        remaining = factor.diagonal().square()
        singular = (failed != 0) | constant.any() | (remaining < 32 * torch.finfo(dtype).eps).any()
        worst = torch.where(correlation.isfinite().all(), torch.inf, torch.nan).to(x.dtype)
    identity = torch.eye(len(remaining), dtype=x.dtype, device=x.device)
    regular = torch.where(singular, identity, correlation)  # otherwise backward would divide by zero
    return torch.where(singular, worst, -torch.linalg.cholesky_ex(regular)[0].diagonal().log().sum()).to(dtype)
