"""Test runs in separate processes: stopped by a signal, and two that train one model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

from bomkern import History
from bomkern.train import checkpoint, loop, recorder
from bomkern.train.config import Config
from tests.support.training import SMALL


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [*SMALL, "--log-every", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bomkern", "train", "--out", str(tmp_path), "--steps", "100000", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = tmp_path / recorder.METRICS
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert f"by {number.name}" in errors and "--resume" in errors and "Traceback" not in errors
    reached = checkpoint.load(tmp_path / recorder.CHECKPOINT)["step"]
    assert reached >= 2
    summary = loop.train(Config(out=str(tmp_path), steps=reached + 1, resume=True), {"out", "steps", "resume"})
    assert summary["steps"] == reached + 1


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "probe"), [("ddp", "auto"), ("fsdp", "1")])
def test_two_processes_train_one_model(tmp_path: Path, strategy: str, probe: str) -> None:
    shape = [*SMALL, "--scales", "auto", "--calibration-steps", "3", "--steps", "4", "--probe", probe]
    launch = ["--device", "cpu", "--devices", "2", "--strategy", strategy, "--log-every", "2"]
    command = [sys.executable, "-m", "bomkern", "train", "--out", str(tmp_path), *shape, *launch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in recorder.read_lines(tmp_path / recorder.METRICS)] == [2, 4]
    assert json.loads((tmp_path / recorder.SUMMARY).read_text())["steps"] == 4
    assert {recorder.PAYOFF, recorder.HISTORY, recorder.REPORT} <= {path.name for path in tmp_path.iterdir()}
    assert len(History.load(tmp_path / recorder.HISTORY)) == 4
    assert done.stderr.count("is short") <= 1  # one of the two processes prints it
