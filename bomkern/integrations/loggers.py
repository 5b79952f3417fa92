"""`log_goals`: write means of a `bomkern.GoalSet` since the last call to a project's logger."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from ..goals.goal_set import GoalSet
from ..goals.monitor import Window

PER_GOAL = ("share", "level", "deficit")  # parts of a record with one number per goal; raw has one per column


@runtime_checkable
class Logger(Protocol):
    """Protocol of the loggers that `log_goals` writes to. A run of Weights & Biases fulfils it."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step; ``step`` is passed by name."""
        ...


class TensorBoard:
    """A `Logger` that writes to a ``torch.utils.tensorboard.SummaryWriter``, or to any object with ``add_scalar``.

    Args:
        writer: has ``add_scalar(tag, value, global_step)``.

    Raises:
        TypeError: ``writer`` has no ``add_scalar``.

    Example:
        >>> log_goals(goals, TensorBoard(SummaryWriter("runs/mine")), step)
    """

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"TensorBoard: writer must have add_scalar, as a SummaryWriter does, got {_kind(writer)}")
        self.writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class MetricsLogger:
    """A `Logger` that calls ``log_metrics(values, step=)`` of the ``mlflow`` module or of one of Lightning's loggers.

    Args:
        tracker: the module or object.

    Raises:
        TypeError: ``tracker`` has no ``log_metrics`` that takes a step.

    Example:
        >>> log_goals(goals, MetricsLogger(mlflow), step)
    """

    def __init__(self, tracker: Any) -> None:
        if not _takes_step(tracker, "log_metrics"):
            raise TypeError(f"MetricsLogger: tracker must have log_metrics(values, step=), got {_kind(tracker)}")
        self.tracker = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.tracker.log_metrics(dict(values), step=step)


def as_logger(target: Any) -> Logger:
    """Return a `Logger` for an object that a project already logs to. Nothing is imported for it.

    Args:
        target: a `Logger`; a run of Weights & Biases, or the module after ``wandb.init``; the ``mlflow`` module; a
            logger of Lightning; or a ``SummaryWriter``. It is recognized by its methods.

    Raises:
        TypeError: ``target`` has none of the methods; the message lists them.

    Example:
        >>> as_logger(wandb.init(project="mine")).log({"psnr": 18.1}, step=100)
    """
    if _takes_step(target, "log"):
        return cast(Logger, target)
    if _takes_step(target, "log_metrics"):
        return MetricsLogger(target)
    if callable(getattr(target, "add_scalar", None)):
        return TensorBoard(target)
    raise TypeError(
        "logger must have log(values, step=), as a run of Weights & Biases does, log_metrics(values, step=), "
        f"as mlflow and Lightning's loggers do, or add_scalar, as a SummaryWriter does, got {_kind(target)}"
    )


def log_goals(goals: GoalSet, logger: Any, step: int, prefix: str = "goals/") -> dict[str, float]:
    """Log means over the training steps since the last call that had a finite loss.

    The names are ``share/GOAL``, ``level/GOAL``, ``deficit/GOAL`` and ``raw/GOAL`` (``raw/GROUP.MEMBER`` for the
    members of a group), ``loss``, and ``rejected``. The latter is the fraction of steps whose loss was not finite or
    that `GoalSet.accept` took back. It is the only name if all steps were rejected. Without a step nothing is logged.
    A goal's means are over the steps in which a sample had it; without such a step only its share, 0, is logged. Goals
    that are only watched (``GoalSet(monitor=)``) have no ``share``. With a budget of rows (`Spill`),
    ``rows/GOAL`` is the number of samples that a step's raw value rests on.

    A call does not wait on a CPU. On a GPU it waits once until the steps so far are done, so call it every 50 steps,
    not every step. The call consumes the records: with two loggers, pass the returned values to the second.

    Args:
        goals: the GoalSet. Between two calls it keeps the last `history.CAPACITY` steps.
        logger: a `Logger`, or any object that `as_logger` takes.
        step: the step under which the logger files the values.
        prefix: prefix of every name.

    Returns:
        The logged values by name.

    Raises:
        TypeError: ``goals`` is no GoalSet, or ``logger`` cannot log.

    Example:
        >>> if step % 50 == 0:
        ...     log_goals(goals, writer, step)
    """
    if not isinstance(goals, GoalSet):
        raise TypeError(f"goals must be a GoalSet, got {_kind(goals)}")
    target = as_logger(logger)
    window = goals.monitor.take_mean()
    if not window.steps:
        return {}
    values: dict[str, float] = {}
    if window.mean:
        budget = () if goals.row_budget is None else ("rows",)
        values |= _by_name(goals, window, (*PER_GOAL, "raw", *budget), prefix)
        values[f"{prefix}loss"] = float(window.mean["loss"])
    if goals.watched is not None and (seen := goals.watched.monitor.take_mean()).mean:
        values |= _by_name(goals.watched, seen, ("level", "deficit", "raw"), prefix)
    values[f"{prefix}rejected"] = window.rejected / window.steps
    target.log(values, step=step)
    return values


def _by_name(goals: GoalSet, window: Window, parts: Sequence[str], prefix: str) -> dict[str, float]:
    """Return the means of some parts by the names under which they are logged."""
    values: dict[str, float] = {}
    for part in parts:
        names = goals.layout.columns if part in ("raw", "rows") else goals.layout.goals
        means = zip(names, window.mean[part].tolist(), strict=True)
        values |= {f"{prefix}{part}/{name}": mean for name, mean in means if not math.isnan(mean)}
    return values


def _takes_step(target: Any, name: str) -> bool:
    """Return whether an object has this method with a parameter ``step``; Python's own loggers have ``log`` without."""
    method = getattr(target, name, None)
    if not callable(method):
        return False
    try:
        return "step" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # a compiled function without a signature
        return False


def _kind(value: Any) -> str:
    return f"the module {value.__name__}" if inspect.ismodule(value) else type(value).__name__
