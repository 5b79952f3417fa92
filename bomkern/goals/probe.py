"""`probe`: what each goal could reach alone, and what that costs the others."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .goal_set import GoalSet

MEASURED = 5  # the last 1/5 of each run is averaged


class Payoff(NamedTuple):
    """The payoff table (Benayoun et al. 1971, "Linear programming with multiple objective functions: STEM").

    Attributes:
        columns: K names.
        table: [K, K] float32 on the host; row i holds all raw values after training on goal i alone.
        updates: training steps that it took.
    """

    columns: list[str]
    table: Tensor
    updates: int

    def anchors(self, which: str) -> dict[str, float]:
        """ "ideal", the diagonal; or "nadir", each column's worst entry."""
        values = self.table.diagonal() if which == "ideal" else self.table.amax(0)
        return dict(zip(self.columns, values.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {"goals": self.columns, "table": self.table.tolist(), "updates": self.updates}

    def __str__(self) -> str:
        width = max(10, *map(len, self.columns))
        rows = ["trained on".ljust(width) + "".join(f"  {name:>{width}}" for name in self.columns)]
        for name, row in zip(self.columns, self.table.tolist(), strict=True):
            rows.append(name.ljust(width) + "".join(f"  {value:>{width}.4g}" for value in row))
        return "\n".join(rows)


def probe(
    step: Callable[[], object],
    goals: GoalSet,
    steps: int,
    *,
    state: Sequence[Any] | None = None,
    progress: bool = True,
) -> Payoff:
    """Train on each goal alone, for a few steps from the same start, and put everything back.

    The diagonal of the table is what `Anchored` takes for ideals, its columns' worst entries are nadirs
    (`GoalSet.anchor` with ``probe=``). Both are estimates from short runs: a goal that is still falling is better alone
    than they say.

    Args:
        step: does one training step with ``goals``, updates included.
        goals: inside, its loss is the mean raw value of one goal (`GoalSet.only`). Anchors need not be known yet.
        steps: of each run; K runs are made.
        state: everything that a step changes: modules, optimizers, loaders, whatever has ``state_dict`` and
            ``load_state_dict``. None where ``step`` is a method of an object that has both. The state of ``goals`` and
            the random numbers of Python, NumPy and PyTorch are taken care of, and gradients are cleared.
        progress: show a bar where tqdm is installed.

    Raises:
        ValueError: steps is below 1, no state can be found, or a goal's run gave no finite value.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number, at least 1, got {steps!r}")
    if state is None:
        owner = getattr(step, "__self__", None)
        if not hasattr(owner, "load_state_dict"):
            raise ValueError("state must name what a step changes (modules, optimizers): step is not a method of it")
        state = [owner]
    columns = list(goals.policies)
    everything = [*state, *([] if any(part is goals for part in state) else [goals])]
    start, rows, was_training = _Snapshot(everything), [], goals.training
    bar = _bar(len(columns) * steps, progress)
    try:
        for column in columns:
            goals.train()
            begun = goals.steps
            with goals.only(column):
                for _ in range(steps):
                    step()
                    bar.update()
            rows.append(_measure(goals, column, goals.steps - begun))
            start.restore()
    finally:
        bar.close()
        start.restore()
        goals.train(was_training)
    return Payoff(columns, torch.stack(rows), len(columns) * steps)


def _measure(goals: GoalSet, column: str, steps: int) -> Tensor:
    values = (
        goals.monitor.last_mean("raw", steps // MEASURED) if steps else torch.full((len(goals.policies),), torch.nan)
    )
    if not values.isfinite().all():
        bad = [
            name for name, v in zip(goals.policies, values.tolist(), strict=True) if v != v or abs(v) == float("inf")
        ]
        why = f"{', '.join(bad)} not finite" if steps else "step never called the GoalSet"
        raise ValueError(f"training on {column} alone gave no value to anchor by: {why}")
    return values


class _Snapshot:
    """State dicts, gradients gone, and random states."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = [(part, copy.deepcopy(part.state_dict())) for part in parts]
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        numpy = sys.modules.get("numpy")
        self.numpy = numpy.random.get_state() if numpy else None

    def restore(self) -> None:
        for part, stored in self.parts:
            part.load_state_dict(copy.deepcopy(stored))
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.grad = None
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _bar(total: int, wanted: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:

        class Silent:
            def update(self) -> None: ...
            def close(self) -> None: ...

        return Silent()
    return tqdm(total=total, desc="probe", unit="step", disable=not wanted, dynamic_ncols=True, leave=False)
