"""Test the type checker's output for a program that uses an installed bomkern."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from tests.support.processes import ROOT

pytest.importorskip("mypy")

PROGRAM = """
import torch
from torch import Tensor, nn

import bomkern
from bomkern import Anchored, Box, ConstraintTable, Diagnosis, GoalSet, Group, Minimize, Spill, StepGuard, Upper, lazy
from bomkern.integrations import Logger, log_goals


def error(x: Tensor) -> Tensor:
    return x.square().mean(1)


def losses(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    table = ConstraintTable([Minimize(0.1), Upper(30.0, margin=10.0), Box(0.0, 1.0)])
    parts = [
        bomkern.total_correlation(z, mu, logvar, 1000, "mss", impl="reference"),
        bomkern.total_correlation(z, mu, logvar, torch.tensor(1000), parts=True).mutual_information,
        bomkern.gaussian_total_correlation(z).expand(len(z)),
        bomkern.gaussian_kl(mu, logvar, block_size=2, rho=0.1),
        bomkern.consistency_variance([z, mu]),
        bomkern.covariance_penalty(z, normalize=True),
    ]
    active, effective = bomkern.active_units(mu)
    fields = bomkern.latent_statistics(z, mu, logvar)
    loss = bomkern.min_goal_loss(parts[:3], table)
    other, stats = bomkern.min_goal_loss([z[:, 0], lazy(error, z)], Minimize(1.0), return_stats=True)
    return loss + other + stats.share.sum() + active + effective + fields.kl.mean() + torch.stack(parts[3:]).sum()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.goals = GoalSet(recon=Anchored(0.0, 1.0), kl=Group(a=Minimize(1.0), b=Upper(1.0, 1.0)), spill=Spill(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        out = self.goals({"recon": error(y), "kl": {"a": y[:, 0], "b": lazy(error, y)}})
        return out.loss + out.share.sum()


def train(model: Model, logger: Logger) -> Diagnosis:
    guard = StepGuard(torch.optim.AdamW(model.parameters(), fused=True), goals=model.goals)
    guard.zero_grad()
    guard.step(torch.tensor(True))
    log_goals(model.goals, logger, 1)
    return bomkern.diagnose(model.goals.history)
"""
WRONG = """
from torch import Tensor

from bomkern import gaussian_kl, min_goal_loss


def confused(z: Tensor) -> Tensor:
    gaussian_kl(z)
    gaussian_kl(z, z, rho="0.1")
    return min_goal_loss(z, return_stats=True)
"""


@pytest.mark.slow
def test_a_program_type_checks(tmp_path: Path) -> None:
    """mypy --strict finds the mistakes and nothing else.

    bomkern lies beside torch, as an installed package does.
    """
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "bomkern").symlink_to(ROOT / "bomkern")
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    (tmp_path / "right.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable"]
    command += [str(tmp_path / "env" / "bin" / "python"), "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    *lines, last = done.stdout.splitlines()
    assert last.startswith("Found 3 errors in 1 file"), done.stdout + done.stderr
    for line, text in zip(
        lines, ('argument "logvar"', 'type "str"; expected "float"', "return value type"), strict=True
    ):
        assert line.startswith("wrong.py") and text in line
