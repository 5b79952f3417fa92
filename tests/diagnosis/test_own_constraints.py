"""Test constraints and policies that the diagnosis does not know: a user's own, and those of older files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Box,
    BoxAsymmetric,
    Calibrated,
    Constraint,
    Fixed,
    GoalSet,
    Group,
    History,
    Lower,
    Minimize,
    MinimizeHard,
    Policy,
    Tracking,
    Upper,
    diagnose,
)
from bomkern.constraints import BARRIER, HARD, LINEAR
from bomkern.diagnosis.run_view import Column, columns_of
from bomkern.goals.constraint_info import ConstraintInfo, describe, from_text
from bomkern.goals.record import Layout
from bomkern.integrations import log_goals
from bomkern.report import write_report
from tests.support.histories import T, flat, only, slope, written


class Maximize(Constraint):
    """A constraint with deficit 0 at ``ideal`` and 1 at ``ideal - scale``, unbounded on both sides."""

    curve = LINEAR
    __slots__ = ()

    def __init__(self, scale: float, ideal: float = 0.0) -> None:
        self._freeze((ideal, -1 / scale, -1 / scale, 0.0), scale=scale, ideal=ideal)


class Target(Constraint):
    """A constraint whose deficit grows on both sides of ``value``, twice as fast below it."""

    curve = LINEAR
    __slots__ = ()

    def __init__(self, value: float) -> None:
        self._freeze((value, 1.0, -2.0, 0.0), value=value)


class Ceiling(Constraint):
    """A barrier constraint with a wall on one side."""

    curve = BARRIER
    __slots__ = ()

    def __init__(self, wall: float) -> None:
        self._freeze((0.0, 1 / wall, 0.0, 0.05), wall=wall)


class Halfway(Policy):
    """A policy whose scale is half of the largest value of the first steps."""

    until = 5

    def __init__(self) -> None:
        super().__init__(Minimize(1.0))

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        state[0] = torch.maximum(state[0], raw.amax() / 2)
        return torch.zeros_like(state[0]), state[0].clamp(min=1e-6)


class Silent(Policy):
    """A policy with the attributes that a GoalSet needs, which never calls the base constructor."""

    def __init__(self) -> None:
        self.constraint, self.waits = Lower(1.0, 0.5), {}


def column(constraint: Constraint | Policy) -> Column:
    policy = constraint if isinstance(constraint, Policy) else Fixed(constraint)
    return Column("a", 0, describe(policy))


def trained() -> GoalSet:
    """Return a trained GoalSet of all classes above.

    "up" falls although it has the gradient. The other goals are satisfied.
    """
    goals = GoalSet(
        up=Maximize(1.0, 2.0), target=Target(0.5), wall=Ceiling(2.0), half=Halfway(), group=Group(x=Silent())
    )
    for step in range(60):
        low = torch.full((4,), 0.1)
        raw = {"up": 1 - 2 * torch.full((4,), step / 60), "target": low + 0.4, "wall": low, "half": low * (step < 5)}
        goals({**raw, "group": {"x": low + 3}})
    return goals


def test_own_classes_work_from_training_to_report(tmp_path: Path) -> None:
    goals = trained()
    printed = str(goals)
    for text in ("Maximize(scale=1, ideal=2)", "Target(value=0.5)", "Ceiling(wall=2)", "Halfway()", "Silent()"):
        assert text in printed
    logged: dict[str, float] = {}
    log_goals(goals, type("Log", (), {"log": lambda self, values, step: logged.update(values)})(), 1)
    assert logged["goals/share/up"] > 0.9 and "goals/raw/group.x" in logged

    goals.history.save(tmp_path / "history.pt")
    history = History.load(tmp_path / "history.pt")
    assert history.layout.constraints == goals.layout.constraints
    diagnosis = diagnose(history)
    assert diagnosis.to_dict() == diagnose(goals.history).to_dict()
    worst = only(history, "moving target")
    assert worst.goals == ("up",) and worst.suggestion.startswith("give up Anchored(0.9")
    told = {f.goals[0]: f.suggestion for f in diagnosis if f.kind == "idle"}
    assert "a higher limit" in told["group"] and "a lower limit" in told["wall"]

    write_report(tmp_path / "report.html", history, diagnosis)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Maximize(scale=1, ideal=2)" in page and "ideal 2, nadir 1" in page and "limit 1" in page


@pytest.mark.parametrize(
    "constraint",
    [Maximize(2.0, 0.5), Anchored(1.0, 0.2), Target(0.5), Ceiling(2.0), Silent(), Upper(0.5, 2.0), Lower(0.5, 2.0)],
)
def test_distance_grows_with_the_deficit(constraint: Constraint | Policy) -> None:
    goals = GoalSet(a=constraint).eval()
    raw = torch.linspace(-3, 3, 25)
    center, right = goals.params[0, :2].double().tolist()
    away = column(constraint).distance(raw.double(), center, 1 / right if right else torch.inf)
    deficit = torch.stack([goals({"a": x[None]})["deficit"][0] for x in raw]).double()
    rising = away.argsort()
    assert (deficit[rising].diff() >= -1e-6).all()
    if goals.curves == [LINEAR]:
        assert away[deficit > 0].tolist() == pytest.approx(deficit[deficit > 0].tolist())


def test_columns_know_what_a_constraint_means() -> None:
    for constraint, direction, has_limit, box, anchorable in (
        (Minimize(2.0), 1, False, None, True),
        (MinimizeHard(2.0), 0, False, None, True),
        (Upper(1.0, 2.0), 1, True, None, False),
        (Lower(1.0, 2.0), -1, True, None, False),
        (Box(0.0, 0.4), 0, False, (0.0, 0.4), False),
        (BoxAsymmetric(-1.0, 0.0, 2.0), 0, False, (-1.0, 2.0), False),
        (Maximize(2.0), -1, False, None, True),
        (Target(1.0), 0, False, None, False),
        (Ceiling(2.0), 1, True, None, False),
        (Silent(), -1, True, None, False),
        (Halfway(), 1, False, None, True),
        (Anchored("floor", 2.0), 1, False, None, True),
        (Anchored(1.0, 0.0), -1, False, None, True),
        (Anchored(1.0, "baseline", maximize=True), -1, False, None, True),
    ):
        found = column(constraint)
        assert (found.direction, found.has_limit, found.anchorable) == (direction, has_limit, anchorable), constraint
        assert found.box == (None if box is None else pytest.approx(box)), constraint
    assert column(Upper(1.0, 2.0)).margin == column(Lower(1.0, 2.0)).margin == 2
    for policy, named, calibrated, moving in (
        (Anchored(0.0, 1.0), True, False, False),
        (Anchored(0.0, 1.0, moving=True), True, False, True),
        (Calibrated(), False, True, False),
        (Halfway(), False, True, False),
        (Tracking(), False, False, False),
    ):
        assert (column(policy).named, column(policy).calibrated, column(policy).moving) == (named, calibrated, moving)


def test_a_policy_of_the_users_own_that_calibrates_is_outgrown() -> None:
    raw = {"realism": torch.cat([flat(0.3, 60), slope(0.3, 2.0, 100), flat(2.0, 240)]), "b": flat(0.4, T, 1)}
    history = written(raw, {"realism": 1.0}, {"realism": (0.0, 0.5)}, {"realism": Halfway()})
    assert "outgrown" in only(history, "miscalibrated").evidence


# Missing attributes of a class.


def lacking(**parts: Any) -> Policy:
    return type("Mine", (Policy,), parts)()


def own_constraint(**parts: Any) -> Policy:
    return Fixed(type("Mine", (Constraint,), {"__slots__": (), **parts})())


def frozen(*ramp: float) -> Any:
    return lambda self: self._freeze(ramp)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lacking(__init__=lambda self: None), r"Mine has no constraint: call Policy.__init__\(constraint\)"),
        (lambda: lacking(__init__=lambda self: setattr(self, "constraint", Minimize(1.0))), "Mine has no waits"),
        (
            lambda: lacking(
                __init__=lambda self: Policy.__init__(self, Minimize(1.0)), update=lambda self, raw, state, step: None
            ),
            "Mine has an update but no until",
        ),
        (lambda: lacking(__init__=lambda self: Policy.__init__(self, 3.0)), "must be a constraint, got float"),
        (lambda: own_constraint(__init__=frozen(0, 1, 1, 0)), "Mine has no curve"),
        (lambda: own_constraint(curve=LINEAR), "Mine has no ramp"),
        (lambda: own_constraint(curve=LINEAR, __init__=frozen(0, 1)), "Mine has no ramp"),
        (lambda: own_constraint(curve=HARD, __init__=frozen(0, float("inf"), 1, 0)), "Mine has no ramp"),
        (lambda: own_constraint(curve=BARRIER, __init__=frozen(0, 1, -1, 0)), "Mine has no tail"),
    ],
)
def test_what_a_class_lacks_is_said(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        GoalSet(a=make())


def test_a_policy_may_have_nothing_to_learn() -> None:
    """A policy may choose ``until`` = 0."""

    class Warmup(Halfway):
        def __init__(self, steps: int) -> None:
            super().__init__()
            self.until = steps

    assert describe(Warmup(0)).anchors == "fixed" and describe(Warmup(3)).anchors == "calibrated"


# Files.


def test_a_file_holds_plain_values(tmp_path: Path) -> None:
    goals = trained()
    goals.history.save(tmp_path / "history.pt")
    state = torch.load(tmp_path / "history.pt", weights_only=True)
    # The 0.1.0 reader passes the layout's keys as arguments, so the keys must stay the same.
    assert set(state["layout"]) == {"goals", "columns", "owner", "constraints", "most"}
    assert state["layout"]["constraints"] == [str(c) for c in goals.layout.constraints]
    assert state["constraints"][0] == {
        "kind": "Maximize",
        "curve": LINEAR,
        "ramp": [2.0, -1.0, -1.0, 0.0],
        "arguments": {"scale": 1.0, "ideal": 2.0},
        "anchors": "fixed",
        "moving": False,
        "text": "Maximize(scale=1, ideal=2)",
    }
    for key, wrong in (("curve", 7), ("ramp", [1.0]), ("ramp", "a"), ("anchors", "sunk"), ("arguments", None)):
        torch.save({**state, "constraints": [{**state["constraints"][0], key: wrong}] * 5}, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=r"wrong\.pt is not a history of bomkern"):
            History.load(tmp_path / "wrong.pt")


SIX = [
    Minimize(2.0, 0.5),
    MinimizeHard(2.0),
    Upper(1e-7, 2.0),
    Lower(-3.0, 0.5),
    Box(0.0, 0.4),
    BoxAsymmetric(-1, 0, 2),
]
OF_POLICIES = [
    Anchored(0.2, 1.5, moving=True),
    Anchored(1.0, 0.0),
    Anchored("floor", 2.0),
    Calibrated(9, 0.9, 2.0),
    Tracking(50.0),
]


@pytest.mark.parametrize("given", [*map(Fixed, SIX), *OF_POLICIES], ids=repr)
def test_an_old_text_says_what_the_object_does(given: Policy) -> None:
    old, new = from_text(repr(given)), describe(given)
    assert (old.kind, old.curve, old.anchors, old.moving, old.text) == new[:2] + new[4:]
    assert old.arguments == {name: pytest.approx(value) for name, value in new.arguments.items()}
    if isinstance(given, Fixed):  # for a policy, the record holds the ramp
        assert old.ramp == pytest.approx(new.ramp)


def old_file(path: Path, history: History, constraints: list[str]) -> None:
    """Write a file as commit 496d172 did, with each constraint as its printed form only."""
    layout = history.layout
    old = {"most": layout.most, "goals": layout.goals, "columns": layout.columns, "owner": layout.owner}
    torch.save({"layout": {**old, "constraints": constraints}, **history.state_dict()}, path)


def test_an_old_file_is_diagnosed_as_a_new_one(tmp_path: Path) -> None:
    raw = {"a": flat(-1.0), "b": flat(0.1, T, 1), "box.x": flat(0.9, T, 2), "c": flat(0.1, T, 3)}
    given = {"a": Lower(1.0, 1.0), "b": Upper(1.0, 1.0), "box.x": Box(0.0, 0.4), "c": Anchored(0.0, 1.0, moving=True)}
    history = written(raw, {"a": 0.9, "box": 0.1}, {"a": (1.0, torch.inf), "box.x": (0.2, 0.2)}, given)
    texts = [
        "Lower(limit=1, margin=1)",
        "Upper(limit=1, margin=1)",
        "Box(lower=0, upper=0.4, tail=0.05)",
        "Anchored(ideal=0, nadir=1, moving=True)",
    ]
    old_file(tmp_path / "old.pt", history, texts)
    old = History.load(tmp_path / "old.pt")
    assert [str(c) for c in old.layout.constraints] == texts
    assert diagnose(old).to_dict() == diagnose(history).to_dict()
    assert {f.kind for f in diagnose(old)} >= {"infeasible box", "idle"}
    write_report(tmp_path / "report.html", old, diagnose(old))
    assert texts[3] in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_old_text_of_an_unknown_class_is_said_to_be_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = written({"a": flat(1.5), "b": flat(0.1, T, 1)}, {"a": 1.0})
    old_file(tmp_path / "old.pt", history, ["Mine(sharpness=3)", "Minimize(scale=1, ideal=0)"])
    with caplog.at_level(logging.WARNING, logger="bomkern"):
        old = History.load(tmp_path / "old.pt")
    assert len(caplog.messages) == 1 and "'Mine(sharpness=3)'" in caplog.messages[0]
    assert old.layout.constraints[0].kind == "Mine" and old.layout.constraints[0].arguments == {"sharpness": 3.0}
    assert only(old, "locked").goals == ("a",)


def test_a_layout_takes_texts_too() -> None:
    layout = Layout(["a"], ["a"], [0], ["Box(lower=0, upper=1, tail=0.05)"])
    assert isinstance(layout.constraints[0], ConstraintInfo) and columns_of(layout)[0].box == pytest.approx((0, 1))
