"""Test the probe before a run: its table, its traces, and goals without a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch

import bomkern
from bomkern import cli
from bomkern.train import loop, recorder
from bomkern.train.config import Config, TrainError
from bomkern.train.nine_goals import GOALS
from tests.support.training import config, make_trainer


@pytest.mark.usefixtures("plain")
def test_a_probe_leaves_no_trace_but_its_table_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, calls = bomkern.probe, []
    monkeypatch.setattr(bomkern, "probe", lambda *a, **b: calls.append(a[2]) or probed(*a, **b))
    plain = loop.train(config(tmp_path / "plain", steps=4))
    summary = loop.train(config(tmp_path / "probed", steps=2, probe=3))
    assert summary["probe_updates"] == 3 * len(GOALS) and plain["probe_updates"] == 0 and calls == [3]
    table = json.loads((tmp_path / "probed" / recorder.PAYOFF).read_text())
    assert table["goals"] == list(GOALS) and table["updates"] == 3 * len(GOALS)
    again = loop.train(Config(out=str(tmp_path / "probed"), steps=4, resume=True), {"out", "steps", "resume"})
    assert calls == [3] and again["probe_updates"] == 3 * len(GOALS)
    metrics = [recorder.read_lines(tmp_path / name / recorder.METRICS) for name in ("plain", "probed")]
    for line in metrics[0] + metrics[1]:
        line.pop("walked", None)  # weighted by measured times
    assert metrics[0] == metrics[1]
    assert "Payoff table" in (tmp_path / "probed" / recorder.REPORT).read_text()
    loop.train(config(tmp_path / "probed", steps=1, overwrite=True))
    assert not (tmp_path / "probed" / recorder.PAYOFF).exists()


def fake(monkeypatch: pytest.MonkeyPatch, table: torch.Tensor) -> None:
    monkeypatch.setattr(bomkern, "probe", lambda *_, **__: bomkern.Payoff(list(GOALS), table, 9))


def test_a_goal_of_which_a_probe_says_nothing_keeps_its_anchors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = 2 - torch.eye(9)
    table[GOALS.index("realism"), GOALS.index("realism")] = 2.5  # realism gets better whenever another goal is trained
    fake(monkeypatch, table)
    run = make_trainer(scales="probed", probe=7)
    loop._probe(run)
    assert run.goals.anchors()["realism"] == (0.5, 0.5) and run.goals.anchors()["consistency"] == pytest.approx((1, 1))
    assert caplog.messages == [
        "--probe 7 is short: realism got further when another goal was trained",
        "realism came out worst when trained alone: it keeps its anchors 0.5 and 1",
    ]


def test_a_goal_that_no_run_moved_keeps_its_anchors_and_others_take_the_estimates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = bomkern.Payoff(list(GOALS), 2 - torch.eye(9), 9, ideals=(1.0,) * 9, nadirs=(3.0,) * 9, unmoved=("realism",))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(bomkern, "probe", lambda *given, **options: asked.update(options, steps=given[2]) or told)
    run = make_trainer(scales="probed", probe="auto")
    loop._probe(run, 500)
    assert run.goals.anchors()["realism"] == (0.5, 0.5) and run.goals.anchors()["consistency"] == pytest.approx((1, 2))
    assert asked["steps"] == "auto" and asked["training"] == 500 and asked["bounds"]["realism"] == 0.5
    assert caplog.messages == ["realism was moved by no run: it keeps its anchors 0.5 and 1"]


def test_the_command_takes_a_number_of_steps_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._parser().parse_args(["train", "--probe", "auto"]).probe == "auto"
    assert cli._parser().parse_args(["train", "--probe", "30"]).probe == 30
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["train", "--probe", "long"])
    assert "'long' is not a whole number" in capsys.readouterr().err


def test_a_probe_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("training on realism alone gave no value to anchor by: realism not finite")

    monkeypatch.setattr(bomkern, "probe", fail)
    with pytest.raises(TrainError, match="--probe 2: training on realism alone gave no value"):
        loop.train(config(tmp_path, probe=2))
