"""Test the loggers of a GoalSet, their refusals, and the examples."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bomkern import GoalSet, Group, Minimize
from bomkern.integrations import Logger, MetricsLogger, TensorBoard, as_logger, log_goals

ROOT = Path(__file__).resolve().parents[2]


class Kept:
    """A `Logger` that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append((step, dict(values)))


class Metrics:
    """A logger with mlflow's method."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None) -> None:
        assert step is not None and type(metrics) is dict
        self.calls.append((step, metrics))


class Run:
    """A logger with Weights & Biases' method."""

    def __init__(self) -> None:
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert type(data) is dict and commit is None
        self.calls.append((step, data))


def two_goals() -> GoalSet:
    return GoalSet(near=Minimize(1.0), code=Group(a=Minimize(2.0), b=Minimize(4.0)))


def step(goals: GoalSet, near: list[float], a: float = 1.0, b: float = 2.0) -> Any:
    return goals({"near": torch.tensor(near), "code": {"a": torch.tensor(a), "b": torch.tensor(b)}})


# Loggers.


def test_means_of_the_steps_since_the_last_call() -> None:
    goals, kept = two_goals(), Kept()
    step(goals, [0.2, 0.6])  # the deficit of code is the mean of 1/2 and 2/4
    step(goals, [1.0, 0.0])
    values = log_goals(goals, kept, 7)
    expected = {
        "goals/share/near": 0.5,
        "goals/share/code": 0.5,
        "goals/deficit/near": 0.45,
        "goals/deficit/code": 0.5,
        "goals/raw/near": 0.45,
        "goals/raw/code.a": 1.0,
        "goals/raw/code.b": 2.0,
        "goals/loss": (0.5 + 0.6 + 1.0 + 0.5) / 4,
        "goals/rejected": 0.0,
        "goals/level/near": float(torch.exp(-torch.tensor([0.2, 0.6, 1.0, 0.0])).mean()),
        "goals/level/code": float(torch.exp(torch.tensor(-0.5))),
    }
    assert values == pytest.approx(expected, rel=1e-5)
    assert kept.calls == [(7, values)]
    step(goals, [3.0, 3.0])
    assert log_goals(goals, kept, 8, prefix="")["share/near"] == 1.0
    assert log_goals(goals, kept, 9) == {} and [at for at, _ in kept.calls] == [7, 8]


def test_rejected_steps_are_counted_and_left_out() -> None:
    goals, kept = two_goals(), Kept()
    step(goals, [0.2, 0.2])
    step(goals, [float("nan"), 0.2])
    step(goals, [0.9, 0.9])
    goals.accept(torch.tensor(False))
    step(goals, [0.4, 0.4])
    values = log_goals(goals, kept, 1)
    assert values["goals/rejected"] == 0.5
    assert values["goals/raw/near"] == pytest.approx(0.3)
    step(goals, [float("inf"), 0.2])
    assert log_goals(goals, kept, 2) == {"goals/rejected": 1.0}


def test_the_history_is_not_taken_away() -> None:
    goals = two_goals()
    for _ in range(3):
        step(goals, [0.2, 0.2])
    log_goals(goals, Kept(), 3)
    assert len(goals.history) == 3


def test_a_window_is_taken_once_and_the_last_steps_are_not() -> None:
    goals = two_goals()
    assert goals.monitor.take_mean() == (0, 0, {})
    for near in (1.0, 2.0, float("nan"), 4.0):
        step(goals, [near])
    window = goals.monitor.take_mean()
    assert (window.steps, window.rejected) == (4, 1) and float(window.mean["loss"]) == pytest.approx(7 / 3)
    assert window.mean["raw"].tolist() == pytest.approx([7 / 3, 1.0, 2.0])
    assert goals.monitor.take_mean().steps == 0
    last = goals.monitor.last_mean
    # values that are not finite are left out
    assert [float(last("raw", steps)[0]) for steps in (1, 2, 3)] == [4.0, 4.0, 3.0]
    assert float(last("raw", 0)[0]) == 4.0 and float(last("loss", 99)) == pytest.approx(7 / 3)


def test_each_tool_by_its_method() -> None:
    kept, run, metrics = Kept(), Run(), Metrics()
    module = types.ModuleType("mlflow")
    module.log_metrics = metrics.log_metrics  # type: ignore[attr-defined]
    assert as_logger(kept) is kept and isinstance(kept, Logger)
    assert as_logger(run) is run
    assert isinstance(as_logger(module), MetricsLogger)
    goals = two_goals()
    for target in (run, module):
        step(goals, [0.2, 0.2])
        log_goals(goals, target, 5)
    assert [at for at, _ in run.calls + metrics.calls] == [5, 5]
    assert metrics.calls[0][1]["goals/raw/near"] == pytest.approx(0.2)
    assert run.calls[0][1].keys() == metrics.calls[0][1].keys()


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    goals = two_goals()
    with SummaryWriter(str(tmp_path)) as writer:
        assert isinstance(as_logger(writer), TensorBoard)
        for at in (10, 20):
            step(goals, [at / 100, at / 100])
            log_goals(goals, writer, at)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("goals/raw/near")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.2)),
    ]
    assert len(events.Tags()["scalars"]) == 11


@pytest.mark.parametrize("wrong", [object(), logging.getLogger("some"), logging, print, None])
def test_what_cannot_log_is_named(wrong: Any) -> None:
    goals = two_goals()
    step(goals, [0.2, 0.2])
    with pytest.raises(TypeError, match=r"logger must have log\(values, step=\).*log_metrics.*add_scalar.*got"):
        log_goals(goals, wrong, 1)
    assert log_goals(goals, Kept(), 1)["goals/rejected"] == 0.0  # the history still has the steps


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="goals must be a GoalSet, got Linear"):
        log_goals(nn.Linear(1, 1), Kept(), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"writer must have add_scalar.*got Kept"):
        TensorBoard(Kept())
    with pytest.raises(TypeError, match=r"tracker must have log_metrics.*got Kept"):
        MetricsLogger(Kept())


# The examples.


def run_example(*arguments: str, cwd: Path) -> str:
    name, *rest = arguments
    command = [sys.executable, str(ROOT / "examples" / name), *rest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_loop(tmp_path: Path) -> None:
    printed = run_example("plain_loop.py", cwd=tmp_path)
    assert "1000 steps" in printed and "steps 1 to 1000: the gradient went to recon" in printed
    levels = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("  ") and "Anchored(" in line]
    assert len(levels) == 3 and min(levels) > 0.5
    assert "0 steps were rejected" in printed and not list(tmp_path.iterdir())


def test_the_lightning_example(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    printed = run_example("lightning_vae.py", "--steps", "200", "--out", "run", cwd=tmp_path)
    assert "200 steps" in printed and "steps 1 to 200: the gradient went to" in printed
    assert float(printed.split("held-out PSNR ")[1].split()[0]) > 13  # the mean image has a PSNR of 11.3
    assert "goals/share/recon" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    again = run_example("lightning_vae.py", "--steps", "210", "--out", "run", "--resume", "run/last.ckpt", cwd=tmp_path)
    assert "210 steps" in again and "steps 1 to 210: the gradient went to" in again


def test_the_accelerate_example(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    printed = run_example("accelerate_loop.py", "run", cwd=tmp_path)
    assert "56 steps" in printed and "0 steps were rejected" in printed  # 4 epochs of 28 batches, 2 to a step
    again = run_example("accelerate_loop.py", "run", cwd=tmp_path)
    assert "112 steps" in again and "0 steps were rejected" in again


def test_the_fabric_example_on_two_processes(tmp_path: Path) -> None:
    printed = run_example("fabric_loop.py", "2", cwd=tmp_path)  # which asserts that the ranks agree
    assert "100 steps" in printed and "0 steps were rejected" in printed
    recon = next(line for line in printed.splitlines() if line.strip().startswith("recon"))
    assert float(recon.split()[-1]) > 0.4  # the mean image has exp(-1) = 0.37
