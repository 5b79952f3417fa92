"""Test `python -m bench.advice`: advice is followed as its text says, and its effect is counted in units of noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchjd")

from bench.advice import command, report, trials
from bench.policies.faults import FAULTS
from bench.policies.problems import PROBLEMS
from bomkern import Anchored, Box, diagnose
from tests.support.histories import flat, locked, written

GOALS: dict[str, Any] = {"realism": Anchored(0.0, 1.0), "recon": Anchored(0.0, 1.0), "kl": Anchored(0.0, 1.0)}


def test_a_diagnosis_is_followed_as_its_text_says() -> None:
    said = diagnose(locked()).faults[0].suggestion
    assert trials.follow(said, GOALS, {"spill": 0.5}) == (GOALS, {"spill": "auto"})
    far = {"a": flat(50.0), "b": flat(0.1, seed=1)}
    said = diagnose(written(far, {"a": 1.0})).faults[0].suggestion
    changed = trials.follow(said, {"a": GOALS["kl"], "b": GOALS["kl"]}, {})
    assert changed is not None and changed[0]["b"] is GOALS["kl"] and changed[1] == {}
    assert changed[0]["a"].known["nadir"] > 40


def test_what_a_goalset_cannot_do_is_not_followed() -> None:
    for said in (
        "lower the learning rate, or clip the gradient's norm",
        "if it cannot get better, give realism Anchored(0.5, 1)",
        "none needed; a lower nadir would ask more of it",
    ):
        assert trials.follow(said, GOALS, {}) is None
    changed = trials.follow("give kl Box(-1, 1.9)", GOALS, {"spill": 0.5})
    assert changed is not None and isinstance(changed[0]["kl"], Box) and changed[1] == {"spill": 0.5}


def test_moving_anchors_follow_the_planted_drift() -> None:
    problem = PROBLEMS["tasks3"](0, FAULTS["drift"], 100)
    goals = {name: Anchored(*pair, moving=name == "ink") for name, pair in problem.anchors.items()}
    arm = trials.Measured(lambda _: goals)
    arm.start(problem)
    for _ in range(100):
        arm.backward(problem, problem.raw())
        problem.update()
        arm.after(problem)
    assert arm.goals is not None
    ideal, scale = arm.goals.anchors()["ink"]
    assert ideal > 0.2 and scale == pytest.approx(1.0, abs=1e-4)  # on its way to the lift of 1.5 scales
    assert arm.goals.anchors()["class"][0] == 0


def trial(seed: int, before: tuple[float, float], after: tuple[float, float] | None = None, **more: Any) -> Any:
    made = {"data": "tasks3", "fault": "none", "rule": "minimum", "seed": seed, **more}
    made["before"] = dict(zip(("main", "worst"), before, strict=True))
    if after is not None:
        made |= {"advice": "x", "kind": "locked", "after": dict(zip(("main", "worst"), after, strict=True))}
    return made


def test_a_gain_counts_in_noises_of_both_figures(tmp_path: Path) -> None:
    same = [trial(0, (0.8, 0.3)), trial(1, (0.9, 0.5))]  # deviations 0.0707 and 0.1414
    other = trial(2, (0.8, 0.4), (0.9, 0.2), fault="drift")
    noises = report.noise([*same, other])
    assert noises["tasks3", "main"] == pytest.approx(0.0707, rel=1e-3)
    assert report.gain(other, noises) == pytest.approx(0.1 / 0.0707 + 0.2 / 0.1414, rel=1e-3)
    error = {**other, "data": "poisson"}  # of its measure less is better
    assert report.gain(error, {("poisson", "main"): 0.1, ("poisson", "worst"): 0.1}) == pytest.approx(-1 + 2)
    worse = trial(3, (0.8, 0.3), (0.7, 0.3), fault="drift")
    level = trial(4, (0.8, 0.3), (0.8, 0.3), fault="drift")
    found = report.score([*same, other, worse, level], report.noise([*same, other, worse, level]))
    assert found == {"runs": 5, "advised": 3, "followed": 3, "better": 1, "worse": 1}
    page = report.write([*same, other, worse, level], tmp_path / "advice")
    assert "33% ended better (asked for: 80%), 33% worse" in page and "| 3 tasks | 5 | 3 | 3 | 1 | 1 |" in page
    assert (tmp_path / "advice.md").read_text() == page


def test_trials_are_all_problems_faults_and_rules_and_continue(tmp_path: Path, capsys: Any) -> None:
    jobs = list(command.jobs(["tasks3", "photographs"], (1,), None))
    assert {job.rule for job in jobs if job.data == "tasks3"} == set(trials.RULES)
    assert len(jobs) == 3 * 3 + 5
    path = tmp_path / "trials.jsonl"
    path.write_text("\n".join(json.dumps(trial(1, (0.8, 0.3)) | job._asdict()) for job in jobs) + "\n")
    few = ["--data", "tasks3", "photographs", "--seeds", "1", "--trials", str(path), "--workers", "1"]
    assert command.main(few) == 0 and len(path.read_text().splitlines()) == len(jobs)  # nothing is left to run
    assert f"Of {len(jobs)} runs 0 had a finding" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--steps", "10"])


@pytest.mark.slow
def test_a_trial_follows_its_first_advice() -> None:
    torch.set_num_threads(1)
    done = trials.run(trials.Job("tasks3", "floor", "minimum", 0))
    assert done["kind"] == "locked" and 'spill="auto"' in done["advice"]
    assert done["after"]["worst"] < done["before"]["worst"] - 0.3
    assert "after" not in trials.run(trials.Job("tasks3", "none", "spill auto", 0), steps=60)
