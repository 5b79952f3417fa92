"""What every problem of the study has: goals with outside anchors, a model, steps, and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bench.policies.faults import Fault, lift
from bomkern import Lazy, lazy

STEADY = 0.01  # weight of the newest parameters in their moving average, which is evaluated
MOMENTUM = 0.9


class Anchor(NamedTuple):
    """Deficit 0 at ``ideal``, 1 at ``nadir``; `Problem.anchors` are the outside targets that every arm is judged by."""

    ideal: float
    nadir: float


class Measure(NamedTuple):
    """A held-out figure that no anchor defines.

    Attributes:
        key: its name in what `Problem.evaluate` returns. says: its heading. digits: its decimals in tables.
        larger: whether a larger value is better.
    """

    key: str
    says: str
    digits: int = 2
    larger: bool = True

    def of(self, figures: Mapping[str, Any]) -> float:
        """Return the figure; the worst there is where it is missing or not a number, as after a divergence."""
        value = figures.get(self.key)
        if value is None or math.isnan(value):
            return -math.inf if self.larger else math.inf
        return value


def _plus(value: Tensor, more: float) -> Tensor:
    return value + more


class Problem:
    """A model and its goals.

    A subclass sets the attributes in the first paragraph below, and defines `build`, `batch`, `values` and `held_out`.

    Attributes:
        title: name on the page. family: the problem that it is a variant of, by its name in `problems.PROBLEMS`.
        measure: the main figure. extras: other figures for the page.
        anchors: outside ideal and nadir of every goal, known before training and the same for every arm.
        drifting, blocked: the goals that faults act on. faults: names of the faults that mean something here.
        rate, steps: learning rate and training steps. momentum: whether SGD with momentum trains the model, not Adam.

        model: the network. parameters: its parameters. optimizer: of these. average: their moving averages, by name.
        inputs: the last batch. step: updates so far.
        samples: number of training samples, 0 where each step draws new ones. rows: those of the last `batch`, [B].
    """

    title: ClassVar[str]
    family: ClassVar[str]
    measure: ClassVar[Measure]
    extras: ClassVar[tuple[Measure, ...]] = ()
    anchors: ClassVar[dict[str, Anchor]]
    drifting: str
    blocked: str
    faults: ClassVar[tuple[str, ...]] = ("none", "drift", "floor")
    rate: float
    steps: int
    momentum = False
    model: nn.Module
    inputs: Any
    samples = 0
    rows: Tensor

    def __init__(self, seed: int, fault: Fault, steps: int | None = None) -> None:
        self.fault, self.step = fault, 0
        self.steps = steps or self.steps
        torch.manual_seed(seed)
        self.build(seed)
        self.draw = torch.Generator().manual_seed(1000 + seed)
        self.parameters = list(self.model.parameters())
        self.optimizer = self.make_optimizer()
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def build(self, seed: int) -> None:
        """Make the model, with torch's global generator."""
        raise NotImplementedError

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.momentum:
            return torch.optim.SGD(self.parameters, lr=self.rate, momentum=MOMENTUM)
        return torch.optim.Adam(self.parameters, lr=self.rate, fused=True)

    def batch(self) -> Any:
        """Draw the inputs of the next step, with `draw`."""
        raise NotImplementedError

    def values(self, inputs: Any, draw: torch.Generator) -> dict[str, Tensor]:
        """Return raw values of every goal in the order of `anchors`, [B] each or 0-dim."""
        raise NotImplementedError

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return every goal's outside deficit on "validation" or "test", and the figures of `measure` and `extras`."""
        raise NotImplementedError

    # One step.

    def raw(self) -> dict[str, Tensor]:
        """Return the raw values of the next batch, with the planted fault."""
        self.inputs, self.before = self.batch(), self.draw.get_state()
        values = self.values(self.inputs, self.draw)
        return {**values, **self.lifted(values)}

    def lifted(self, values: Mapping[str, Tensor | Lazy]) -> dict[str, Any]:
        """Return the raw values of the goals that the fault lifts now."""
        drift, floor = lift(self.fault, min(1.0, self.step / self.steps))
        lifted: dict[str, Tensor | Lazy] = {}
        for name, amount in ((self.drifting, drift), (self.blocked, floor)):
            if amount:
                value, more = values[name], amount * (self.anchors[name].nadir - self.anchors[name].ideal)
                lifted[name] = lazy(_plus, value, more) if isinstance(value, Lazy) else value + more
        return lifted

    def outside(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Return the batch's mean outside deficits, [K]."""
        return torch.stack(
            [(raw[name].detach().mean() - a.ideal) / (a.nadir - a.ideal) for name, a in self.anchors.items()]
        )

    def named_deficits(self, raw: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the same by name."""
        return dict(zip(self.anchors, self.outside(raw).tolist(), strict=True))

    def values_after_update(self) -> dict[str, Tensor]:
        """Return the raw values of the last batch and noise with the current model, without gradient or fault."""
        draw = torch.Generator()
        draw.set_state(self.before)
        with torch.no_grad():
            return self.values(self.inputs, draw)

    def update(self) -> None:
        """Take the model's step after a backward."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        with torch.no_grad():
            weight = max(STEADY, 1 / (self.step + 1))
            torch._foreach_lerp_(list(self.average.values()), self.parameters, weight)

    # For `bomkern.probe`.

    @property
    def state(self) -> list[Any]:
        """Everything that a step changes, each with a `state_dict`."""
        return [self.model, self.optimizer, self]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "draw": self.draw.get_state(), "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.average = state["step"], state["average"]
        self.draw.set_state(state["draw"])

    # What is measured.

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Any]:
        """Evaluate the averaged weights on a held-out split, without any planted lift.

        Returns:
            The figures of `measure` and `extras`, and every goal's outside deficit ``(raw - ideal) / (nadir - ideal)``,
            of which ``worst`` is the largest. A deficit that is not a number counts as infinite.
        """
        with self._averaged():
            deficits, figures = self.held_out(split)
        deficits = {name: math.inf if math.isnan(d) else d for name, d in deficits.items()}
        return {**figures, "worst": max(deficits.values()), "deficits": deficits}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Let the model have the averaged weights."""
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self._load(self.average)
        yield
        self._load(trained)

    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])
