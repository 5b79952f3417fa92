"""The arms of the study, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torchjd.aggregation import MGDA, PCGrad, UPGrad
from torchjd.scalarization import IMTLL, UW

from bench.policies import balancers, gradients, peers, rules
from bench.policies.digits import Digits
from bench.policies.faults import CALIBRATION
from bench.policies.peers import LITERATURE
from bench.policies.pinn import Equation
from bench.policies.problem import Problem
from bench.policies.problems import LONG, PROBLEMS
from bench.policies.rules import Arm, Bottleneck
from bench.policies.vae import VAE
from bomkern import Calibrated, ShareGuard, Tracking

DEFAULT = "spill auto"  # the rule that bomkern advises to begin with, which the study evaluates
EQUAL = "sum"  # equal weights, whose steps set the time that all arms get


def everywhere(problem: type[Problem]) -> bool:
    return True


def on_vaes(problem: type[Problem]) -> bool:
    return issubclass(problem, VAE)


def on_digits(problem: type[Problem]) -> bool:
    """Fit the small VAE alone: variants of bomkern's rule that were found to lose, and rules for a VAE's code."""
    return problem is Digits


def where_quick(problem: type[Problem]) -> bool:
    """Fit all but the problems whose runs take long: variants, which need not be tried everywhere."""
    return not any(PROBLEMS[name] is problem for name in LONG)


def on_equations(problem: type[Problem]) -> bool:
    return issubclass(problem, Equation)


def in_literature(problem: type[Problem]) -> bool:
    return problem.family in LITERATURE


class Entry(NamedTuple):
    """An arm.

    Attributes:
        make: makes a new arm for each run from the name of the problem.
        says: a description for the page.
        faults: 0 if it is run without a fault alone, 1 if under the faults of problems with short runs, 2 if of all.
        fits: whether it is run on a problem.
        peer: whether it is somebody else's.
    """

    make: Callable[[str], Arm]
    says: str
    faults: int = 0
    fits: Callable[[type[Problem]], bool] = everywhere
    peer: bool = False


def auto() -> Calibrated:
    return Calibrated(CALIBRATION)


ARMS: dict[str, Entry] = {
    "auto, global": Entry(
        lambda _: Bottleneck(rules.every(auto), reduction="min"),
        "`Calibrated`, `-log(goals.min())` of the whole batch",
        fits=on_digits,
    ),
    "auto": Entry(lambda _: Bottleneck(rules.every(auto)), "`Calibrated`, per sample", 1, on_vaes),
    "by hand": Entry(
        lambda _: Bottleneck(rules.by_hand),
        "`Calibrated`, but realism, consistency and capacity by hand",
        fits=on_digits,
    ),
    "tracking": Entry(
        lambda _: Bottleneck(rules.every(Tracking)), "`Tracking`: scales follow the goals", fits=on_digits
    ),
    "anchored, global": Entry(
        lambda _: Bottleneck(rules.anchored, reduction="min"), "`Anchored`, of the whole batch", fits=on_digits
    ),
    "anchored": Entry(lambda _: Bottleneck(rules.anchored), "`Anchored`, per sample"),
    "smooth": Entry(
        lambda _: Bottleneck(rules.anchored, temperature=0.1), "`Anchored`, temperature 0.1", fits=where_quick
    ),
    "annealed": Entry(
        lambda _: Bottleneck(rules.anchored, schedule=lambda done: 10 ** (-2 * done)),
        "`Anchored`, temperature falls from 1 to 0.01",
        fits=on_digits,
    ),
    "guarded": Entry(
        lambda _: Bottleneck(rules.anchored, guard=ShareGuard()), "`Anchored` with a `ShareGuard`", fits=on_digits
    ),
    "moving": Entry(
        lambda _: Bottleneck(rules.moving, remeasure=50),
        "`Anchored`, realism's anchors follow the judge",
        fits=on_digits,
    ),
    "probed": Entry(
        lambda _: Bottleneck(rules.probed, probes=1 / 8),
        '`Anchored("probe", "probe")`, an eighth of the updates for the probes',
        fits=on_digits,
    ),
    "half": Entry(lambda _: peers.Half(), "`Anchored`, over a random half of the goals", fits=on_digits),
    "best ideals": Entry(lambda _: peers.BestIdeals(), "ideals move to the best held-out value", fits=on_digits),
    "multipliers": Entry(
        lambda _: peers.Multipliers(), "softmax of averaged deficits weighs whole batches", fits=on_digits
    ),
    "spill 1/2": Entry(lambda _: Bottleneck(rules.anchored, spill=1 / 2), "`Anchored`, spill 1/2", 2),
    "spill 1/3": Entry(lambda _: Bottleneck(rules.anchored, spill=1 / 3), "`Anchored`, spill 1/3", fits=where_quick),
    "spill auto": Entry(lambda _: Bottleneck(rules.anchored, spill="auto"), '`Anchored`, `Spill("auto")`', 2),
    "probed, spill auto": Entry(
        lambda _: Bottleneck(rules.probed, probes=1 / 4, spill="auto"),
        '`Anchored("probe", "probe")`, `Spill("auto")`, a quarter of the updates for the probes',
    ),
    "spill 0.8": Entry(lambda _: Bottleneck(rules.anchored, spill=0.8), "`Anchored`, spill 0.8", fits=where_quick),
    EQUAL: Entry(lambda _: peers.Weighted(), "equal weights", 1, peer=True),
    "raw sum": Entry(
        lambda _: peers.Raw(), "equal weights of the raw losses, without anchors", fits=where_quick, peer=True
    ),
    "literature": Entry(
        lambda data: peers.Raw(PROBLEMS[data].family),
        "weights of the raw losses from the literature",
        fits=in_literature,
        peer=True,
    ),
    "STCH": Entry(lambda _: balancers.SmoothTchebycheff(), "smooth Tchebycheff of batch means (TorchJD)", 1, peer=True),
    "FAMO": Entry(lambda _: balancers.FastAdaptive(), "fast adaptive multitask optimisation (TorchJD)", peer=True),
    "DWA": Entry(lambda _: balancers.DynamicAverage(), "dynamic weight average (TorchJD)", peer=True),
    "UW": Entry(lambda _: balancers.Learnt(UW), "uncertainty weighting (TorchJD)", peer=True),
    "IMTL-L": Entry(lambda _: balancers.Learnt(IMTLL), "impartial multi-task learning, of losses (TorchJD)", peer=True),
    "PBI": Entry(lambda _: balancers.Boundary(), "penalty-based boundary intersection (TorchJD)", peer=True),
    "UPGrad": Entry(
        lambda _: gradients.JacobianDescent(UPGrad),
        "Jacobian descent (TorchJD), a backward for each goal",
        1,
        peer=True,
    ),
    "PCGrad": Entry(lambda _: gradients.JacobianDescent(PCGrad, sums=True), "gradient surgery (TorchJD)", peer=True),
    "MGDA": Entry(lambda _: gradients.JacobianDescent(MGDA), "multiple-gradient descent (TorchJD)", peer=True),
    "ReLoBRaLo": Entry(
        lambda _: balancers.Lookback(),
        "relative balancing of raw losses with random lookback",
        fits=on_equations,
        peer=True,
    ),
    "SoftAdapt": Entry(
        lambda _: balancers.Soft(), "SoftAdapt of raw losses, weighted by them", fits=on_equations, peer=True
    ),
    "gradient norms": Entry(
        lambda _: gradients.GradientNorms(),
        "learning-rate annealing of raw losses by gradient norms",
        fits=on_equations,
        peer=True,
    ),
    "balancer": Entry(
        lambda _: gradients.Balancer(), "EnCodec's, by gradient norms at the code", fits=on_digits, peer=True
    ),
    "VQGAN": Entry(lambda _: gradients.Adaptive(), "adaptive weight of realism", fits=on_digits, peer=True),
}
TUNED = "tuned sum"  # the best of `peers.SUMS` random sums by its worst goal on the validation split
BRIGHT = "tuned sum, measure"  # the best by the main measure among those that leave no goal worse than nothing
