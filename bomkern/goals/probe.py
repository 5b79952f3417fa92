"""`probe`: measure the values that each goal reaches when it is trained alone, and those of the others."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.blame import number_fix
from ..common.checks import as_whole
from .goal_set import GoalSet

MEASURED = 5  # the last 1/5 of each run is averaged


class Payoff(NamedTuple):
    """The payoff table (Benayoun et al. 1971, "Linear programming with multiple objective functions: STEM").

    Attributes:
        columns: K names.
        table: [K, K] float32 on the host; row i holds all raw values after training on goal i alone.
        updates: number of training steps in all runs.
        maximize: names of the columns of which larger values are better.
    """

    columns: list[str]
    table: Tensor
    updates: int
    maximize: tuple[str, ...] = ()

    def anchors(self, which: str) -> dict[str, float]:
        """Return the diagonal for "ideal", or each column's worst entry for "nadir", by column."""
        falls = torch.tensor([name in self.maximize for name in self.columns])
        worst = torch.where(falls, self.table.amin(0), self.table.amax(0))
        values = self.table.diagonal() if which == "ideal" else worst
        return dict(zip(self.columns, values.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        told = {"goals": self.columns, "table": self.table.tolist(), "updates": self.updates}
        return {**told, "maximize": list(self.maximize)} if self.maximize else told

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
    """Train on each goal alone, for a few steps from the same start, and restore everything.

    `Anchored` takes the diagonal of the table as ideals, and the worst entry of each column as nadirs
    (`GoalSet.anchor` with ``probe=``). Both are estimates from short runs: a goal that is still falling would reach a
    better value alone.

    Args:
        step: makes one training step with ``goals``, including the update of the parameters.
        goals: during the call its loss is the mean raw value of one goal, or its negative (`GoalSet.only`). Anchors
            need not be known.
        steps: number of steps of each run; there are K runs.
        state: everything that a step changes: modules, optimizers, loaders, and other objects with ``state_dict`` and
            ``load_state_dict``. None if ``step`` is a method of an object that has both. The state of ``goals`` and of
            the random generators of Python, NumPy and PyTorch is restored too, and gradients are cleared.
        progress: show a progress bar if tqdm is installed.

    Returns:
        The payoff table.

    Raises:
        ValueError: ``steps`` is below 1, no state can be found, or a run gave a value that is not finite.
    """
    count = as_whole(steps)
    if count is None or count < 1:
        raise ValueError(f"steps must be a whole number, at least 1, got {steps!r}{number_fix(steps)}")
    if state is None:
        owner = getattr(step, "__self__", None)
        if not hasattr(owner, "load_state_dict"):
            raise ValueError("state must name what a step changes (modules, optimizers): step is not a method of it")
        state = [owner]
    columns = list(goals.policies)
    everything = [*state, *([] if any(part is goals for part in state) else [goals])]
    start, rows, was_training = _Snapshot(everything), [], goals.training
    bar = _bar(len(columns) * count, progress)
    try:
        for column in columns:
            goals.train()
            begun = goals.steps
            with goals.only(column):
                for _ in range(count):
                    step()
                    bar.update()
            rows.append(_measure(goals, column, goals.steps - begun))
            start.restore()
    finally:
        bar.close()
        start.restore()
        goals.train(was_training)
    falls = tuple(c for c, info in zip(columns, goals.layout.constraints, strict=True) if info.direction < 0)
    return Payoff(columns, torch.stack(rows), len(columns) * count, falls)


def _measure(goals: GoalSet, column: str, steps: int) -> Tensor:
    """Return the mean raw values [K] over the last part of a run on ``column`` of so many steps."""
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
    """Copies of state dicts and of the states of random generators; `restore` also clears gradients."""

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
