"""Test what a run tells of a goal that is absent in most steps: history, table, logs, diagnosis and report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import GoalSet, History, Minimize, diagnose
from bomkern.goals.history import CAPACITY
from bomkern.integrations import log_goals
from bomkern.report import write_report

EVERY = 16


class Printed:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        self.values = dict(values)


def penalty(step: int) -> float:
    return 2.0 if step % (2 * EVERY) == 0 else 1.0


def run(steps: int, **options: Any) -> GoalSet:
    """Two goals that get better, and a penalty every 16th step that is the worst goal of its steps."""
    goals = GoalSet(
        recon=Minimize(1.0), kl=Minimize(1.0), penalty=Minimize(1.0), optional=["penalty"], temperature=0.2, **options
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        noise = 0.05 * torch.rand(2, 8, generator=generator)
        down = math.exp(-3 * step / steps)
        raw: dict[str, Tensor] = {"recon": down + noise[0], "kl": 0.9 * down + noise[1]}
        if step % EVERY == 0:
            raw["penalty"] = torch.tensor(penalty(step))
        goals(raw)
    return goals


def test_the_history_keeps_what_was_seen() -> None:
    history = run(320).history
    seen = torch.arange(320) % EVERY == 0
    raw, level, share = history["raw"][:, 2], history["level"][:, 2], history["share"][:, 2]
    assert torch.equal(raw.isnan(), ~seen) and torch.equal(level.isnan(), ~seen)
    assert raw[seen].mean() == pytest.approx(1.5) and (share[~seen] == 0).all() and (share[seen] > 0.5).all()
    assert history["loss"].isfinite().all() and (history["finite"] == 1).all()


def test_joined_rows_hold_the_means_of_the_steps_that_had_the_goal() -> None:
    goals = run(40)
    history = goals.history
    rows = torch.cat([history._rows] * (CAPACITY // 40 + 1))[:CAPACITY]
    joined = History(history.layout)
    joined.append(rows)
    assert joined.stride == 2
    pairs, got = rows[:, :].unflatten(0, (-1, 2)), joined["raw"]
    want = joined.layout.parts(pairs)["raw"].nanmean(1)
    torch.testing.assert_close(got, want, equal_nan=True)
    shares = joined.layout.parts(pairs)["share"].mean(1)
    torch.testing.assert_close(joined["share"], shares)
    again = joined._join(joined._rows[: len(joined) // 16 * 16], 16)
    assert joined.layout.parts(again)["raw"].isfinite().all()


def test_means_for_tables_and_logs() -> None:
    goals, logger = run(3 * EVERY), Printed()
    lines = [line for line in repr(goals).splitlines() if "penalty" in line]
    assert len(lines) == 1 and "nan" not in lines[0]
    log_goals(goals, logger, 1)
    assert logger.values["goals/raw/penalty"] == pytest.approx((2 + 1 + 2) / 3)
    assert logger.values["goals/level/penalty"] == pytest.approx((2 * math.exp(-2) + math.exp(-1)) / 3)
    assert all(math.isfinite(value) for value in logger.values.values())
    goals({"recon": torch.rand(3), "kl": torch.rand(3)})
    log_goals(goals, logger, 2)
    assert "goals/raw/penalty" not in logger.values and logger.values["goals/share/penalty"] == 0
    assert "goals/raw/recon" in logger.values and logger.values["goals/rejected"] == 0
    with_none = GoalSet(a=Minimize(1.0), b=Minimize(1.0), optional=["b"])
    with_none({"a": torch.rand(2)})
    assert "b" in repr(with_none)


def test_an_absent_goal_is_in_no_finding() -> None:
    found = diagnose(run(640).history)
    assert not [f for f in found if "penalty" in f.goals], found
    assert sum(found.share.values()) == pytest.approx(1, abs=1e-3) and 0 < found.share["penalty"] < 2 / EVERY


def test_a_goal_is_starved_by_the_steps_that_had_it() -> None:
    """A goal that gets worse without a share of its own steps is found, one that has them is not."""

    def starving(share: float) -> list[str]:
        goals = GoalSet(a=Minimize(1.0), rare=Minimize(1.0), optional=["rare"])
        for step in range(800):
            there = step % 8 == 0
            rare = torch.tensor([0.2 + 2.8 * step / 800]) if there else None
            # The other goal is worse in all samples but some of the steps that have the rare one.
            worse = 5.0 if step % 64 or share == 0 else 0.0
            goals({"a": torch.tensor([worse]), "rare": rare})
        return [f.kind for f in diagnose(goals.history) if "rare" in f.goals]

    assert "starved" in starving(0.0)
    assert "starved" not in starving(1 / 8)


def test_a_step_without_a_finite_loss_is_not_the_fault_of_an_absent_goal() -> None:
    goals = run(64)
    goals({"recon": torch.tensor([math.nan]), "kl": torch.tensor([0.1])})
    named = {name for f in diagnose(goals.history) if f.kind == "not finite" for name in f.goals}
    assert named == {"recon"}


def test_the_report_shows_the_run(tmp_path: Path) -> None:
    history = run(320).history
    history.save(tmp_path / "history.pt")
    loaded = History.load(tmp_path / "history.pt")
    write_report(tmp_path / "report.html", loaded, diagnose(loaded))
    page = (tmp_path / "report.html").read_text()
    assert "penalty" in page and "nan" not in page.replace("finance", "").lower()
