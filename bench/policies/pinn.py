"""The part that problems of partial differential equations share: a network with derivatives, points, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bench.policies.problem import Measure, Problem

RESIDUAL = "residual"
VALIDATION = 1024  # random points of the domain on which weightings are chosen
GRID = 64  # points of the test grid along each axis


class Net(nn.Module):
    """A network of tanh layers from points [n, 2] to values [n], with Glorot's initial weights.

    Args:
        width: units of a hidden layer. depth: number of hidden layers.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [2, *[width] * depth, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        x = points
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)[:, 0]

    def derivatives(self, points: Tensor, along: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return values [n], first derivatives [2, n], and the sum of the second derivatives along some axes, [n].

        All are carried forward through the layers, which is faster than two backward passes through the network.
        """
        count, axes = points.shape
        first = torch.eye(axes)[:, None].expand(axes, count, axes)
        carried = torch.cat([points[None], first, torch.zeros(1, count, axes)])
        for layer in self.layers:
            carried = carried @ layer.weight.T
            value, first, second = carried[0] + layer.bias, carried[1:-1], carried[-1]
            if layer is not self.layers[-1]:
                value = torch.tanh(value)
                slope = 1 - value * value
                bend = first[list(along)].square().sum(0)
                carried = torch.cat([value[None], slope * first, (slope * (second - 2 * value * bend))[None]])
        return value[:, 0], first[..., 0], second[:, 0]


class Face(NamedTuple):
    """A side of the domain: the axis that is fixed, and whether at its upper end."""

    axis: int
    upper: bool


class Equation(Problem):
    """A partial differential equation in two variables, solved by a network; goals are mean squares, 0-dim.

    A subclass sets the attributes, and defines `residual`, `given` and `exact`. The first goal is the residual.

    Attributes:
        low, high: the domain, a rectangle. along: axes of second derivatives.
        faces: the goals of the boundary, with the sides that each has.
        inside: points of the residual in a step. outer: points of each goal of the boundary.
        width, depth: of the network.
    """

    measure = Measure("error", "relative L2 error", 3, larger=False)
    blocked = RESIDUAL
    low: ClassVar[tuple[float, float]]
    high: ClassVar[tuple[float, float]]
    along: ClassVar[tuple[int, ...]] = (0, 1)
    faces: ClassVar[dict[str, tuple[Face, ...]]]
    inside, outer = 128, 64
    width, depth = 50, 3
    model: Net

    @staticmethod
    def residual(points: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return what is 0 for a solution, [n], of points [n, 2], values [n], first [2, n], and second derivatives [n].

        ``second`` is the sum of the second derivatives along `along`.
        """
        raise NotImplementedError

    @staticmethod
    def given(points: Tensor) -> Tensor:
        """Return the values that the boundary prescribes at its points, [n]."""
        raise NotImplementedError

    @staticmethod
    def exact(points: Tensor) -> Tensor:
        """Return the solution, [n]."""
        raise NotImplementedError

    def build(self, seed: int) -> None:
        self.model = Net(self.width, self.depth)

    def batch(self) -> list[Tensor]:
        uniform = torch.rand(self.inside + self.outer * len(self.faces), 2, generator=self.draw)
        return self._place(uniform, self.inside, self.outer)

    def _place(self, uniform: Tensor, inside: int, outer: int) -> list[Tensor]:
        """Turn points of the unit square into points of the domain and, goal by goal, of the sides in turn."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        points = low + (high - low) * uniform
        parts = list(points.split([inside, *[outer] * len(self.faces)]))
        for part, sides in zip(parts[1:], self.faces.values(), strict=True):
            for turn, side in enumerate(sides):
                part[turn :: len(sides), side.axis] = float((high if side.upper else low)[side.axis])
        return parts

    def values(self, inputs: list[Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        points, boundary = inputs[0], torch.cat(inputs[1:])
        residual = self.residual(points, *self.model.derivatives(points, self.along))
        off = (self.model(boundary) - self.given(boundary)).square()
        means = [part.mean() for part in off.split([len(part) for part in inputs[1:]])]
        return {RESIDUAL: residual.square().mean(), **dict(zip(self.faces, means, strict=True))}

    def points(self, split: str) -> list[Tensor]:
        """Return points of the domain and of each goal of the boundary: random for "validation", a grid for "test"."""
        if split == "validation":
            generator = torch.Generator().manual_seed(7)
            return self._place(
                torch.rand(VALIDATION * (1 + len(self.faces)), 2, generator=generator), *[VALIDATION] * 2
            )
        middle = (torch.arange(GRID) + 0.5) / GRID
        grid = torch.cartesian_prod(middle, middle)
        line = torch.cat([torch.stack([middle, middle], 1).repeat_interleave(4, 0) for _ in self.faces])
        return self._place(torch.cat([grid, line]), GRID**2, 4 * GRID)

    def held_out(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        points = self.points(split)
        deficits = self.named_deficits(self.values(points, self.draw))
        exact = self.exact(points[0].double()).float()
        error = (self.model(points[0]) - exact).norm() / exact.norm()
        return deficits, {"error": float(error)}
