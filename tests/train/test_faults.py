"""Test the faults that a run survives, and its messages otherwise; tests/faults.py repeats them more often."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch

from bomkern import Anchored, GoalSet, Minimize
from bomkern.train import checkpoint, loop, recorder
from bomkern.train import trainer as training
from bomkern.train.config import TrainError
from tests import faults
from tests.support.training import config


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    found = faults.kills(tmp_path, 3)
    assert found["equal"] and found["kills"] == 3, found


@pytest.mark.usefixtures("plain")
def test_damaged_checkpoints(tmp_path: Path) -> None:
    found = faults.damaged(tmp_path, 10)
    assert found["refused"] == found["cut"] == 10 and found["survived"] == 10, found


@pytest.mark.usefixtures("plain")
def test_the_checkpoint_before_is_taken_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults.run(tmp_path, steps=2)
    path = tmp_path / recorder.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    assert faults.run(tmp_path, steps=3, resume=True)["steps"] == 3
    assert "is not a readable checkpoint" in caplog.text and "the previous checkpoint, at step 1" in caplog.text
    for one in (path, checkpoint.before(path)):
        one.write_bytes(b"PK")
    with pytest.raises(TrainError, match=r"checkpoint\.pt is not a readable .*checkpoint\.previous\.pt is not a"):
        faults.run(tmp_path, steps=4, resume=True)


@pytest.mark.usefixtures("plain")
def test_a_full_disk(tmp_path: Path) -> None:
    found = faults.full_disk(tmp_path)
    assert "TrainError: cannot write" in found["said"] and "the previous checkpoint is intact" in found["said"], found
    assert found["kept"] == 2 and found["left"] == [] and found["steps"] == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TrainError, match="cannot write there"):
        loop.train(config(tmp_path))


@pytest.mark.usefixtures("plain")
def test_a_goal_that_raises_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.run(tmp_path / "straight", steps=3)
    with monkeypatch.context() as patch:
        raw_values = training.raw_values

        def fail(*arguments: Any) -> Any:
            if (tmp_path / "broken" / recorder.CHECKPOINT).exists():
                raise ZeroDivisionError("in a goal")
            return raw_values(*arguments)

        patch.setattr(training, "raw_values", fail)
        with pytest.raises(ZeroDivisionError, match="in a goal"):
            faults.run(tmp_path / "broken", steps=3)
    faults.run(tmp_path / "broken", steps=3, resume=True)
    assert faults.equal(faults.state(tmp_path / "straight"), faults.state(tmp_path / "broken"))


def test_a_wrong_shape_after_a_thousand_steps() -> None:
    """The error names the wrong shape, and the next step continues from the step before."""
    made = [GoalSet(a=Anchored(0.0, 1.0), b=Minimize(2.0), spill=0.5) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        raw = {name: torch.rand(4, generator=generator) for name in ("a", "b")}
        for goals in made:
            goals(raw)
    with pytest.raises(ValueError, match=r"the raw value of b must have shape \[B\] or \[\], got \[4, 1\]"):
        made[0]({"a": torch.rand(4), "b": torch.rand(4, 1)})
    with pytest.raises(TypeError, match=r"the raw value of b must be float16.*, got torch.int64: write \.float\(\)"):
        made[0]({"a": torch.rand(4), "b": torch.ones(4, dtype=torch.int64)})
    outs = [goals(raw) for goals in made]
    assert torch.equal(outs[0].record, outs[1].record)
    assert len(made[0].history) == len(made[1].history) == 1001


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("network", ["vae", "discriminator"])
def test_a_weight_that_is_nan_stops_the_run_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    advance = training.Trainer.advance

    def plant(self: training.Trainer) -> None:
        if self.step == 2:
            weight = next(getattr(self, network).parameters()).data
            weight[(0,) * weight.dim()] = torch.nan
        advance(self)

    monkeypatch.setattr(training.Trainer, "advance", plant)
    with pytest.raises(TrainError, match="not finite"):
        faults.run(tmp_path, steps=100)
    kept = checkpoint.load(tmp_path / recorder.CHECKPOINT)
    assert kept["step"] == 2
    assert all(weight.isfinite().all() for name in ("vae", "discriminator") for weight in kept[name].values())
