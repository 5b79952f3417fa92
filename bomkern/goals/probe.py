"""`probe`: measure the values that each goal reaches when it is trained alone, and those of the others."""

from __future__ import annotations

import copy
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..common.blame import number_fix
from ..common.checks import as_whole, check_whole, finite_number
from ..common.devices import accelerators, rng_state, set_rng_state
from .goal_set import GoalSet
from .payoff import Payoff
from .payoff_anchors import Found, anchors_of, result_of
from .policies import Anchored
from .probe_runs import Run, Runs, signs_of

log = logging.getLogger("bomkern")
LONGEST = 1000  # most steps of a run with steps="auto"


def probe(
    step: Callable[[], object],
    goals: GoalSet,
    steps: int | str = "auto",
    *,
    state: Sequence[Any] | None = None,
    progress: bool = True,
    bounds: Mapping[str, float] | None = None,
    longest: int | None = None,
    tolerance: float = 0.05,
    training: int | None = None,
) -> Payoff:
    """Train on each goal alone, for a few steps from the same start, and restore everything.

    `GoalSet.anchor` with ``probe=`` takes the ideals and nadirs of the result. All statistics are medians.

    - The ideal is the best result of the goal in any run. If its own run still falls, the ideal is extrapolated from
      the last two doublings of its length. It passes neither its bound nor, if the goal was never negative, 0.
    - The nadir is what the goal must bear for another one: the best value that it has wherever the other goal is
      as good as at the end of its own run. A run that goes astray does not count if another one did as well.
    - If the others leave the goal about as it was, its nadir is its value after a tenth of its own run, which is about
      a trivial answer. It is no nearer to the best value than 1/4 of the way back to the untrained model.

    Args:
        step: makes one training step with ``goals``, including the update of the parameters.
        goals: during the call its loss is the mean raw value of one goal, or its negative (`GoalSet.only`). Anchors
            need not be known.
        steps: number of steps of each run; there are K runs. With "auto" a run ends when the last fifth of its steps,
            and at least 50, improved its goal by less than ``tolerance`` of what it has gained. A goal that no run
            moved is then tried once more.
        state: everything that a step changes: modules, optimizers, loaders, and other objects with ``state_dict`` and
            ``load_state_dict``. None if ``step`` is a method of an object that has both. The state of ``goals`` and of
            the random generators of Python, NumPy and PyTorch is restored too, and gradients are cleared.
        progress: show a progress bar if tqdm is installed.
        bounds: by column, the value that its ideal cannot pass in theory, such as ``{"realism": 0.5}``. An
            ``Anchored(0.5, "probe")`` has that ideal anyway.
        longest: most steps of a run with "auto"; None for 1,000, or half of ``training`` if that is less.
        tolerance: > 0, see ``steps``.
        training: steps of the training that follows, of which `Payoff` then tells the cost as a part.

    Returns:
        The payoff table with the anchors and its cost, which it prints. A warning names goals that had not settled,
        those that no run moved, and those whose own run gave no finite value. Such a run is in no statistic.

    Raises:
        KeyError: ``bounds`` names a goal that does not exist.
        ValueError: ``steps`` is neither "auto" nor at least 1, another number is out of its range, no state can be
            found, the runs gave no finite value of some goal, or ``steps`` is "auto" in one of several processes whose
            GoalSet has no ``process_group``, by which they would end a run together.
    """
    count = _check_steps(steps, goals)
    training = None if training is None else check_whole("training", training)
    usual = LONGEST if training is None else max(1, min(LONGEST, training // 2))
    limit = count or (usual if longest is None else check_whole("longest", longest))
    tolerance = finite_number("tolerance", tolerance, above=0)
    low, known, nadirs = _bounds(goals, bounds), _known(goals, "ideal"), _known(goals, "nadir")
    if state is None:
        owner = getattr(step, "__self__", None)
        if not hasattr(owner, "load_state_dict"):
            raise ValueError("state must name what a step changes (modules, optimizers): step is not a method of it")
        state = [owner]
    everything = [*state, *([] if any(part is goals for part in state) else [goals])]
    columns, start, was_training = list(goals.policies), _Snapshot(everything), goals.training
    bar, begun = _bar(len(columns) * count if count else None, progress), time.perf_counter()
    run = Runs(step, goals, limit, tolerance, count is None, bar)
    runs, updates = [], 0
    try:
        for column in columns:
            runs.append(run.alone(column))
            updates += runs[-1].steps
            start.restore()
        found = _estimate(columns, runs, low, known, nadirs)
        for k in found.unmoved if count is None else ():
            if k in found.unmoved and runs[k].steps < limit and nadirs[k].isnan():
                runs[k] = run.alone(columns[k], patient=True)
                updates += runs[k].steps
                start.restore()
                found = _estimate(columns, runs, low, known, nadirs)
    finally:
        bar.close()
        start.restore()
        goals.train(was_training)
    payoff = _payoff(goals, runs, found, updates, time.perf_counter() - begun, training)
    for doubt in payoff.doubts():
        log.warning("probe: %s", doubt)
    return payoff


def _check_steps(steps: int | str, goals: GoalSet) -> int | None:
    """Return the number of steps of each run, None for "auto"."""
    if isinstance(steps, str) and steps == "auto":
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and goals.anchoring.ranks.size == 1:
            raise ValueError(
                'steps="auto" needs GoalSet(process_group=...) in several processes, which must end a run together: '
                "give that, or a number of steps"
            )
        return None
    count = as_whole(steps)
    if count is None or count < 1:
        raise ValueError(f'steps must be a whole number, at least 1, or "auto", got {steps!r}{number_fix(steps)}')
    return count


def _bounds(goals: GoalSet, bounds: Mapping[str, float] | None) -> Tensor:
    """Return the bounds of the ideals, -inf without one, [K]."""
    signs = signs_of(goals)
    low = torch.full_like(signs, -torch.inf)
    for column, value in (bounds or {}).items():
        k = goals.anchoring.index(column)
        low[k] = signs[k] * finite_number(f"bounds: {column}", value)
    return low


def _known(goals: GoalSet, name: str) -> Tensor:
    """Return the ideals or nadirs that are given as numbers, NaN for the others, [K]."""
    given = [
        policy.known.get(name, math.nan) if isinstance(policy, Anchored) else math.nan
        for policy in goals.policies.values()
    ]
    return torch.tensor(given, dtype=torch.float64, device="cpu") * signs_of(goals)


def _estimate(columns: list[str], runs: list[Run], low: Tensor, ideals: Tensor, nadirs: Tensor) -> Found:
    """Return the anchors, with those that are given, or raise an error that names a goal without a finite value."""
    kept = [run.finite for run in runs]
    ends = [result_of(run.values) for run in runs if run.finite]
    missing = torch.stack(ends).isnan().all(0) if ends else torch.ones(len(runs), dtype=torch.bool, device="cpu")
    if missing.any():
        trained = ", ".join(c for c, finite in zip(columns, kept, strict=True) if finite) or " or ".join(columns)
        bad = ", ".join(c for c, lacks in zip(columns, missing.tolist(), strict=True) if lacks)
        raise ValueError(f"training on {trained} alone gave no value to anchor by: {bad} not finite")
    found = anchors_of([run.values for run in runs], kept, low, ideals)
    unmoved = [k for k in found.unmoved if nadirs[k].isnan()]
    return found._replace(nadir=torch.where(nadirs.isnan(), found.nadir, nadirs), unmoved=unmoved)


def _payoff(
    goals: GoalSet, runs: list[Run], found: Found, updates: int, seconds: float, training: int | None
) -> Payoff:
    columns, signs = list(goals.policies), signs_of(goals)
    return Payoff(
        columns,
        (found.table * signs).float(),
        updates,
        maximize=tuple(column for column, sign in zip(columns, signs.tolist(), strict=True) if sign < 0),
        start=tuple((found.start * signs).tolist()),
        ideals=tuple((found.ideal * signs).tolist()),
        nadirs=tuple((found.nadir * signs).tolist()),
        lengths=tuple(run.steps for run in runs),
        seconds=seconds,
        training=training,
        unsettled=tuple(c for c, run in zip(columns, runs, strict=True) if run.finite and not run.settled),
        unmoved=tuple(columns[k] for k in found.unmoved),
        left_out=tuple(c for c, run in zip(columns, runs, strict=True) if not run.finite),
    )


class _Snapshot:
    """Copies of state dicts and of the states of random generators; `restore` also clears gradients."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = [(part, copy.deepcopy(part.state_dict())) for part in parts]
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.devices = {device: rng_state(device) for device in accelerators()}
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        for part, stored in self.parts:
            part.load_state_dict(copy.deepcopy(stored))
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.grad = None
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        for device, state in self.devices.items():
            set_rng_state(device, state)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _bar(total: int | None, wanted: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:

        class Silent:
            def update(self) -> None: ...
            def close(self) -> None: ...

        return Silent()
    return tqdm(total=total, desc="probe", unit="step", disable=not wanted, dynamic_ncols=True, leave=False)
