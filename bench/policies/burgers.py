"""Burgers' viscous equation in one dimension: its residual, its initial values, and its boundary."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.policies.pinn import RESIDUAL, Equation, Face
from bench.policies.problem import Anchor

VISCOSITY = 0.01 / math.pi
NODES = 100  # of the quadrature: twice as many change the solution by under 1e-12


@lru_cache
def _quadrature() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


class Burgers(Equation):
    """``u_t + u u_x = nu u_xx`` at (x, t) in [-1, 1] x [0, 1], with ``u(x, 0) = -sin(pi x)`` and ``u(-1 or 1, t) = 0``.

    Nadirs: the residual of u = 0 is 0, so that of the initial values extended in time stands for the trivial answer:
    the mean square of ``pi sin(2 pi x) / 2 - nu pi^2 sin(pi x)``. The initial values' nadir is their mean square. The
    boundary's values are 0, and its nadir is the same.
    """

    title = "Burgers"
    family = "burgers"
    rate, steps = 5e-3, 1500
    width, depth = 24, 4
    inside, outer = 100, 32
    low, high = (-1.0, 0.0), (1.0, 1.0)
    along = (0,)
    faces: ClassVar = {"initial": (Face(1, False),), "boundary": (Face(0, False), Face(0, True))}
    drifting = "boundary"
    anchors: ClassVar = {
        RESIDUAL: Anchor(0.0, math.pi**2 / 8 + VISCOSITY**2 * math.pi**4 / 2),
        "initial": Anchor(0.0, 0.5),
        "boundary": Anchor(0.0, 0.5),
    }

    @staticmethod
    def residual(points: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return first[1] + value * first[0] - VISCOSITY * second

    @staticmethod
    def given(points: Tensor) -> Tensor:
        start = -torch.sin(math.pi * points[:, 0])
        return torch.where(points[:, 0].abs() < 1, start, 0.0)

    @staticmethod
    def exact(points: Tensor) -> Tensor:
        """Return Cole and Hopf's solution for t > 0: two integrals, by Gauss-Hermite quadrature."""
        nodes, weights = (x.to(points.dtype) for x in _quadrature())
        x = points[:, :1] - 2 * (VISCOSITY * points[:, 1:]).sqrt() * nodes
        height = -torch.cos(math.pi * x) / (2 * math.pi * VISCOSITY)
        kernel = weights * torch.exp(height - height.detach().amax(1, keepdim=True))
        return -(kernel * torch.sin(math.pi * x)).sum(1) / kernel.sum(1)
