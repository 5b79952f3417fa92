"""`bomkern train` with something changed, for torchrun: ``-m tests.support.train_worker CHANGE --out ...``."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch

from bomkern import cli
from bomkern.train import plots, processes, trainer
from bomkern.train.nine_goals import GOALS


def bad() -> None:
    """On rank 1 alone a goal is not finite."""
    true = trainer.raw_values

    def raw_values(*arguments: Any) -> Any:
        raw: Any = true(*arguments)
        k = GOALS.index("consistency")
        raw[k] = raw[k] * (torch.nan if torch.distributed.get_rank() else 1.0)
        return raw

    trainer.raw_values = raw_values


def impatient() -> None:
    """Waits seconds, not minutes."""
    processes.TIMEOUT = timedelta(seconds=20)


def nothing() -> None:
    """But for the pictures."""


if __name__ == "__main__":
    plots.contact_sheets = lambda *_: None
    {"bad": bad, "impatient": impatient, "nothing": nothing}[sys.argv[1]]()
    sys.exit(cli.main(["train", *sys.argv[2:]]))
