"""Ways to draw the rows of a step and to weigh them. Each estimates the gradient of all rows.

An estimate is linear in the gradients of single rows, so it is given by the weight of each row of each goal, [K, B].
That of all rows is ``w_k / B``. Every function returns R draws, [R, K, B].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 4  # a goal with fewer rows is not calibrated: two numbers are estimated from them


class Step(NamedTuple):
    """What is known of a step.

    Attributes:
        weights: w of each goal, [K].
        counts: the rows that each goal takes, [K] int64.
        deficits: of all rows, [K, B]; to see them costs a forward of all rows without a graph.
        norms: of the gradients of single rows, [K, B]; no method can know them.
        spreads: the standard deviation of each goal's gradient over the rows, [K]; not known either.
        code: the indices of the goals of the latent code alone, which are computed for all rows anyway.
    """

    weights: Tensor
    counts: Tensor
    deficits: Tensor
    norms: Tensor
    spreads: Tensor
    code: Sequence[int]


def _positions(*shape: int) -> Tensor:
    """Return random permutations along the last dim."""
    return torch.rand(*shape).argsort(-1).argsort(-1)


def _even(step: Step, taken: Tensor) -> Tensor:
    """Return the weights of rows that count alike."""
    return taken * (step.weights / step.counts)[:, None]


def nested(step: Step, draws: int) -> Tensor:
    """Each goal takes the first rows of one permutation: what `bomkern.Spill` does."""
    return _even(step, _positions(draws, 1, step.deficits.shape[1]) < step.counts[:, None])


def apart(step: Step, draws: int) -> Tensor:
    """Each goal takes rows of its own."""
    return _even(step, _positions(draws, *step.deficits.shape) < step.counts[:, None])


def code_whole(step: Step, draws: int) -> Tensor:
    """As `nested`, but goals of the latent code alone take all rows."""
    drawn = nested(step, draws)
    for k in step.code:
        drawn[:, k] = step.weights[k] / step.deficits.shape[1]
    return drawn


def by_deficit(step: Step, draws: int) -> Tensor:
    """Rows with a probability that is half even and half in proportion to the deficit, weighed by its inverse."""
    size = step.deficits.clamp(min=0)
    share = size / size.sum(1, keepdim=True).clamp(min=1e-12)
    return _unequal(step, draws, (share + 1 / size.shape[1]) / 2)


def by_norm(step: Step, draws: int) -> Tensor:
    """Rows in proportion to the norm of their gradient, weighed by its inverse: the best that probabilities can do."""
    norms = step.norms + 1e-6 * step.norms.mean(1, keepdim=True) + 1e-30
    return _unequal(step, draws, norms / norms.sum(1, keepdim=True))


def allocated(step: Step, draws: int) -> Tensor:
    """As `nested`, with rows shared out by weight times spread (Neyman 1934) in place of weight: a bound as well."""
    batch = step.deficits.shape[1]
    size = step.weights * step.spreads + 1e-12 * step.weights
    part = _chances((size / size.sum())[None], step.counts.sum()[None] / batch)[0]
    return nested(step._replace(counts=(part * batch).round().clamp(1, batch).long()), draws)


def calibrated(step: Step, draws: int) -> Tensor:
    """As `nested`, with weights changed as little as makes the weighted mean deficit that of all rows.

    This is the regression of the gradient on the deficit as a control variate: the slope, a vector, comes from the rows
    that were taken.
    """
    drawn = nested(step, draws)
    taken = (drawn > 0).to(drawn.dtype)
    count = step.counts[:, None]
    mean = (taken * step.deficits).sum(2, keepdim=True) / count
    off = taken * (step.deficits - mean)
    spread = off.square().sum(2, keepdim=True)
    missing = step.deficits.mean(1)[:, None] - mean
    usable = (count >= FEW) & (spread > 1e-12)
    return drawn + step.weights[:, None] * torch.where(usable, off * missing / spread.clamp(min=1e-12), 0)


def visits(times: int) -> Callable[[Step, int], Tensor]:
    """Make a method that takes each row once before any again, over visits of the same samples; returns the mean.

    The deviations are multiplied by the root of the number of visits, so that independent draws would give `nested`.
    """

    def method(step: Step, draws: int) -> Tensor:
        batch = step.deficits.shape[1]
        position, whole = _positions(draws, 1, batch), (step.weights / batch)[:, None]
        each = [_even(step, (position - v * step.counts[:, None]) % batch < step.counts[:, None]) for v in range(times)]
        return whole + (torch.stack(each).mean(0) - whole) * times**0.5

    return method


METHODS: dict[str, Callable[[Step, int], Tensor]] = {
    "nested": nested,
    "apart": apart,
    "code whole": code_whole,
    "by deficit": by_deficit,
    "by norm": by_norm,
    "allocated": allocated,
    "calibrated": calibrated,
    "2 visits": visits(2),
    "4 visits": visits(4),
}


def _unequal(step: Step, draws: int, shares: Tensor) -> Tensor:
    """Draw rows with unequal probabilities, systematically in a random order, and weigh them by the inverse.

    Args:
        step: see `Step`. draws: R.
        shares: [K, B], each row sums to 1.
    """
    chance = _chances(shares, step.counts)
    order = torch.rand(draws, 1, shares.shape[1]).argsort(-1).expand(-1, len(shares), -1)
    end = chance.expand(draws, -1, -1).gather(2, order).cumsum(2)
    start = torch.cat([torch.zeros_like(end[..., :1]), end[..., :-1]], 2)
    offset = torch.rand(draws, 1, 1)
    hit = ((end + offset + 1e-6).floor() > (start + offset + 1e-6).floor()).to(chance.dtype)
    taken = torch.zeros_like(hit).scatter(2, order, hit)
    return taken / chance * (step.weights / shares.shape[1])[:, None]


def _chances(shares: Tensor, counts: Tensor) -> Tensor:
    """Return the chance of each row to be taken, at most 1; those of a goal sum to its count."""
    chance = shares * counts[:, None]
    for _ in range(shares.shape[1]):
        if bool((chance <= 1).all()):
            break
        sure = chance >= 1
        left = counts - sure.sum(1)
        rest = torch.where(sure, 0, shares)
        scaled = rest * (left / rest.sum(1).clamp(min=1e-12))[:, None]
        chance = torch.where(sure, 1.0, scaled)
    return chance.clamp(max=1)
