"""`log_goals`: what a `bomkern.GoalSet` did since the last time, in whatever logger a project has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

from ..goals.goal_set import GoalSet

PER_GOAL = ("share", "level", "deficit")  # parts of a record with one number a goal; raw has one a column


@runtime_checkable
class Logger(Protocol):
    """What `log_goals` writes to. A run of Weights & Biases is one as it is."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the values of a step; ``step`` is passed by name."""
        ...


class TensorBoard:
    """A `Logger` of a ``torch.utils.tensorboard.SummaryWriter``, or of anything with its ``add_scalar``.

    Args:
        writer: has ``add_scalar(tag, value, global_step)``.

    Raises:
        TypeError: it does not.

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
    """A `Logger` of what has ``log_metrics(values, step=)``: the ``mlflow`` module, each of Lightning's loggers.

    Args:
        tracker: the module or object.

    Raises:
        TypeError: it has no ``log_metrics`` that takes a step.

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
    """The `Logger` of what a project logs to already; nothing is imported for it.

    Args:
        target: a `Logger`; a run of Weights & Biases, or the module after ``wandb.init``; the ``mlflow`` module; a
            logger of Lightning; or a ``SummaryWriter``. They are told by their methods.

    Raises:
        TypeError: it has none of the methods; the message lists them.

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
    """Log what happened in the training steps since the last call: means over those with a finite loss.

    The names are ``share/GOAL``, ``level/GOAL``, ``deficit/GOAL`` and ``raw/GOAL`` (of a group's members
    ``raw/GROUP.MEMBER``), ``loss``, and ``rejected``, the fraction of steps whose loss was not finite or that
    `GoalSet.accept` took back. Where all were rejected it is the only one; where there was no step nothing is logged.

    On a CPU nothing waits. On a GPU each call waits until the steps so far are done, once, whatever the number of
    steps: call it every 50, not every one. The call takes the records: with two loggers, give the second what the first
    call returned.

    Args:
        goals: the GoalSet, of which all steps but the last `history.CAPACITY` are forgotten between two calls.
        logger: a `Logger`, or what `as_logger` takes.
        step: what the logger shall count it as.
        prefix: before every name.

    Returns:
        What was logged, by name.

    Raises:
        TypeError: ``goals`` is no GoalSet, or ``logger`` nothing that can log.

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
        for part in (*PER_GOAL, "raw"):
            names = goals.layout.columns if part == "raw" else goals.layout.goals
            values |= {f"{prefix}{part}/{name}": x for name, x in zip(names, window.mean[part].tolist(), strict=True)}
        values[f"{prefix}loss"] = float(window.mean["loss"])
    values[f"{prefix}rejected"] = window.rejected / window.steps
    target.log(values, step=step)
    return values


def _takes_step(target: Any, name: str) -> bool:
    """Whether it has this method, with a parameter ``step``: Python's own loggers have a ``log`` too."""
    method = getattr(target, name, None)
    if not callable(method):
        return False
    try:
        return "step" in inspect.signature(method).parameters
    except (TypeError, ValueError):  # compiled, without a signature
        return False


def _kind(value: Any) -> str:
    return f"the module {value.__name__}" if inspect.ismodule(value) else type(value).__name__
