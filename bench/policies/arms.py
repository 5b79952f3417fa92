"""The arms of the study, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.policies import peers, rules
from bench.policies.faults import CALIBRATION
from bench.policies.rules import Arm, Bottleneck
from bomkern import Calibrated, ShareGuard, Tracking

PROBES = {"digits": 30, "photographs": 5}  # steps of each goal's probe: 9 to 14% of the updates
DEFAULT = "spill 1/2"  # bomkern's default, which the study evaluates


class Entry(NamedTuple):
    """An arm.

    Attributes:
        make: makes a new arm for each run from the name of the data set.
        says: a description for the page.
        faults: whether the arm is run under every fault on the photographs too, whose runs take long.
    """

    make: Callable[[str], Arm]
    says: str
    faults: bool = False


def auto() -> Calibrated:
    return Calibrated(CALIBRATION)


ARMS: dict[str, Entry] = {
    "auto, global": Entry(
        lambda _: Bottleneck(rules.every(auto), reduction="min"), "`Calibrated`, `-log(goals.min())` of the whole batch"
    ),
    "auto": Entry(lambda _: Bottleneck(rules.every(auto)), "`Calibrated`, per sample", faults=True),
    "by hand": Entry(
        lambda _: Bottleneck(rules.by_hand), "`Calibrated`, but realism, consistency and capacity by hand"
    ),
    "tracking": Entry(lambda _: Bottleneck(rules.every(Tracking)), "`Tracking`: scales follow the goals"),
    "anchored, global": Entry(lambda _: Bottleneck(rules.anchored, reduction="min"), "`Anchored`, of the whole batch"),
    "anchored": Entry(lambda _: Bottleneck(rules.anchored), "`Anchored`, per sample", faults=True),
    "smooth": Entry(lambda _: Bottleneck(rules.anchored, temperature=0.1), "`Anchored`, temperature 0.1"),
    "annealed": Entry(
        lambda _: Bottleneck(rules.anchored, schedule=lambda done: 10 ** (-2 * done)),
        "`Anchored`, temperature falls from 1 to 0.01",
    ),
    "guarded": Entry(lambda _: Bottleneck(rules.anchored, guard=ShareGuard()), "`Anchored` with a `ShareGuard`"),
    "moving": Entry(lambda _: Bottleneck(rules.moving, remeasure=50), "`Anchored`, realism's anchors follow the judge"),
    "probed": Entry(
        lambda data: Bottleneck(rules.probed, probes=PROBES[data]), '`Anchored("probe", "probe")`, its updates counted'
    ),
    "half": Entry(lambda _: peers.Half(), "`Anchored`, over a random half of the goals"),
    "best ideals": Entry(lambda _: peers.BestIdeals(), "ideals move to the best held-out value"),
    "multipliers": Entry(lambda _: peers.Multipliers(), "softmax of averaged deficits weighs whole batches"),
    "spill 1/2": Entry(lambda _: Bottleneck(rules.anchored, spill=1 / 2), "`Anchored`, spill 1/2", faults=True),
    "spill 1/3": Entry(lambda _: Bottleneck(rules.anchored, spill=1 / 3), "`Anchored`, spill 1/3", faults=True),
    "sum": Entry(lambda _: peers.Weighted(), "equal weights"),
    "STCH": Entry(lambda _: peers.SmoothTchebycheff(), "smooth Tchebycheff of batch means (TorchJD)"),
    "FAMO": Entry(lambda _: peers.FastAdaptive(), "fast adaptive multitask optimisation (TorchJD)"),
    "UPGrad": Entry(lambda _: peers.JacobianDescent(), "Jacobian descent (TorchJD), a backward for each goal"),
    "balancer": Entry(lambda _: peers.Balancer(), "EnCodec's, by gradient norms at the code"),
    "VQGAN": Entry(lambda _: peers.Adaptive(), "adaptive weight of realism"),
}
TUNED = "tuned sum"  # the best of `peers.SUMS` random sums by its worst goal on the validation split
BRIGHT = "tuned sum, PSNR"  # the best by PSNR among those that leave no goal worse than nothing
