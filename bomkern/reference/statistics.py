"""The reference definitions of the statistics that serve as goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..common.autocast import exactly
from ..common.checks import (
    check_estimator,
    check_latents,
    check_matrices,
    check_prior,
    check_rows,
    check_units,
    check_views,
)
from ..common.devices import widest_float
from ..common.process_group import ALONE, Ranks
from ..common.products import matmul
from ..common.torch_internals import under_transform


def log_weights(rows: Tensor, batch: int, dataset_size: int | None, stratified: bool) -> Tensor:
    """Return the log weight of each mixture component, for each of the given rows (Chen et al. 2018, appendix C).

    Plain: 1/B. MWS: 1 / (N B). MSS, with M = B - 1: 1/N for the row's own component, (N - M) / (N M) for the next one,
    1/M for the rest, so that a row sums to 1.
    """
    dtype = widest_float(rows.device)
    if dataset_size is None or not stratified:
        return rows.new_full((len(rows), batch), -math.log(batch * (dataset_size or 1)), dtype=dtype)
    m, n = batch - 1, dataset_size
    weights = rows.new_full((len(rows), batch), 1 / m, dtype=dtype)
    weights.scatter_(1, ((rows + 1) % batch)[:, None], (n - m) / (n * m))
    return weights.scatter_(1, rows[:, None], 1 / n).log()


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return ``log N(z; mu, exp(logvar))``, element by element."""
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))


def log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Return ``log N(z_bd; mu_id, exp(logvar_id))``, [rows, B, D]."""
    return log_normal(z[:, None], mu, logvar)


def _total_correlation_of(z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor) -> Tensor:
    log_q = log_density(z, mu, logvar)
    joint = (log_q.sum(2) + weights).logsumexp(1)
    marginals = (log_q + weights[:, :, None]).logsumexp(1)
    return joint - marginals.sum(1)


def _parts_of(z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    wide = widest_float(z.device)
    joint = log_density(z, mu, logvar).sum(2, dtype=wide) + weights.to(wide)
    return _total_correlation_of(z, mu, logvar, weights), joint.logsumexp(1)


def _gradients_of(
    grad: Tensor, grad_joint: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    log_q = log_density(z, mu, logvar)
    joint = grad_joint[:, None] * (log_q.sum(2) + weights).softmax(1)
    marginals = grad[:, None, None] * (log_q + weights[:, :, None]).softmax(1)
    weight = joint[:, :, None] - marginals  # d loss / d log_q
    apart = z[:, None] - mu
    pull = weight * apart * torch.exp(-logvar)
    return -pull.sum(1), pull.sum(0), (pull * apart - weight).sum(0) / 2


def _by_rows(
    fn: Callable[..., Any],
    by_row: Sequence[Tensor],
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None,
    limit: int,
) -> list[Any]:
    """Call ``fn`` with each chunk of rows, mu, logvar and the chunk's weights, and return the list of results.

    A chunk's [rows, B, D] temporaries have at most ``limit`` elements, and backward recomputes them. Memory is bounded
    whatever B and D are, except under torch.func. A single chunk is the textbook formula.
    """
    batch, dims = mu.shape
    rows, count = max(1, limit // (batch * dims)), len(by_row[0])
    bounded = rows < count and not under_transform()  # torch.func does not support saved-tensor hooks
    out = []
    for begin in range(0, count, rows):
        part = slice(begin, min(begin + rows, count))
        chunk = torch.arange(part.start, part.stop, device=mu.device) + (first or 0)
        weights = log_weights(chunk, batch, dataset_size, stratified).to(mu.dtype)
        arguments = (*(x[part] for x in by_row), mu, logvar, weights)
        if bounded:
            out.append(checkpoint(fn, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(fn(*arguments))
    return out


LIMIT = 2**23  # elements of a chunk's temporaries


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    limit: int = LIMIT,
    parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``log q(z_b) - sum_d log q(z_bd)``, [R]. See `bomkern.total_correlation`.

    With ``parts`` also return log q(z_b), [R], in the widest float, because the parts are small differences of it.

    With ``first``, z is [R, D]: samples of R consecutive posteriors from number ``first`` on, among the B of mu and
    logvar. Without it, R = B. A chunk of rows has at most ``limit`` elements in its [rows, B, D] temporary.
    """
    batch, _, dtype = check_rows(z, mu, logvar, first)
    check_estimator(batch, dataset_size, stratified)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    fn = _parts_of if parts else _total_correlation_of
    chunks = _by_rows(fn, [z], mu, logvar, dataset_size, stratified, first, limit)
    if not parts:
        return torch.cat(chunks)
    value, joint = zip(*chunks, strict=True)
    return torch.cat(value), torch.cat(joint)


def total_correlation_gradients(
    grad: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int | None,
    stratified: bool,
    first: int | None = None,
    grad_log_q: Tensor | None = None,
    limit: int = LIMIT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of z, mu and logvar for those of `total_correlation` and of log q(z_b), [R] each.

    They are differentiable, for second derivatives. The closed form allows chunks of rows here too, whereas autograd's
    own gradient of the value would keep every [B, B, D] temporary. Let p and q be the shares of component i in the
    joint and in the marginal of dimension d. The derivative by ``log N(z_bd; mu_id, exp(logvar_id))`` is
    ``(grad_b + grad_log_q_b) p_bi - grad_b q_bid``; the chain rule through the Gaussian gives the rest.
    """
    _, _, dtype = check_rows(z, mu, logvar, first)
    grad = grad.to(dtype)
    rows = [grad, grad if grad_log_q is None else (grad + grad_log_q).to(dtype), z.to(dtype)]
    parts = _by_rows(_gradients_of, rows, mu.to(dtype), logvar.to(dtype), dataset_size, stratified, first, limit)
    of_z, of_mu, of_logvar = zip(*parts, strict=True)
    grad_z, grad_mu, grad_logvar = torch.cat(of_z), torch.stack(of_mu).sum(0), torch.stack(of_logvar).sum(0)
    return grad_z.to(z.dtype), grad_mu.to(mu.dtype), grad_logvar.to(logvar.dtype)


LOGVAR_LIMIT = 80.0  # e^80 is finite in float32


def _variance_of(logvar: Tensor) -> Tensor:
    """Return ``exp(logvar)``, continued by its tangent above `LOGVAR_LIMIT`."""
    beyond = logvar > LOGVAR_LIMIT
    tangent = math.exp(LOGVAR_LIMIT) * (1 + (logvar - LOGVAR_LIMIT))  # its slope is finite at infinity too
    return torch.where(beyond, tangent, torch.exp(torch.where(beyond, LOGVAR_LIMIT, logvar)))


def gaussian_kl(mu: Tensor, logvar: Tensor, block_size: int, rho: float) -> Tensor:
    """Return ``KL(N(mu, diag e^logvar) || N(0, S))``, [B]. See `bomkern.gaussian_kl`."""
    _, dims, dtype = check_matrices(mu=mu, logvar=logvar)
    check_prior(dims, block_size, rho)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    rest = dims % block_size
    if rest:  # sum of the divergences of the whole blocks and of the shorter last one
        whole = gaussian_kl(mu[:, :-rest], logvar[:, :-rest], block_size, rho)
        return whole + gaussian_kl(mu[:, -rest:], logvar[:, -rest:], rest, rho)
    # S has blocks (1 - rho) I + rho 11', whose inverse is precision I - shared 11'. A block of one dimension is 1.
    rho = 0.0 if block_size == 1 else rho
    precision, last = 1 / (1 - rho), 1 - rho + block_size * rho
    shared, diagonal = precision * rho / last, precision * (1 - rho / last)
    logdet = dims / block_size * ((block_size - 1) * math.log(1 - rho) + math.log(last))
    variance = diagonal * (_variance_of(logvar) - 1) - logvar
    twice = (variance + precision * mu.square()).sum(1)
    if shared != 0:  # 0 times an infinite square would be NaN
        twice = twice - shared * mu.unflatten(1, (-1, block_size)).sum(2).square().sum(1)
    return (twice + (dims * (diagonal - 1) + logdet)) / 2


def consistency_variance(views: Sequence[Tensor], correction: float) -> Tensor:
    """Return the mean over D of the variance over the views, [B]. See `bomkern.consistency_variance`."""
    _, _, _, dtype = check_views(views, correction)
    x = views[0].to(dtype) if len(views) == 1 else torch.stack([v.to(dtype) for v in views])
    x = x - x[0].detach()  # so that values far from 0 lose no digits
    return x.var(0, correction=correction).mean(1)


def column_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance of each column, [D] each; 0 exactly for a constant column."""
    shifted = x - x[0].detach()  # so that values far from 0 lose no digits
    return shifted.mean(0) + x[0].detach(), shifted.var(0)


def merged_moments(mean: Tensor, variance: Tensor, rows: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Merge each rank's mean and unbiased variance into those over all ranks' rows (Chan et al. 1979); any shape."""
    means, variances = ranks.gather(torch.stack([mean, variance])).unbind(1)
    origin, total = means[0].detach(), rows * ranks.size
    apart = means - origin
    center = apart.mean(0)
    between = (apart - center).square().sum(0) * (rows / (total - 1))
    return center + origin, variances.mean(0) * (ranks.size * (rows - 1) / (total - 1)) + between


def units_of(variance: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the active and the effective fraction, 0-dim each, of column variances [D]. See `bomkern.active_units`."""
    active = torch.sigmoid((variance - threshold) / temperature).mean()
    total = variance.sum()
    p = variance / torch.where(total == 0, 1, total)
    positive = p != 0
    entropy = -(p * torch.where(positive, p, 1).log()).sum()
    return active, torch.where(total == 0, 0, torch.exp(entropy) / len(variance))


def active_units(mu: Tensor, threshold: float, temperature: float, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Return the active and the effective fraction of the dimensions, 0-dim each. See `bomkern.active_units`."""
    rows, _, dtype = check_matrices(2, mu=mu)
    check_units(threshold, temperature)
    moments = merged_moments(*column_moments(mu.to(dtype)), rows, ranks)
    return units_of(moments[1], threshold, temperature)


def latent_statistics(
    z: Tensor, mu: Tensor, logvar: Tensor, threshold: float, temperature: float
) -> tuple[Tensor, ...]:
    """Return the fields of `bomkern.LatentStatistics`, in order."""
    _, _, dtype = check_latents(z, mu, logvar, least=2)
    check_units(threshold, temperature)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    kl = (mu.square() + _variance_of(logvar) - 1 - logvar).sum(1) / 2
    moments = *column_moments(z), *column_moments(mu)
    return kl, logvar.mean(1), logvar.square().mean(1), *moments, *units_of(moments[3], threshold, temperature)


def centered(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return x minus its column means over all ranks' rows, and the means, [D], without gradient."""
    first = x[0].detach()  # subtracted before the mean, so that values far from 0 lose no digits
    firsts, means = ranks.gather(torch.stack([first, (x - first).mean(0)])).unbind(1)
    origin = firsts[0].detach()
    mean = (firsts.detach() - origin + means).mean(0)
    return x - origin - mean, (origin + mean).detach()


@exactly
def covariance_penalty(z: Tensor, normalize: bool, per_sample: bool, ranks: Ranks = ALONE) -> Tensor:
    """Return ``B/(B-1) x' offdiag(C) x / D`` of each sample, [B], or ``sum_{i != j} C_ij^2 / D``, 0-dim.

    See `bomkern.covariance_penalty`.
    """
    rows, dims, dtype = check_matrices(2, z=z)
    batch = rows * ranks.size
    x, mean = centered(z.to(dtype), ranks)
    c = ranks.total(matmul(x.T, x)) / (batch - 1)
    if normalize:
        variance = c.diagonal()
        constant = variance.detach().sqrt() <= torch.finfo(dtype).eps * mean.abs()
        inverse = torch.where(constant, torch.inf, variance).rsqrt()
        c, x = c * inverse * inverse[:, None], x * inverse
    own = torch.eye(dims, dtype=torch.bool, device=c.device) & ~c.isnan()  # a NaN may appear on the diagonal only
    off = torch.where(own, 0, c)
    if not per_sample:
        return off.square().sum() / dims
    return (matmul(x, off) * x).sum(1) * (batch / (batch - 1) / dims)
