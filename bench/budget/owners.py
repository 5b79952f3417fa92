"""Measure whether the owner of a sample, its worst goal under the hard minimum, can be predicted from earlier steps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.budget.arms import ARMS
from bench.budget.variance import gradients_of
from bench.budget.visits import THIRDS, Visits, figures
from bench.policies import peers
from bench.policies.faults import FAULTS
from bench.policies.problems import VAES
from bench.policies.vae import VAE

AGES = (0, 1, 2, 5, 10, 20)  # steps after which batches are looked at again
TRUSTED = (1, 5, 20)  # ages whose owners are trusted, to see which gradient that gives
EPOCH = "epoch"  # the age of an owner that was found when the sample was last drawn


class Plan(NamedTuple):
    """The amount of work: seeds of the runs, points of a run at which batches are noted, and batches of a point."""

    seeds: tuple[int, ...]
    points: int
    batches: int


PLANS = {"digits": Plan((20, 21, 22), 9, 16), "photographs": Plan((20, 21, 22), 6, 8)}
QUICK = Plan((20,), 1, 2)


class Batch(NamedTuple):
    """A batch that is looked at again.

    Attributes:
        image: [B, C, H, W]. noise: the seed of its noise.
        owners: when it was noted, [B] int64.
        before: the owners when its samples were last drawn, [B] int64; None where samples are not drawn again.
    """

    image: Tensor
    noise: int
    owners: Tensor
    before: Tensor | None


def deficits(problem: VAE, image: Tensor, noise: int) -> Tensor:
    """Return the deficits of a batch with the noise of a seed, [B, K]."""
    return peers.deficits(problem, problem.forward(image, torch.Generator().manual_seed(noise))[0])


@torch.no_grad()
def note(problem: VAE, batches: int, visits: Visits) -> list[Batch]:
    """Draw batches, and note their owners; a sample that was never drawn before gets its owner of now as the last."""
    noted = []
    for index in range(batches):
        image, noise = problem.batch(), 1000 * (problem.step * batches + index)
        owners = deficits(problem, image, noise).argmax(1)
        before = visits.last[problem.rows] if problem.samples else None
        noted.append(Batch(image, noise, owners, None if before is None else torch.where(before < 0, owners, before)))
    return noted


@torch.no_grad()
def agreement(problem: VAE, noted: list[Batch], age: int) -> dict[str, float]:
    """Return the fraction of samples that still have their owner, with the noise of then and with new noise."""
    found = {}
    for name, new in (("same", 0), ("fresh", 1 + age)):
        hits = [(deficits(problem, b.image, b.noise + new).argmax(1) == b.owners).float().mean() for b in noted]
        found[name] = float(torch.stack(hits).mean())
    return found


def trust(problem: VAE, noted: list[Batch], old: list[Tensor]) -> dict[str, list[float]]:
    """Return what the gradients of old owners and of the true ones have in common.

    Args:
        problem: see `VAE`. noted: M batches. old: owners of each, [B].

    Returns:
        ``one``: inner products of a batch's true gradient with itself, the old owners' with itself, and both, as parts
        of the first. ``expected``: the same of expected gradients, without bias from the M batches. ``gap``: the part
        of the loss that old owners miss.
    """
    pairs, losses = [], []
    for batch, owners in zip(noted, old, strict=True):
        d = deficits(problem, batch.image, batch.noise)
        values = torch.stack([d.max(1).values.mean(), d.gather(1, owners[:, None]).mean()])
        pairs.append(gradients_of(values, problem.parameters).double())
        losses.append(values.detach())
    true, stale = torch.stack(pairs, 1)
    one, expected = products(true, stale)
    loss, trusted = torch.stack(losses).mean(0)
    return {"one": figures(one / one[0]), "expected": figures(expected / one[0]), "gap": [float(1 - trusted / loss)]}


def products(true: Tensor, stale: Tensor) -> tuple[Tensor, Tensor]:
    """Return inner products of two gradients of M batches, [M, P] each: first twice, second twice, both.

    Returns:
        The means over the batches, [3], and unbiased estimates of those of the expected gradients, [3].
    """
    count, pairs = len(true), ((true, true), (stale, stale), (true, stale))
    one = torch.stack([(a * b).sum() for a, b in pairs]) / count
    total = torch.stack([a.sum(0) @ b.sum(0) for a, b in pairs])
    return one, (total - count * one) / (count * (count - 1))


def measure(data: str, steps: int | None = None, quick: bool = False) -> dict[str, Any]:
    """Train with the hard minimum, and measure.

    Returns:
        ``visits``: see `Visits.found`. ``ages``: the results of `agreement` by age, each by thirds of the run.
        ``stale``: the results of `trust` by age, for each seed.
    """
    from tqdm import tqdm

    torch.set_num_threads(1)
    plan = QUICK if quick else PLANS[data]
    visited: list[dict[str, list[float]]] = []
    ages: dict[int, list[dict[str, list[float]]]] = defaultdict(lambda: [defaultdict(list) for _ in range(THIRDS)])
    stale: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    for seed in plan.seeds:
        trusted: dict[int | str, list[dict[str, list[float]]]] = defaultdict(list)
        problem, arm = VAES[data](seed, FAULTS["none"], steps), ARMS["hard"].make(data)
        arm.start(problem)
        visits = Visits(problem.samples, len(problem.anchors))
        points = {int((point + 0.5) * problem.steps / plan.points) for point in range(plan.points)}
        noted: dict[int, list[Batch]] = {}
        for step in tqdm(range(problem.steps), desc=f"{data}, seed {seed}"):
            if step in points:
                noted[step] = note(problem, plan.batches, visits)
                if problem.samples:
                    old = [b.before for b in noted[step] if b.before is not None]
                    trusted[EPOCH].append(trust(problem, noted[step], old))
            for begun, batches in noted.items():
                age = step - begun
                if age in AGES:
                    for name, part in agreement(problem, batches, age).items():
                        ages[age][THIRDS * begun // problem.steps][name].append(part)
                if age in TRUSTED:
                    trusted[age].append(trust(problem, batches, [b.owners for b in batches]))
            raw = problem.raw()
            owners = peers.deficits(problem, raw).argmax(1)
            visits.add(step, THIRDS * step // problem.steps, owners, problem.rows if problem.samples else None)
            arm.backward(problem, raw)
            problem.update()
            arm.after(problem)
        for age, each in trusted.items():
            stale[str(age)].append(_means(each))
        visited.append(visits.found())
    return {
        "steps": problem.steps,
        "batch": len(problem.image),
        "seeds": len(plan.seeds),
        "points": plan.points,
        "batches": plan.batches,
        "visits": _means(visited),
        "ages": {
            str(age): {name: [_mean(third[name]) for third in thirds] for name in ("same", "fresh")}
            for age, thirds in ages.items()
        },
        "stale": dict(stale),
    }


def _means(each: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {name: figures(torch.tensor([found[name] for found in each]).mean(0)) for name in each[0]}


def _mean(values: list[float]) -> float | None:
    return figures(torch.tensor([values]).mean(1))[0] if values else None
