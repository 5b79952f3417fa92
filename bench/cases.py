"""Every op's benches on one page: what the reports, the guard, the profiler and `make gpu` choose of them.

The cases themselves are in bench/ops/bench_OP.py, where `find` looks for them. Nothing else here needs torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Case

Size = dict[str, int]
Labelled = Mapping[str, tuple[int, ...]]
CODES, FEW_CODES = {"B": 65536, "D": 128}, {"B": 64, "D": 16}
GOALS, FEW_GOALS = {"K": 9, "B": 1_048_576}, {"K": 9, "B": 64}
GUARDED: tuple[tuple[str, Size], ...] = (("", {"B": 4096, "D": 128}),)


@dataclass(frozen=True)
class Benches:
    """The benches of one op. A case goes by its label, "" for the only one.

    Attributes:
        usual: the regime in which everything is measured, all sizes and both directions; the others are for some
            sizes. Results from before there were regimes are of this one.
        cases: by label, what the reports call it.
        shown: by label, the batch sizes in the main README's table; there every regime is benched.
        panel: the label of the case that the pictures show, and that a profiler sees.
        profiled: its size for a profiler, and a small one.
        guarded: labels and sizes that `make guard` times.
    """

    usual: str
    cases: dict[str, str]
    shown: Labelled
    panel: str = ""
    profiled: tuple[Size, Size] = (CODES, FEW_CODES)
    guarded: tuple[tuple[str, Size], ...] = GUARDED


OPS: dict[str, Benches] = {
    "min_goal": Benches(
        usual="uniform",
        cases={
            "anchored": "`min_goal_loss`, nine `Minimize` goals",
            "all six constraints": "`min_goal_loss`, nine goals, all six constraints",
        },
        shown={"all six constraints": (64, 8192, 1_048_576), "anchored": (64, 8192, 1_048_576)},
        panel="all six constraints",
        profiled=(GOALS, FEW_GOALS),
        guarded=tuple(("all six constraints", {"K": 9, "B": batch}) for batch in (64, 8192)),
    ),
    "goal_set": Benches(
        usual="uniform",
        cases={
            "hard": "`GoalSet`'s op with the record of the step, each sample's worst goal",
            "smooth": "`GoalSet`'s op with the record of the step, temperature 0.1",
            "spill": "`GoalSet`'s op with the record of the step, goals weighed by order",
        },
        shown={"spill": (64, 8192)},
        panel="spill",
        profiled=(GOALS, FEW_GOALS),
        guarded=tuple((rule, {"K": 9, "B": 512}) for rule in ("spill", "smooth")),
    ),
    "total_correlation": Benches(
        usual="wide",
        cases={"": "`total_correlation`"},
        shown={"": (512, 1024)},
        profiled=({"B": 4096, "D": 128}, FEW_CODES),
        guarded=(("", {"B": 256, "D": 128}),),
    ),
    "gaussian_kl": Benches(usual="busy and idle", cases={"": "`gaussian_kl`"}, shown={"": (512, 65536)}),
    "consistency_variance": Benches(
        usual="noisy views", cases={"": "`consistency_variance` of four views"}, shown={"": (512, 65536)}
    ),
    "active_units": Benches(usual="busy and idle", cases={"": "`active_units`"}, shown={"": (512, 65536)}),
    "latent_statistics": Benches(usual="busy and idle", cases={"": "`latent_statistics`"}, shown={"": (512, 65536)}),
    "covariance_penalty": Benches(
        usual="busy and idle",
        cases={
            "": "`covariance_penalty`, each sample's part",
            "weighed": "`covariance_penalty`, the parts weighed one by one",
            "of the batch": '`covariance_penalty(reduction="batch")`',
        },
        shown={"": (512, 65536)},
    ),
}


def named(op: str, label: str) -> str:
    """Return the name of a case in results: `bench.harness.Case.name`."""
    return f"{op} {label}".strip()


def find(op: str, label: str = "") -> Case:
    """Return a case of bench/ops/bench_OP.py, where it is a variable of its own or in a dict.

    Raises:
        LookupError: there is none of this name.
    """
    from bench.harness import Case

    module = importlib.import_module(f"bench.ops.bench_{op}")
    for value in vars(module).values():
        for case in value.values() if isinstance(value, dict) else (value,):
            if isinstance(case, Case) and case.name == named(op, label):
                return case
    raise LookupError(f"bench/ops/bench_{op}.py has no case {named(op, label)!r}")
