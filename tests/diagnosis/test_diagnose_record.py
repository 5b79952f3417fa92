"""Test the diagnosis of unusual records and short runs, and the text that it prints."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest
import torch

from bomkern import (
    Anchored,
    Box,
    BoxAsymmetric,
    Calibrated,
    Finding,
    GoalSet,
    History,
    Lower,
    Minimize,
    MinimizeHard,
    Upper,
    cli,
    diagnose,
)
from bomkern.diagnosis.run_view import Column
from tests.support.histories import T, clean, flat, locked, only, slope, written

# Rows that are not steps, goals that are not columns, and values that are not finite.


def test_steps_without_a_finite_loss_name_the_goal() -> None:
    raw = {"a": slope(1.0, 0.5), "b": slope(0.9, 0.5, seed=1)}
    raw["b"][100:140] = torch.nan
    found = only(written(raw, {"a": 0.5, "b": 0.5}), "not finite")
    assert found.goals == ("b",) and (found.first, found.last) == (101, 140) and found.confidence > 0.9
    assert "40 of them" in found.evidence and "first at step 101" in found.evidence


def test_joined_rows_do_not_say_whose_fault_it_was() -> None:
    raw = {"a": slope(1.0, 0.5), "b": slope(0.9, 0.5, seed=1)}
    raw["b"][100:140] = torch.nan
    steps = written(raw, {"a": 0.5, "b": 0.5})
    history = History(steps.layout, stride=4)
    history.append(steps._rows)
    found = only(history, "not finite")
    assert found.goals == () and found.goal == "?" and (found.first, found.last) == (101, 140)


def test_lost_steps_do_not_hide_other_faults() -> None:
    steps = locked()
    rows = steps._rows.clone()
    rows[50:90] = torch.nan
    rows[50:90, steps.layout.at.finite] = 0
    found = diagnose(History.from_rows(steps.layout, rows))
    assert {f.kind for f in found.faults} == {"locked", "not finite"}


@pytest.mark.parametrize("rows", [0, 1, 19])
def test_a_short_history_is_not_judged(rows: int) -> None:
    diagnosis = diagnose(locked(max(rows, 1)) if rows else History(locked().layout))
    assert len(diagnosis) == 0 and f"{rows} rows" in diagnosis.note and "too little to judge" in str(diagnosis)
    assert diagnosis.to_dict()["findings"] == [] and "steps 1 to 0" not in str(diagnosis)


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_rows_may_stand_for_several_steps(stride: int) -> None:
    steps = written({"a": slope(2.0, 1.0, 800), "b": torch.cat([flat(0.3, 400), slope(0.3, 0.9, 400)])}, {"a": 1.0})
    history = History(steps.layout, first=1000, stride=stride)
    history.append(steps._rows)
    found = only(history, "starved")
    assert found.goals == ("b",) and 1200 <= found.first <= 1480 and found.last == 1800


def test_a_group_is_one_goal_and_its_worst_member_is_named() -> None:
    raw = {"a": slope(2.0, 1.0), "latent.spread": flat(0.3, T, 1), "latent.correlation": slope(0.2, 1.2, seed=2)}
    found = only(written(raw, {"a": 1.0}), "starved")
    assert found.goals == ("latent",) and "raw of latent.correlation 0.2" in found.evidence

    raw = {"b": flat(0.2), "latent.spread": flat(0.5, T, 1), "latent.correlation": flat(2.5, T, 2)}
    found = only(written(raw, {"latent": 1.0}), "locked")
    assert found.goals == ("latent",) and "give latent.correlation Anchored(2." in found.suggestion


def test_columns_know_which_way_is_worse() -> None:
    raw = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    for constraint in (
        Minimize(2.0, 0.5),
        MinimizeHard(2.0),
        Upper(0.5, 2.0),
        Lower(0.5, 2.0),
        Box(0.0, 1.0),
        BoxAsymmetric(-1, 0.5, 2),
    ):
        goals = GoalSet(a=constraint)
        center, right = goals.params[0, :2].tolist()
        away = Column("a", 0, goals.layout.constraints[0]).distance(raw, center, 1 / right if right else math.inf)
        score = goals({"a": raw.float()})["deficit"]
        assert len(away) == 4 and torch.isfinite(score).all()
        order = [goals.eval()({"a": x[None].float()})["deficit"].item() for x in raw]
        assert sorted(range(4), key=lambda i: max(away[i].item(), 0)) == sorted(
            range(4), key=lambda i: max(order[i], 0)
        )


def test_lost_steps_at_the_end_do_not_silence_the_rest() -> None:
    """Joined rows that hold only lost steps have neither raw values nor anchors."""
    steps = locked(800)
    steps._rows[760:] = torch.nan
    steps._rows[760:, steps.layout.at.finite] = 0
    history = History(steps.layout, stride=4)
    history.append(steps._rows)
    assert history["ideal"][-1].isnan().all()
    assert {f.kind for f in diagnose(history).faults} == {"locked", "not finite"}
    assert "give realism Anchored(1.4" in only(history, "locked").suggestion

    moving = {"realism": Anchored(0.5, 1.0, moving=True)}
    ideal = torch.linspace(0.5, 1.7, T)
    drifts = written(
        {"realism": ideal + 0.2, "b": flat(0.1)}, {"realism": 0.5, "b": 0.5}, {"realism": (ideal, 0.5)}, moving
    )
    for lost in (slice(2), slice(-2, None)):
        drifts._rows[lost] = torch.nan
        drifts._rows[lost, drifts.layout.at.finite] = 0
    assert "to (1.69, 2.19)" in only(drifts, "moving target").evidence


def test_half_a_run_without_values_has_a_pull_all_the_same() -> None:
    history = written({"a": slope(1.0, 0.5), "b": slope(9.0, 5.0, seed=1)}, {"a": 0.5, "b": 0.5})
    history._rows[T // 2 :] = torch.nan
    history._rows[T // 2 :, history.layout.at.finite] = 0
    assert diagnose(history).pull["b"] > 0.8


# Properties of every finding.


def test_no_alarm_where_nothing_is_wrong() -> None:
    alarms = [f for seed in range(30) for f in diagnose(clean(seed)).faults if f.confidence >= 0.5]
    assert len(alarms) <= 1, alarms
    assert "no bucket has a hole" in str(diagnose(clean(0)))


def test_findings_are_ranked_by_severity_with_causes_before_what_they_cause() -> None:
    raw = {"realism": flat(1.5), "recon": slope(0.4, 1.0, seed=1), "kl": slope(0.3, 0.8, seed=2), "c": flat(0.02, T, 3)}
    diagnosis = diagnose(written(raw, {"realism": 1.0}))
    assert [f.kind for f in diagnosis] == ["locked", "starved", "starved", "idle"]
    severities = [f.severity for f in diagnosis]
    assert severities == sorted(severities, reverse=True)
    assert diagnosis[0:2] == diagnosis.findings[:2] and len(diagnosis) == 4 and list(diagnosis) == [*diagnosis.findings]


def test_it_prints_as_a_table_and_goes_through_json() -> None:
    diagnosis = diagnose(locked())
    text = str(diagnosis)
    for finding in diagnosis:
        assert finding.evidence in text and finding.suggestion in text and finding.kind in text
    assert "the gradient went to realism 97%, recon 3%" in text and repr(diagnosis) == text
    back = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert back == diagnosis.to_dict()
    first = back["findings"][0]
    assert Finding(**{**first, "goals": tuple(first["goals"])}) == diagnosis[0]


def test_it_is_deterministic_and_leaves_the_history_alone() -> None:
    history = clean(3)
    before = history._rows.clone()
    state = torch.get_rng_state()
    assert diagnose(history).to_dict() == diagnose(history).to_dict()
    torch.testing.assert_close(history._rows, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_real_goal_set_can_be_diagnosed() -> None:
    goals = GoalSet(a=Anchored(0.0, 1.0), b=Anchored(0.0, 1.0), c=Lower(-5.0, 1.0))
    for step in range(60):
        x = torch.full((8,), 2.0)
        goals({"a": x, "b": x * 0.1, "c": x / (step + 1)})
    assert [f.goals for f in diagnose(goals.history) if f.kind == "locked"] == [("a",)]


@pytest.mark.parametrize(
    ("history", "payoff", "message"),
    [
        ("run", None, "history must be a History"),
        (None, [1, 2], "payoff must be"),
        (None, {"goals": ["a"], "table": [[1, 2]]}, "payoff: table must have 1 rows"),
        (None, {"goals": ["a"], "table": [["x"]]}, "payoff: table must hold numbers"),
    ],
)
def test_bad_arguments_are_named(history: object, payoff: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        diagnose(clean(0) if history is None else history, payoff=payoff)  # type: ignore[arg-type]


def test_nothing_in_a_record_makes_it_fail() -> None:
    """A record with arbitrary numbers and constraints raises no exception, and confidences stay within bounds."""
    draw, dice = torch.Generator().manual_seed(0), random.Random(0)
    choice = [
        Minimize(0.1),
        MinimizeHard(2.0),
        Upper(0, 1),
        Lower(0, 1),
        Box(-1, 1),
        BoxAsymmetric(-1, 0, 2),
        Calibrated(),
        Anchored(0.0, 1.0, moving=True),
    ]
    for _ in range(60):
        rows = dice.choice([20, 21, 37, 150])
        names = dice.sample(["kl", "a.x", "a.y", "capacity", "b", "active"], dice.randint(1, 6))
        given = {name: dice.choice(choice) for name in names}
        history = written({name: torch.randn(rows, generator=draw) for name in names}, {}, constraints=given)
        values = history._rows
        values[:] = torch.randn(values.shape, generator=draw) * 10 ** dice.uniform(-6, 6)
        for bad in (torch.nan, torch.inf, -torch.inf, 0.0):
            values[torch.rand(values.shape, generator=draw) < dice.choice([0, 0.02, 0.5, 1.0])] = bad
        finite = (torch.rand(rows, generator=draw) > 0.1).float() * dice.choice([0.0, 0.5, 1.0])
        values[:, history.layout.at.finite] = finite
        diagnosis = diagnose(history)
        assert all(0 <= f.confidence <= 0.95 and 0 <= f.severity <= 1 for f in diagnosis)
        json.dumps(diagnosis.to_dict()), str(diagnosis)


def test_the_largest_history_takes_seconds() -> None:
    names = [f"g{i}" for i in range(64)]
    history = written({n: flat(0.5, 4000, i) for i, n in enumerate(names)}, {n: 1 / 64 for n in names})
    begun = time.process_time()
    diagnose(history)
    assert time.process_time() - begun < 10


# The bench and the command.


def test_planted_faults_are_found() -> None:
    from bench.faults import command

    cases = [command.run((fault, 77)) for fault in ("floor", "conflict", "adversary", "clean")]
    figures = command.judge(cases)
    assert figures["recall"] == 1 and figures["clean runs with an alarm"] == 0
    assert "floor" in command.show(figures) and json.dumps(command._plain(figures), allow_nan=False)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked().save(tmp_path / "history.pt")
    assert cli.main(["diagnose", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "locked" in out and "report.html" in out and (tmp_path / "report.html").is_file()
    (tmp_path / "report.html").unlink()
    assert cli.main(["diagnose", str(tmp_path), "--json", "--no-report"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["kind"] == "locked" and not (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_does_not_hide_the_diagnosis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked().save(tmp_path / "history.pt")
    (tmp_path / "report.html").mkdir()
    assert cli.main(["diagnose", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "give realism Anchored(" in printed.out and "report:" not in printed.out
    assert "error: no report: " in printed.err and printed.err.count("\n") == 1


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert cli.main(["diagnose", str(tmp_path)]) == 1 and "holds no history.pt" in said()
    (tmp_path / "history.pt").write_bytes(b"not a history")
    assert cli.main(["diagnose", str(tmp_path)]) == 1 and "is not a history of bomkern" in said()
    locked().save(tmp_path / "history.pt")
    (tmp_path / "payoff.json").write_text("{")
    assert cli.main(["diagnose", str(tmp_path)]) == 1 and "is not JSON" in said()
    (tmp_path / "payoff.json").write_text('{"goals": ["a"], "table": []}')
    assert cli.main(["diagnose", str(tmp_path)]) == 1 and "payoff: table" in said()
    for bad in ([], [str(tmp_path / "none")], [str(tmp_path), "--yaml"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["diagnose", *bad])
        assert stop.value.code == 2 and "error" in said()
