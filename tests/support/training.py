"""A small training run, and the comparison of two states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch
from lightning_fabric import Fabric
from torch import Tensor

from bomkern.goals.saved import unpack, unpack_history
from bomkern.train import data, trainer
from bomkern.train.config import Config

TINY: dict[str, Any] = {"width": 8, "structure": 6, "appearance": 4, "batch_size": 4, "device": "cpu", "log_every": 2}
SMALL = ["--batch-size", "4", "--structure", "4", "--appearance", "4"]  # command line arguments of a small run


def config(out: Path, **changes: Any) -> Config:
    return Config(**{**TINY, "out": str(out), "steps": 3, **changes})


def make_trainer(**changes: Any) -> trainer.Trainer:
    run = config(Path("unused"), **changes)
    return trainer.Trainer(run, Fabric(accelerator="cpu", devices=1), data.load(None, run.image_size).train)


def leaves(state: Any, name: str = "") -> dict[str, Any]:
    """Return every tensor and number of a nested state, by path; also those packed into a GoalSet's extra states."""
    if name.endswith("monitor._extra_state"):
        return {k: v for k, v in leaves(unpack_history(state), name + "/").items() if not isinstance(v, str)}
    if name.endswith("_extra_state"):
        return {k: v for k, v in leaves(unpack(state)[0], name + "/").items() if not isinstance(v, str)}
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in leaves(value, f"{name}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in leaves(value, f"{name}/{i}").items()}
    return {name: state.clone() if isinstance(state, Tensor) else state}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k])]
    assert not different, different
