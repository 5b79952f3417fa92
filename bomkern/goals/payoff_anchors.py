"""Ideals and nadirs from the runs of `bomkern.probe`, by medians and by what each goal costs the others.

Inside this file smaller is better: values of goals to maximize are negated. T is the number of steps of a run, and K
that of columns. A value that is not finite is NaN here, and is in no statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIRST = 5  # steps whose median is the value of the untrained model
MEASURED = 5  # the last 1/5 of each run is its result
TRIVIAL = 10  # the first 1/10 of a goal's own run learns a trivial answer
LEAST_SCALE = 0.25  # smallest distance from a goal's best value to its nadir, as a part of that to its start
HARMED = 1.25  # a goal is harmed where others bring it this much further from its best value than the untrained model
SURE = 3.0  # standard errors by which a change is more than noise
MOST_RATIO = 2 / 3  # of the gains of two doublings that an extrapolation assumes


class Found(NamedTuple):
    """What the runs say; all tensors are float64 on the host.

    Attributes:
        table: [K, K], the results; row i is of the run on column i.
        start, ideal, nadir: [K].
        unmoved: indices of the columns that no run moved by more than noise, whose scale is a guess.
    """

    table: Tensor
    start: Tensor
    ideal: Tensor
    nadir: Tensor
    unmoved: list[int]


def median(values: Tensor) -> Tensor:
    """Return the median over the first dimension of the values that are not NaN."""
    middle: Tensor = values.nanmedian(0).values
    return middle


def step_noise(run: Tensor) -> Tensor:
    """Return the standard deviation [K] of the noise of one step, from differences between consecutive steps [T, K]."""
    if len(run) < 3:
        return torch.zeros_like(run[0])
    changes = median((run[1:] - run[:-1]).abs())
    return changes.nan_to_num() * (1.4826 / 2**0.5)


def median_error(noise: Tensor, steps: int) -> Tensor:
    """Return the standard error of a median over so many steps."""
    return noise * (1.2533 / math.sqrt(steps))


def last_steps(run: Tensor, part: int) -> Tensor:
    return run[-max(1, len(run) // part) :]


def result_of(run: Tensor) -> Tensor:
    """Return the medians [K] of the end of a run."""
    return median(last_steps(run, MEASURED))


def moved(change: Tensor, error: Tensor, size: Tensor) -> Tensor:
    """Return whether a change of values of some size is more than noise and rounding."""
    return change.abs() > SURE * error + 1e-6 * size.abs()


def anchors_of(runs: Sequence[Tensor], kept: Sequence[bool], low: Tensor, known: Tensor) -> Found:
    """Estimate the ideals and nadirs of K goals from K runs.

    Args:
        runs: raw values of each step, [T, K] float64; run i trained column i alone.
        kept: whether a run counts; one whose own goal ended at no finite value does not.
        low: [K], the bounds of the ideals, -inf where there is none.
        known: [K], the ideals that are given, NaN where there is none.
    """
    columns = range(len(runs))
    table = torch.stack([result_of(run) for run in runs])
    used = [i for i in columns if kept[i]]
    first = torch.cat([runs[i][: _first(runs[i])] for i in used])
    start = median(first)
    error = median(torch.stack([_error(runs[i], len(first)) for i in used]))  # a run that goes astray is noisy
    low = torch.where(known.isnan(), low, torch.maximum(low, known))
    best = torch.maximum(_least(table[used]), low)
    own = torch.maximum(table.diagonal(), low)  # a run below its bound is an artefact, as with an untrained adversary
    gain = start - own
    gained = torch.tensor(list(kept), device="cpu") & (gain > 0) & moved(gain, error, start)
    worse = torch.clamp(table[used] - start, min=0.0).nan_to_num()
    still = ~gained & ~moved(worse, error, start).any(0)
    harm = _harm(runs, used, table, own, still)
    nadir = torch.maximum(harm, start)
    harmed = (harm - best > HARMED * (start - best)) & moved(harm - best, error, start)
    for k in columns:
        if gained[k] and not harmed[k]:
            early = runs[k][: max(1, len(runs[k]) // TRIVIAL), k]
            trivial = torch.minimum(median(last_steps(early, MEASURED)), start[k])
            nadir[k] = torch.maximum(trivial, best[k] + LEAST_SCALE * (start[k] - best[k]))
    ideal = best.clone()
    for k in columns:
        if gained[k] and known[k].isnan():
            limit = torch.clamp(low[k], min=0.0) if not any((runs[i][:, k] < 0).any() for i in used) else low[k]
            ideal[k] = torch.maximum(torch.minimum(_limit_of(runs[k][:, k], error[k], limit), best[k]), low[k])
    ideal = torch.where(known.isnan(), ideal, known)
    guessed = ~((nadir - best > 0) & moved(nadir - best, error, start))
    nadir = torch.where(guessed, torch.maximum(nadir, best + torch.where(best == 0, 1.0, best.abs())), nadir)
    return Found(table, start, ideal, nadir, guessed.nonzero()[:, 0].tolist())


def settled(before: Tensor, last: Tensor, start: float, best: float, tolerance: float) -> bool:
    """Return whether a goal improved no more over its last steps than by a part of what it has gained, or by noise.

    Args:
        before, last: its own raw values in the steps before, and in the last ones.
        start, best: its first value, and the best one so far.
    """
    improved = float(median(before) - median(last))
    noise = step_noise(torch.cat([before, last])[:, None])[0]
    return improved <= max(tolerance * (start - best), float(2 * median_error(noise, len(last))))


def _first(run: Tensor) -> int:
    return max(1, min(FIRST, len(run) // TRIVIAL))


def _error(run: Tensor, started: int) -> Tensor:
    """Return the standard errors [K] of the change from the start to the result of a run."""
    noise = step_noise(run)
    ends = len(last_steps(run, MEASURED))
    return (median_error(noise, started).square() + median_error(noise, ends).square()).sqrt()


def _least(values: Tensor) -> Tensor:
    """Return the least value of each column that is not NaN, inf if there is none."""
    return values.nan_to_num(nan=torch.inf).amin(0)


def _harm(runs: Sequence[Tensor], used: Sequence[int], table: Tensor, reached: Tensor, still: Tensor) -> Tensor:
    """Return for each column the most that another goal costs it, [K]; -inf without another goal.

    The cost of goal i to column j is the best value of j over all states of all runs in which i has reached its result.
    So a run that goes astray costs nothing where another run is as good for its own goal.
    """
    states = torch.cat([_states(runs[i]) for i in used] + [table[used]])
    harm = torch.full_like(reached, -torch.inf)
    for i in used:
        # All states are alike for a goal that nothing moves, so only its own run shows what it costs.
        good = table[i : i + 1] if still[i] else torch.cat([states[states[:, i] <= reached[i]], table[i : i + 1]])
        cost = _least(good)
        cost[i] = -torch.inf
        harm = torch.maximum(harm, torch.where(cost == torch.inf, -torch.inf, cost))
    return harm


def _states(run: Tensor) -> Tensor:
    """Return the medians of some 50 blocks of steps of a run, of at least `FIRST` steps in all but short runs."""
    size = max(_first(run), len(run) // 50)
    blocks: Tensor = run[len(run) % size :].unflatten(0, (-1, size))
    return median(blocks.movedim(1, 0))


def _limit_of(values: Tensor, error: Tensor, limit: Tensor) -> Tensor:
    """Return the value that a falling goal tends to, by Aitken's process over the last two doublings of its run.

    Where it falls ever faster, there is no telling: it is ``limit``, or where that is -inf as much again as the last
    doubling gained.
    """
    count = len(values)
    if count < 4 * FIRST:
        return values.new_full((), torch.inf)
    quarter, half, end = (median(last_steps(values[:n], MEASURED)) for n in (count // 4, count // 2, count))
    earlier, later = quarter - half, half - end
    if not later > SURE * error:
        return end
    if not later < earlier:
        return limit if limit > -torch.inf else end - later
    ratio = torch.clamp(later / earlier, max=MOST_RATIO)
    return torch.maximum(end - later * ratio / (1 - ratio), limit)
