"""Run `bomkern train` with a change, for torchrun: ``-m tests.support.train_worker CHANGE --out ...``."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch

from bomkern import cli, lazy
from bomkern.train import plots, processes, trainer
from bomkern.train.nine_goals import GOALS


def bad() -> None:
    """Make a goal not finite on rank 1 only."""
    true = trainer.raw_values

    def raw_values(*arguments: Any) -> Any:
        raw: Any = true(*arguments)
        k = GOALS.index("consistency")
        raw[k] = lazy(torch.mul, raw[k], torch.nan if torch.distributed.get_rank() else 1.0)
        return raw

    trainer.raw_values = raw_values


def impatient() -> None:
    """Wait seconds instead of minutes for other processes."""
    processes.TIMEOUT = timedelta(seconds=20)


def nothing() -> None:
    """Change nothing; pictures are disabled in any case."""


if __name__ == "__main__":
    plots.contact_sheets = lambda *_: None
    {"bad": bad, "impatient": impatient, "nothing": nothing}[sys.argv[1]]()
    sys.exit(cli.main(["train", *sys.argv[2:]]))
