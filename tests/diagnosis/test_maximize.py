"""Test that the diagnosis reads goals to maximize, and goals that beat their ideals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bomkern import Anchored, Box, Fixed, History, Lower, Maximize, Minimize, Upper, diagnose
from tests.support.histories import T, clean, flat, kinds, locked, only, slope, written


def mirrored(history: History) -> History:
    """Return the history of goals with the raw values 1 - x, ideals 1 and nadirs 0."""
    names, raw, share = history.layout.columns, 1 - history["raw"], history["share"]
    return written(
        {name: raw[:, k] for k, name in enumerate(names)},
        {name: share[:, k] for k, name in enumerate(names)},
        dict.fromkeys(names, (1.0, 1.0)),
        dict.fromkeys(names, Anchored(1.0, 0.0)),
        highest={name: 1 - 2 * history["raw"][:, k] + history["highest"][:, k] for k, name in enumerate(names)},
        most=history.layout.most,
    )


def starved() -> History:
    later = torch.cat([flat(0.3, 150), slope(0.3, 0.9, 250)])
    return written({"a": slope(2.0, 1.0), "recon": later}, {"a": 1.0})


def moving() -> History:
    raw = torch.cat([flat(0.5, 100), slope(0.5, 1.6, 300)])
    return written({"realism": raw, "recon": slope(0.9, 0.4, T, 1)}, {"realism": 0.9, "recon": 0.1})


def conflict() -> History:
    return written({"a": flat(0.8), "b": flat(0.79, T, 1), "c": flat(0.1, T, 2)}, {"a": 0.5, "b": 0.5})


def small() -> History:
    return written({"a": flat(30.0), "b": flat(0.4, T, 1)}, {"a": 1.0})


def large() -> History:
    return written({"a": slope(0.01, 0.002), "b": flat(0.4, T, 1)}, {"b": 1.0})


FAULTS = {
    "locked": locked,
    "starved": starved,
    "moving target": moving,
    "conflict": conflict,
    "miscalibrated": small,
}


@pytest.mark.parametrize(("kind", "make"), FAULTS.items(), ids=FAULTS)
def test_a_fault_is_found_in_the_mirror(kind: str, make: object) -> None:
    history = make()  # type: ignore[operator]
    found, expected = (
        [(f.kind, f.goals, f.first, f.last, round(f.confidence, 2)) for f in diagnose(given)]
        for given in (mirrored(history), history)
    )
    assert found == expected and kind in [f[0] for f in found]


@pytest.mark.parametrize("make", [large, lambda: clean(1), lambda: clean(2)])
def test_what_is_not_found_in_the_mirror(make: object) -> None:
    history = make()  # type: ignore[operator]
    assert kinds(mirrored(history)) == kinds(history)


def test_suggestions_are_goals_to_maximize() -> None:
    for make in (locked, moving, small):
        suggestion = diagnose(mirrored(make())).faults[0].suggestion
        code = suggestion[suggestion.index("Anchored(") :].partition(")")[0] + ")"
        assert eval(code, {"Anchored": Anchored}).maximize, suggestion
    found = only(mirrored(locked()), "locked")
    assert "give realism Anchored(-0.4" in found.suggestion and "of an ideal 1;" in found.evidence


def test_anchors_that_drift() -> None:
    away = torch.cat([torch.zeros(100), torch.linspace(0, 1.2, 300)])
    raw = {"realism": 0.5 - away + flat(0.1, T), "recon": flat(0.5, T, 1)}
    history = written(
        raw,
        {"realism": 0.5, "recon": 0.5},
        {"realism": (0.5 - away, 0.5)},
        {"realism": Anchored(0.5, 0.0, moving=True)},
    )
    assert "drifted from (0.5, 0) to (-0.7, -1.2)" in only(history, "moving target").evidence


# Goals that beat their ideals.


@pytest.mark.parametrize(
    ("constraint", "sign"),
    [(Anchored(0.0, 1.0), 1), (Fixed(Minimize(1.0)), 1), (Anchored(0.0, -1.0), -1), (Fixed(Maximize(1.0)), -1)],
    ids=repr,
)
def test_a_goal_that_beats_its_ideal(constraint: object, sign: int) -> None:
    raw: dict[str, Tensor] = {"nll": sign * slope(0.5, -2.0), "b": flat(0.4, T, 1)}
    history = written(raw, {"b": 1.0}, constraints={"nll": constraint})
    found = only(history, "past ideal")
    assert found.goals == ("nll",) and (found.first, found.last) == (321, 400)
    assert "nll beats its ideal: raw" in found.evidence and "1.7 scales better than" in found.evidence
    assert found.suggestion.startswith("move it: give nll Anchored(")
    ideal, nadir = eval(found.suggestion.removeprefix("move it: give nll Anchored"))
    assert sign * ideal < -1.5 and sign * (nadir - ideal) > 0
    told = [f.kind for f in diagnose(history) if "nll" in f.goals]
    assert "idle" not in told and "past ideal" not in kinds(history)


def test_goals_near_or_within_their_ideals() -> None:
    for constraint, value in (
        (Anchored(0.0, 1.0), 0.0),
        (Anchored(0.0, 1.0), -0.05),
        (Anchored(0.0, 1.0), 0.3),
        (Fixed(Upper(0.0, 1.0)), -3.0),
        (Fixed(Lower(0.0, 1.0)), 3.0),
        (Fixed(Box(-1.0, 1.0)), 0.0),
    ):
        history = written({"a": flat(value), "b": flat(0.4, T, 1)}, {"b": 1.0}, constraints={"a": constraint})
        assert "past ideal" not in [f.kind for f in diagnose(history)], (constraint, value)
    for seed in range(3):
        assert "past ideal" not in [f.kind for f in diagnose(clean(seed))]
