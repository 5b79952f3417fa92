"""The runs of `bench.faults`: small random problems of several goals, trained with one planted fault or none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomkern import Anchored, Box, BoxAsymmetric, Calibrated, Constraint, GoalSet, Group, History, Policy, Upper

BATCH, PARAMETERS, FEATURES, INPUTS, HIDDEN = 32, 20, 4, 6, 16
NAMES = ("recon", "style", "edges", "colour", "depth", "realism", "motion", "margin", "texture", "shape")


class Truth(NamedTuple):
    """The planted fault of a run and its exact values.

    Attributes:
        fault: a key of `bench.faults.command.KINDS`, or "clean".
        goals: the goals it was planted in.
        onset: the step from which it acts.
        exact: [T, G] raw values without noise, of every goal at every step.
    """

    fault: str
    goals: tuple[str, ...]
    onset: int
    exact: Tensor


class Problem:
    """G smooth random goals of shared parameters, with noise per sample; ``apart`` is the distance of their optima.

    A goal is the mean square of `FEATURES` smooth functions of the parameters minus targets. With ``net`` it is the
    squared error of one output of a small network against a random function. ``apart`` is from 0 to about 1. Each goal
    has its own unit, and a difficulty that drifts by some 10% over some 15 steps, as that of batches does.

    Attributes:
        unit, floor, start: [G] of raw values: their unit, the value from noise alone, and the value before training.
    """

    def __init__(self, goals: int, net: bool, apart: float, noise: float, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.net, self.goals, self.noise = net, goals, noise
        shape = (INPUTS * HIDDEN + HIDDEN * goals,) if net else (PARAMETERS,)
        self.theta = torch.nn.Parameter(self.normal(*shape) * (0.4 if net else 0.05))
        self.unit = 10 ** (3 * self.uniform(goals) - 1.5)
        self.linear, self.inner = self.normal(goals, FEATURES, PARAMETERS), self.normal(goals, FEATURES, PARAMETERS)
        common, own = self.normal(1, PARAMETERS), self.normal(goals, PARAMETERS)
        self.teacher = self.normal(INPUTS, 8), self.normal(8, goals)
        self.drift = torch.zeros(goals)  # added to the targets by `plant_drift`
        self.head = list(range(goals))  # the output or features that each goal reads
        self.mirror = torch.ones(goals)  # -1: the target is on the other side of the start
        self.weather = torch.zeros(goals)
        with torch.no_grad():
            if not net:
                self.target = torch.stack([self.features(common + apart * own[g : g + 1])[g] for g in range(goals)])
                self.origin = self.features(self.theta[None])
            self.initial = self.theta.detach().clone()
            self.floor = self.unit * self.noise**2
            self.start = torch.stack([self.raw(exact=True)[1] for _ in range(8)]).mean(0) + self.floor

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.draw)

    def features(self, theta: Tensor) -> Tensor:
        """Return the features of the parameters, [goals, FEATURES]."""
        return self.linear @ theta[0] / PARAMETERS**0.5 + 0.5 * torch.sin(self.inner @ theta[0] / PARAMETERS**0.5)

    def output(self, x: Tensor, theta: Tensor) -> Tensor:
        first, second = theta.split([INPUTS * HIDDEN, HIDDEN * self.goals])
        return torch.tanh(x @ first.view(INPUTS, HIDDEN)) @ second.view(HIDDEN, self.goals)

    def raw(self, exact: bool = False) -> tuple[Tensor, Tensor]:
        """Return the raw values, [B, G], and their means without the noise, [G]."""
        if self.net:
            x = self.normal(BATCH, INPUTS)
            wanted = torch.tanh(x @ self.teacher[0] / 2) @ self.teacher[1] / 2
            here, there = self.output(x, self.theta)[:, self.head], wanted[:, self.head]
            origin = self.output(x, self.initial)[:, self.head]
            error = (here - origin - self.mirror * (there - origin) - self.drift)[..., None]
        else:
            origin, target = self.origin[self.head], self.target[self.head]
            error = self.features(self.theta[None])[self.head] - origin
            error = (error - self.mirror[:, None] * (target - origin) - self.drift[:, None])[None]
        noisy = error if exact else error + self.noise * self.normal(BATCH, self.goals, error.shape[-1])
        self.weather = 0.935 * self.weather + 0.035 * self.normal(self.goals)  # deviation 0.1
        return noisy.square().mean(-1) * self.unit * self.weather.exp(), error.detach().square().mean(
            (0, -1)
        ) * self.unit


class Latent:
    """A KL-like and a capacity-like goal on a code of 8 dimensions, whose widths training can reduce to 0."""

    def __init__(self, draw: torch.Generator) -> None:
        self.draw, self.widths = draw, torch.nn.Parameter(torch.ones(8))

    def raw(self) -> dict[str, Tensor]:
        """Return the KL [B], the capacity 0-dim, and the decoding error [B], which depends on the code."""
        x = torch.randn(BATCH, 8, generator=self.draw)
        kl = (self.widths * x).square().sum(1) / 2
        capacity = torch.sigmoid((0.1 - self.widths.square()) / 0.05).mean()
        lost = (x / (1 + 3 * self.widths.square())).square().mean(1)
        return {"kl_divergence": kl, "capacity": capacity, "decoding": lost}


class Scene(NamedTuple):
    """A problem about to be trained, the goal that gets the fault, and that goal's right anchors."""

    problem: Problem
    names: list[str]
    policies: dict[str, Constraint | Policy | Group]
    steps: int
    dice: random.Random
    victim: int
    ideal: float
    nadir: float

    def added(self, height: Callable[[int], float]) -> Callable[[int], Tensor]:
        """Return a function from a step to [G], with ``height`` of the step at the victim and 0 elsewhere."""
        mask = torch.nn.functional.one_hot(torch.tensor(self.victim), len(self.names)).float()
        return lambda step: mask * height(step)


class Planted(NamedTuple):
    """The goals of a planted fault, its first step, and the values it adds to the raw values, [G] at each step."""

    goals: tuple[str, ...]
    onset: int
    extra: Callable[[int], Tensor]


def plant_nothing(scene: Scene) -> Planted:
    return Planted((scene.names[scene.victim],), 0, scene.added(lambda step: 0.0))


def plant_floor(scene: Scene) -> Planted:
    height = scene.dice.uniform(1.2, 3) * (scene.nadir - scene.ideal)
    return plant_nothing(scene)._replace(extra=scene.added(lambda step: height))


def plant_drift(scene: Scene) -> Planted:
    """Plant a raw value that always rises, or a target that moves faster than training can follow."""
    onset = int(scene.steps * scene.dice.uniform(0.1, 0.3))
    if scene.dice.random() < 0.5:
        slope = scene.dice.uniform(2, 5) * (scene.nadir - scene.ideal) / (scene.steps - onset)
        return Planted((scene.names[scene.victim],), onset, scene.added(lambda step: slope * max(0, step - onset)))
    speed = scene.dice.choice([-1, 1]) * scene.dice.uniform(0.02, 0.05)
    away, none = scene.added(lambda step: speed * max(0, step - onset)), scene.added(lambda step: 0.0)

    def extra(step: int) -> Tensor:
        scene.problem.drift = away(step)
        return none(step)

    return Planted((scene.names[scene.victim],), onset, extra)


def plant_conflict(scene: Scene) -> Planted:
    """Plant a second goal with the opposite target of the victim's."""
    problem, other = scene.problem, (scene.victim + 1) % len(scene.names)
    problem.head[other], problem.mirror[other] = scene.victim, -1.0
    problem.unit[other] = problem.unit[scene.victim]
    scene.policies[scene.names[other]] = Anchored(scene.ideal, scene.nadir)
    return plant_nothing(scene)._replace(goals=(scene.names[scene.victim], scene.names[other]))


def plant_scale(scene: Scene) -> Planted:
    factor = scene.dice.choice([1 / 300, 300])
    nadir = scene.ideal + factor * (scene.nadir - scene.ideal)
    scene.policies[scene.names[scene.victim]] = Anchored(scene.ideal, nadir)
    return plant_nothing(scene)


def plant_box(scene: Scene) -> Planted:
    """Plant a box whose upper end is below the value from noise alone."""
    floor = float(scene.problem.floor[scene.victim])
    low, high = scene.dice.uniform(-1, 0.3) * floor, scene.dice.uniform(0.4, 0.8) * floor
    box = Box(low, high) if scene.dice.random() < 0.5 else BoxAsymmetric(low, (low + 2 * high) / 3, high)
    scene.policies[scene.names[scene.victim]] = box
    return plant_nothing(scene)


def plant_adversary(scene: Scene) -> Planted:
    """Plant a goal that is calibrated over 30 steps, and gets hard only from step 40."""
    length, height = scene.dice.uniform(40, 150), scene.dice.uniform(4, 15) * scene.nadir
    scene.policies[scene.names[scene.victim]] = Calibrated(steps=30)
    harder = scene.added(lambda step: height * min(1, max(0, step - 40) / length))
    return Planted((scene.names[scene.victim],), 40, harder)


PLANTS = {
    "floor": plant_floor,
    "drift": plant_drift,
    "conflict": plant_conflict,
    "scale": plant_scale,
    "box": plant_box,
    "adversary": plant_adversary,
    "collapse": plant_nothing,  # `add_latent` plants it
    "clean": plant_nothing,
}


def add_latent(policies: dict[str, Constraint | Policy | Group], shut: bool) -> None:
    """Add anchors for `Latent`'s goals; with ``shut`` a strict KL and a lenient capacity make the code collapse."""
    policies["kl_divergence"] = Anchored(0.0, 0.03 if shut else 12.0)
    policies["capacity"] = Anchored(0.0, 4.0 if shut else 1.0)
    policies["decoding"] = Anchored(0.0, 1.0)


def train(fault: str, seed: int) -> tuple[History, Truth]:
    """Train one run, and return its history and truth. ``fault`` is a key of `PLANTS`."""
    dice = random.Random(f"{fault} {seed}")
    count, steps, rate = dice.randint(4, 6), dice.randint(300, 600), dice.choice([0.005, 0.01, 0.02])
    problem = Problem(count, dice.random() < 0.5, dice.uniform(0.1, 0.5), dice.uniform(0.1, 0.3), dice.getrandbits(40))
    names = dice.sample(NAMES, count)
    rough = [math.exp(dice.uniform(-0.4, 0.4)) for _ in range(2 * count)]  # users know anchors only roughly
    lows = [float(low) * a for low, a in zip(problem.floor, rough[::2], strict=True)]
    highs = [float(high) * b for high, b in zip(problem.start, rough[1::2], strict=True)]
    anchors = [(low, max(high, 3 * low)) for low, high in zip(lows, highs, strict=True)]
    policies: dict[str, Constraint | Policy | Group] = {
        name: Anchored(*pair) for name, pair in zip(names, anchors, strict=True)
    }
    if fault == "clean" and dice.random() < 0.3:  # a constraint that can be met
        policies[names[-1]] = Upper(3 * anchors[-1][0], anchors[-1][1])
    victim = dice.randrange(count)
    planted = PLANTS[fault](Scene(problem, names, policies, steps, dice, victim, *anchors[victim]))
    latent = Latent(problem.draw) if fault == "collapse" or (fault == "clean" and dice.random() < 0.3) else None
    parameters = [problem.theta]
    if latent:
        parameters.append(latent.widths)
        add_latent(policies, fault == "collapse")
    where = ("kl_divergence", "capacity") if fault == "collapse" else planted.goals
    goals = GoalSet(policies)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    exact = []
    for step in range(steps):
        offset = planted.extra(step)
        raw, bare = problem.raw()
        values: dict[str, Any] = dict(zip(names, (raw + offset).unbind(1), strict=True))
        if latent:
            values |= latent.raw()
        out = goals(values)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        optimizer.step()
        rest = [v.detach().mean() for v in values.values()][len(names) :]
        exact.append(torch.stack([*(bare + offset).unbind(0), *rest]))
    return goals.history, Truth(fault, where, planted.onset, torch.stack(exact))
