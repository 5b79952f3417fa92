"""Helmholtz's equation on a square (Wang, Teng & Perdikaris 2021): its residual and its boundary."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bench.policies.pinn import RESIDUAL, Equation, Face
from bench.policies.problem import Anchor

WAVES = (1, 4)  # half waves of the solution along each axis, on [-1, 1]
EIGENVALUE = -(math.pi**2) * (WAVES[0] ** 2 + WAVES[1] ** 2)  # of the Laplacian, for the solution
SOURCE = (1 + EIGENVALUE) ** 2 / 4  # mean square of the source


class Helmholtz(Equation):
    """``u_xx + u_yy + u = q`` on [-1, 1]^2, u = 0 on the boundary, and ``u = sin(pi x) sin(4 pi y)``.

    Nadirs, as `bomkern.anchors` has them: the residual of u = 0 is the source. The values at the boundary are 0, so
    u = 0 meets them; their nadir is the square of `anchors.solution_scale`, of a solution that no boundary holds.
    """

    title = "Helmholtz"
    family = "helmholtz"
    rate, steps = 2e-3, 1500
    low, high = (-1.0, -1.0), (1.0, 1.0)
    faces: ClassVar = {"boundary": (Face(0, False), Face(0, True), Face(1, False), Face(1, True))}
    drifting = "boundary"
    anchors: ClassVar = {
        RESIDUAL: Anchor(0.0, SOURCE),
        "boundary": Anchor(0.0, SOURCE / (math.pi**2 / 2) ** 2),
    }

    @staticmethod
    def residual(points: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second + value - (1 + EIGENVALUE) * Helmholtz.exact(points)

    @staticmethod
    def given(points: Tensor) -> Tensor:
        return torch.zeros(len(points))

    @staticmethod
    def exact(points: Tensor) -> Tensor:
        return torch.sin(WAVES[0] * math.pi * points[:, 0]) * torch.sin(WAVES[1] * math.pi * points[:, 1])
