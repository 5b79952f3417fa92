"""Poisson's equation on the unit square, with a goal for each edge, as in PINA's tutorial."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bench.policies.pinn import RESIDUAL, Equation, Face
from bench.policies.problem import Anchor

EIGENVALUE = -2 * math.pi**2  # of the Laplacian, for the solution
SOURCE = 1 / 4  # mean square of the source


class Poisson(Equation):
    """``u_xx + u_yy = q = sin(pi x) sin(pi y)`` on [0, 1]^2, and u = 0 on four edges. Nadirs are as in `Helmholtz`."""

    title = "Poisson"
    family = "poisson"
    rate, steps = 5e-3, 1500
    inside, outer = 100, 20
    width, depth = 32, 2
    low, high = (0.0, 0.0), (1.0, 1.0)
    faces: ClassVar = {
        "left": (Face(0, False),),
        "right": (Face(0, True),),
        "bottom": (Face(1, False),),
        "top": (Face(1, True),),
    }
    drifting = "top"
    anchors: ClassVar = {
        RESIDUAL: Anchor(0.0, SOURCE),
        **dict.fromkeys(faces, Anchor(0.0, SOURCE / EIGENVALUE**2)),
    }

    @staticmethod
    def residual(points: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second - EIGENVALUE * Poisson.exact(points)

    @staticmethod
    def given(points: Tensor) -> Tensor:
        return torch.zeros(len(points))

    @staticmethod
    def exact(points: Tensor) -> Tensor:
        return torch.sin(math.pi * points[:, 0]) * torch.sin(math.pi * points[:, 1]) / EIGENVALUE
