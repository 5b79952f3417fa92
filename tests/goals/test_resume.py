"""Test that a `GoalSet` loads its state by the names of its goals, whatever the code has changed since."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Box,
    Calibrated,
    GoalSet,
    Group,
    Lower,
    Minimize,
    MinimizeHard,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
)
from bomkern.goals.saved import unpack_history

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "spill": {"spill": 0.5},
    "guard": {"guard": ShareGuard(0.1, 0.3)},
    "smooth": {"temperature": 0.2},
}
EACH = pytest.mark.parametrize("how", RULES.values(), ids=RULES)
NAMES = ["max", "tracking", "moving", "hard", "both.a", "both.b"]


def kinds() -> dict[str, Any]:
    return {
        "max": Calibrated(20),
        "tracking": Tracking(3.0),
        "moving": Anchored("floor", 1.0, moving=True),
        "hard": MinimizeHard(0.5),
        "both": Group(a=Minimize(1.0), b=Upper(1.0, 0.5)),
    }


def raw_of(goals: GoalSet, seed: int) -> dict[str, Any]:
    """Return raw values that differ for every column and seed, and not for the order of the goals."""
    values = torch.rand(len(NAMES), 5, generator=torch.Generator().manual_seed(seed)) * 2
    flat = dict(zip(NAMES, values, strict=True))
    raw: dict[str, Any] = {}
    for name in goals.policies:
        goal, _, member = name.partition(".")
        value = flat[name] if name in flat else values[0] * 0.7
        if member:
            raw.setdefault(goal, {})[member] = value
        else:
            raw[goal] = value
    return raw


def train(goals: GoalSet, first: int, last: int) -> GoalSet:
    for seed in range(first, last):
        goals(raw_of(goals, seed))
    return goals


def trained(steps: int = 9, order: Callable[[list[str]], list[str]] = list, **how: Any) -> GoalSet:
    goals = GoalSet({name: kinds()[name] for name in order(list(kinds()))}, **how)
    goals.anchor(floor={"moving": 0.25})
    train(goals, 0, steps)
    goals.remeasure({"moving": (0.5, 2.0)})
    return goals


def by_name(goals: GoalSet) -> dict[str, Any]:
    """Return every number of the state by goal or column."""
    found: dict[str, Any] = {}
    for name, x in goals.named_buffers(recurse=False):
        if not name.startswith("_") and x.dim():
            labels = (
                goals.names if len(x) == len(goals.names) and name not in ("params", "start", "policy_state") else None
            )
            labels = list(goals.policies) if name in ("params", "start", "policy_state", "log_nudge") else goals.names
            found |= {f"{name} {label}": row.tolist() for label, row in zip(labels, x, strict=True)}
    history = goals.history
    for part in ("share", "level", "deficit"):
        found |= {f"{part} {name}": history[part][:, k].tolist() for k, name in enumerate(goals.names)}
    for part in ("raw", "highest", "ideal", "scale"):
        found |= {f"{part} {name}": history[part][:, k].tolist() for k, name in enumerate(goals.policies)}
    return {**found, "loss": history["loss"].tolist(), "steps": goals.steps, "waiting": goals.anchoring.waiting}


def old_state(goals: GoalSet) -> dict[str, Any]:
    """Return the state as bomkern wrote it while its extra states were dicts without names."""
    state = dict(goals.state_dict())
    history = unpack_history(state["monitor._extra_state"])
    old = {name: history[name] for name in ("steps", "first", "stride", "rows", "open", "fresh")}
    waiting = goals.anchoring.waiting
    given = {column: dict(goals.anchoring._known[column]) for column in waiting}
    return {**state, "monitor._extra_state": old, "_extra_state": {"waits": list(waiting), "given": given}}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return a function that returns the warnings since its last call."""

    def read() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return found

    yield read


Lines = Callable[[], list[str]]


# The same goals.


@EACH
@pytest.mark.parametrize("strict", [True, False])
def test_the_order_of_the_goals_does_not_matter(how: dict[str, Any], strict: bool, lines: Lines) -> None:
    one = trained(**how)
    two = GoalSet(dict(reversed(kinds().items())), **how)
    two.load_state_dict(one.state_dict(), strict=strict)
    assert by_name(two) == by_name(one) and not lines()
    for goals in (one, two):
        train(goals, 9, 30)
    for (name, a), b in zip(by_name(one).items(), by_name(two).values(), strict=False):
        assert torch.allclose(torch.tensor(a), torch.tensor(by_name(two)[name]), rtol=1e-4, equal_nan=True), (name, b)


@EACH
def test_a_state_survives_every_way_to_carry_it(how: dict[str, Any], lines: Lines) -> None:
    goals = trained(**how)
    state = goals.state_dict()
    assert all(type(x) is Tensor for x in state.values())
    carried = {name: x.double() if x.is_floating_point() else x.half() for name, x in state.items()}
    for given in (state, copy.deepcopy(state), carried, dict(reversed(state.items()))):
        again = GoalSet(kinds(), **how)
        again.load_state_dict(given)
        assert by_name(again) == by_name(goals)
    assert not lines()


def test_what_is_no_state_is_refused_by_name() -> None:
    goals = GoalSet(a=Minimize(1.0))
    state = goals.state_dict() | {"_extra_state": torch.zeros(12, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match=r"the tensor, \[12\] torch.uint8, is not the state of a GoalSet"):
        goals.load_state_dict(state)


def test_a_function_is_the_same_in_another_process(lines: Lines) -> None:
    class Floor:
        def __call__(self, batch: Any) -> float:
            return 0.25

    one, two = (GoalSet(a=Anchored(Floor(), 1.0), b=Anchored(functools.partial(max, 2), 9.0)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    assert not lines()


# A constraint was edited.


EDITS = {
    "nadir": (Anchored(0.0, 1.0), Anchored(0.0, 2.0), (0.0, 2.0)),
    "policy": (Minimize(1.0), Anchored(0.5, 1.0), (0.5, 0.5)),
    "curve": (MinimizeHard(0.5), Box(0.0, 1.0), (0.5, 0.5)),
    "side": (Upper(1.0, 0.5), Lower(1.0, 0.25), (1.0, 0.25)),
    "argument": (Tracking(3.0), Tracking(4.0), (0.0, 1.0)),
}


@pytest.mark.parametrize(
    ("edit", "old"),
    # The first parameters are all that an older state tells, and another argument may not change them.
    [(edit, old) for edit in EDITS for old in (False, True) if not (old and edit == "argument")],
)
def test_an_edited_constraint_holds_and_is_reported_in_one_line(edit: str, old: bool, lines: Lines) -> None:
    before, after, (ideal, scale) = EDITS[edit]
    one, two = (GoalSet(x=x, y=Tracking(5.0), guard=ShareGuard(0.1, 0.3)) for x in (before, after))
    for seed in range(5):
        one({"x": torch.rand(4) + seed, "y": torch.rand(4)})
    was = one.anchors()["y"]
    two.load_state_dict(old_state(one) if old else one.state_dict())
    (line,) = lines()
    assert f"for x, and the code has {after!r}: the code's holds" in line
    assert old or f"the checkpoint has {before!r}" in line
    assert two.anchors()["x"] == pytest.approx((ideal, scale)) and two.anchors()["y"] == was
    assert two.log_nudge[0] == 0 and not two.policy_state[0].any() and torch.equal(two.params[0], two.start[0])
    assert two.steps == 5 and torch.equal(two.history["raw"], one.history["raw"])
    assert repr(after) in str(two) or edit == "curve"


def test_the_checkpoint_holds_if_asked_to(lines: Lines) -> None:
    one = GoalSet(x=Anchored(0.0, 1.0), y=MinimizeHard(1.0), z=Calibrated(3))
    for seed in range(5):
        one({"x": torch.rand(4) + seed, "y": torch.rand(4), "z": torch.rand(4)})
    two = GoalSet(x=Anchored(0.0, 4.0), y=Upper(1.0, 0.5), z=Calibrated(9), resume="checkpoint")
    two.load_state_dict(one.state_dict())
    said = lines()
    assert len(said) == 3 and "Anchored(ideal=0, nadir=1) for x" in said[0] and "the checkpoint's holds" in said[0]
    assert "MinimizeHard(scale=1) for y" in said[1] and "the code's holds, because their curves differ" in said[1]
    assert two.anchors()["x"] == (0.0, 1.0) and two.anchors()["z"] == one.anchors()["z"]
    table = str(two)
    assert "Anchored(ideal=0, nadir=1)" in table and "nadir=4" not in table
    assert str(two.history.layout.constraints[0]) == "Anchored(ideal=0, nadir=1)"


def test_a_policy_that_was_edited_calibrates_on_its_own_first_steps(lines: Lines) -> None:
    one, two = GoalSet(x=Minimize(1.0), y=Calibrated(3)), GoalSet(x=Calibrated(4), y=Calibrated(3))
    for _ in range(10):
        one({"x": torch.ones(2), "y": torch.ones(2)})
    two.load_state_dict(one.state_dict())
    assert len(lines()) == 1
    for k in range(10):
        if k == 2:  # in the middle of the calibration
            state, two = two.state_dict(), GoalSet(x=Calibrated(4), y=Calibrated(3))
            two.load_state_dict(state)
        two({"x": torch.full((2,), k + 2.0), "y": torch.full((2,), 50.0)})
    assert two.anchors()["x"] == pytest.approx((0.0, 5.0)) and two.anchors()["y"] == (0.0, 1.0) and not lines()


def test_unchanged_anchors_go_on_from_where_they_have_moved(lines: Lines) -> None:
    one = trained()
    assert one.anchors()["moving"] != (0.25, 0.75)
    two = GoalSet(kinds())
    two.load_state_dict(one.state_dict())
    assert two.anchors() == one.anchors() and two.drift() == one.drift() and not two.anchoring.waiting
    assert one.drift()["moving"] > 0 and not [line for line in lines() if "checkpoint" in line]


def test_an_edited_temperature_holds_and_an_annealed_one_goes_on(lines: Lines) -> None:
    one = GoalSet({"x": Minimize(1.0)}, temperature=0.5)
    one.temperature.fill_(0.25)
    same, other, spilled = (
        GoalSet({"x": Minimize(1.0)}, **how) for how in ({"temperature": 0.5}, {"temperature": 0.125}, {"spill": 0.5})
    )
    same.load_state_dict(one.state_dict())
    assert same.temperature == 0.25 and not lines()
    other.load_state_dict(one.state_dict())
    assert other.temperature == 0.125 and "temperature 0.25, and the code has 0.125" in lines()[0]
    spilled.load_state_dict(old_state(one))
    assert spilled.temperature == 0 and "temperature 0.25, and the code has 0" in lines()[0]


# Goals were added, dropped and renamed.


@EACH
@pytest.mark.parametrize("strict", [True, False])
def test_new_goals_start_fresh_and_lost_ones_are_named(how: dict[str, Any], strict: bool, lines: Lines) -> None:
    one = trained(**how)
    changed = {"new": Minimize(0.7), **{n: g for n, g in kinds().items() if n != "hard"}, "last": Calibrated(2)}
    changed["both"] = Group(b=Upper(1.0, 0.5), c=Minimize(3.0))
    two = GoalSet(changed, **how)
    two.load_state_dict(one.state_dict(), strict=strict)
    (line,) = lines()
    assert "it does not hold new, both.c, last, which start fresh; it holds hard, both.a" in line
    before, after = by_name(one), by_name(two)
    for name, value in after.items():
        part, _, goal = name.partition(" ")
        if goal in ("new", "last", "both.c"):
            if part in ("share", "level", "deficit", "raw", "highest", "ideal", "scale"):
                assert len(value) == 9 and all(x != x for x in value), name
        elif part != "multipliers":
            assert value == before[name], name
    assert two.anchors()["new"] == pytest.approx((0.0, 0.7)) and two.anchors()["last"] == (0.0, 1.0)
    known = [float(one.average[one.names.index(name)]) for name in ("max", "tracking", "moving", "both")]
    assert two.average[[0, 5]].tolist() == pytest.approx([sum(known) / 4] * 2)
    assert two.multipliers.sum() == pytest.approx(1.0)
    if two.spill:
        ranked = sorted(range(6), key=lambda g: (-float(two.average[g]), g))
        assert [float(two.multipliers[g]) for g in ranked] == pytest.approx([2.0**-k / (2 - 2.0**-5) for k in range(6)])
    train(two, 9, 14)
    assert two.steps == 14 and two.history["raw"][-5:].isfinite().all()
    state, three = two.state_dict(), GoalSet(changed, **how)
    three.load_state_dict(state)
    assert not lines() and torch.equal(three.params, two.params)


def test_renamed_goals_do_not_pass_in_silence(lines: Lines) -> None:
    def make(name: str, **how: Any) -> GoalSet:
        return GoalSet({name: Calibrated(3), "group": Group(x=Minimize(1.0))}, **how)

    one = make("old")
    for _ in range(4):
        one({"old": torch.full((2,), 4.0), "group": {"x": torch.ones(2)}})
    plain = make("new")
    plain.load_state_dict(one.state_dict())
    (line,) = lines()
    assert "does not hold new" in line and "holds old" in line and "GoalSet(renamed={'new': 'old'})" in line
    assert plain.anchors()["new"] == (0.0, 1.0)
    told = make("new", renamed={"new": "old"})
    told.load_state_dict(one.state_dict())
    assert not lines() and told.anchors()["new"] == (0.0, 4.0) and told.history["raw"][:, 0].tolist() == [4.0] * 4
    group = GoalSet({"old": Calibrated(3), "set": Group(x=Minimize(1.0))}, renamed={"set": "group"})
    group.load_state_dict(one.state_dict())
    assert not lines() and group.history["raw"].isfinite().all()
    with pytest.raises(ValueError, match=r"renamed must map names of goals \(new, group\) to those.*got 'other'"):
        make("new", renamed={"other": "old"})
    with pytest.raises(ValueError, match="resume must be one of 'code', 'checkpoint', got 'mine'"):
        make("new", resume="mine")


def test_another_spill_weighs_by_the_averages_that_were_saved() -> None:
    one, two = (GoalSet({"x": Minimize(1.0), "y": Minimize(1.0)}, spill=ratio) for ratio in (0.5, 0.25))
    one({"x": torch.zeros(2), "y": torch.ones(2)})
    two.load_state_dict(one.state_dict())
    assert two.multipliers.tolist() == pytest.approx([0.2, 0.8]) and torch.equal(two.average, one.average)


def test_equal_averages_keep_their_weights_in_another_order() -> None:
    one, two = (
        GoalSet({"x": Minimize(1.0), "y": Minimize(1.0)}, spill=0.5),
        GoalSet({"y": Minimize(1.0), "x": Minimize(1.0)}, spill=0.5),
    )
    one({"x": torch.ones(2), "y": torch.ones(2)})
    two.load_state_dict(one.state_dict())
    assert one.average[0] == one.average[1] and two.multipliers.tolist() == one.multipliers.tolist()[::-1]


def test_several_goal_sets_of_one_model(lines: Lines) -> None:
    def model(*orders: str) -> torch.nn.ModuleDict:
        sets = {f"set{k}": GoalSet({name: Calibrated(9) for name in order}) for k, order in enumerate(orders)}
        return torch.nn.ModuleDict({**sets, "net": torch.nn.Linear(2, 2)})

    one, two = model("ab", "abd"), model("ba", "dc")
    for k in range(2):
        one[f"set{k}"]({name: torch.full((2,), ord(name) - 96.0) for name in one[f"set{k}"].names})
    two.load_state_dict(one.state_dict())
    assert two["set0"].anchors() == {"b": (0.0, 2.0), "a": (0.0, 1.0)}
    assert two["set1"].anchors() == {"d": (0.0, 4.0), "c": (0.0, 1.0)} and len(lines()) == 1


# States of older versions.


@EACH
def test_an_older_state_is_loaded_by_position(how: dict[str, Any], lines: Lines) -> None:
    one, two = trained(**how), GoalSet(kinds(), **how)
    two.load_state_dict(old_state(one))
    assert by_name(two) == by_name(one) and not lines()


def test_an_older_state_of_another_number_of_goals_says_what_to_do() -> None:
    one, two = GoalSet(x=Minimize(1.0), y=Minimize(2.0)), GoalSet(x=Minimize(1.0))
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"holds no names of goals.* has 2 goals in 2 columns.* has 1 in 1"
        ) as why:
            two.load_state_dict(old_state(one), strict=strict)
        assert "size mismatch" not in str(why.value) and "Missing" not in str(why.value)
    assert two.anchors() == {"x": (0.0, 1.0)}


def test_an_older_state_that_waits_for_anchors_waits_again() -> None:
    one, two = (GoalSet(x=Anchored("floor", "baseline")) for _ in range(2))
    one.anchor(floor={"x": 0.5})
    two.load_state_dict(old_state(one))
    two.anchor(baseline={"x": 2.0})
    assert two.anchors()["x"] == pytest.approx((0.5, 1.5))


def test_a_smaller_ring_of_open_steps_keeps_their_mean() -> None:
    goals = GoalSet(x=Minimize(1.0), spill=Spill(0.5))
    goals.history.stride = 1 << 20
    goals.history.append(torch.arange(5000.0)[:, None].repeat(1, goals.layout.size))
    goals.history._open[:, goals.layout.at.finite] = 1
    again = unpack_history(goals.monitor.get_extra_state())
    assert len(again["open"]) == 5000 and again["open"][:, 0].mean() == pytest.approx(2499.5)
