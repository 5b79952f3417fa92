"""The problems of the study, by name."""

from __future__ import annotations

from bench.policies.burgers import Burgers
from bench.policies.digits import Digits
from bench.policies.helmholtz import Helmholtz
from bench.policies.photographs import Photographs
from bench.policies.poisson import Poisson
from bench.policies.problem import Problem
from bench.policies.tasks import Tasks3, Tasks3SGD, Tasks13, Tasks13SGD
from bench.policies.vae import VAE
from bench.policies.vicreg import VICReg, VICRegSGD

VAES: dict[str, type[VAE]] = {"digits": Digits, "photographs": Photographs}
PROBLEMS: dict[str, type[Problem]] = {
    **VAES,
    "helmholtz": Helmholtz,
    "burgers": Burgers,
    "poisson": Poisson,
    "tasks13": Tasks13,
    "tasks13-sgd": Tasks13SGD,
    "tasks3": Tasks3,
    "tasks3-sgd": Tasks3SGD,
    "vicreg": VICReg,
    "vicreg-sgd": VICRegSGD,
}
NAMES = {name: problem.title for name, problem in PROBLEMS.items()}
LONG = ("photographs", "helmholtz", "burgers", "poisson")  # runs take long: few arms under faults
