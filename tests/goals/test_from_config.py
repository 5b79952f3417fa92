"""Test `GoalSet.from_config`: every kind by its name, what a dictionary lacks, and a round trip through JSON."""

from __future__ import annotations

import enum
import json
from typing import Any

import pytest
import torch

from bomkern import (
    Anchored,
    Box,
    BoxAsymmetric,
    Calibrated,
    GoalSet,
    Group,
    Lower,
    Maximize,
    Minimize,
    MinimizeHard,
    Tracking,
    Upper,
)

WRITTEN: dict[str, tuple[dict[str, Any], object]] = {
    "soft": ({"type": "MINIMIZE_SOFT", "scale": 2.0}, Minimize(2.0)),
    "auto": ({"type": "MINIMIZE_SOFT", "scale": "auto"}, Calibrated()),
    "ideal": ({"type": "minimize", "scale": 2.0, "ideal": 0.5}, Minimize(2.0, 0.5)),
    "hard": ({"type": "MINIMIZE_HARD", "scale": 2.0}, MinimizeHard(2.0)),
    "more": ({"type": "MAXIMIZE_SOFT", "scale": 0.3, "ideal": 1.0}, Maximize(0.3, 1.0)),
    "upper": ({"type": "UPPER", "limit": 1.0, "margin": 0.5}, Upper(1.0, 0.5)),
    "lower": ({"type": "Lower", "limit": 1.0, "margin": 0.5}, Lower(1.0, 0.5)),
    "box": ({"type": "BOX", "lower": 0.0, "upper": 1.0}, Box(0.0, 1.0)),
    "odd": ({"type": "BoxAsymmetric", "lower": 0, "healthy": 1, "upper": 4}, BoxAsymmetric(0.0, 1.0, 4.0)),
    "anchored": ({"type": "ANCHORED", "ideal": 0.5, "nadir": 1.0, "moving": True}, Anchored(0.5, 1.0, moving=True)),
    "calibrated": ({"type": "CALIBRATED", "steps": 9, "statistic": 0.9}, Calibrated(9, 0.9)),
    "tracking": ({"type": "TRACKING", "halflife": 9.0}, Tracking(9.0)),
}


def test_every_kind_is_read_from_plain_values() -> None:
    config = json.loads(json.dumps({name: settings for name, (settings, _) in WRITTEN.items()}))
    goals = GoalSet.from_config(config, spill="auto", reduction="sum")
    assert goals.names == list(WRITTEN) and goals.spill is not None and goals.reduction == "sum"
    assert {name: repr(policy) for name, policy in goals.policies.items()} == {
        name: repr(given) for name, (_, given) in WRITTEN.items()
    }


def test_members_of_an_enumeration_groups_and_objects_are_taken() -> None:
    kinds = enum.Enum("ConstraintType", ["MINIMIZE_SOFT", "BOX"])  # type: ignore[misc]
    soft = {"type": kinds.MINIMIZE_SOFT, "scale": 3.0}
    both = {"members": {"a": soft, "b": Upper(1.0, 1.0)}}
    goals = GoalSet.from_config(
        {"one": soft, "two": both, "three": {"type": Minimize, "scale": 3.0}, "four": Box(0, 1)}
    )
    expected = GoalSet(
        one=Minimize(3.0), two=Group(a=Minimize(3.0), b=Upper(1.0, 1.0)), three=Minimize(3.0), four=Box(0, 1)
    )
    raw = {"one": torch.rand(4), "two": {"a": torch.rand(4), "b": torch.rand(4)}, "three": torch.rand(4)}
    raw["four"] = torch.rand(4)
    assert torch.equal(goals(raw).loss, expected(raw).loss)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([1], "config must be a mapping of goals' names to their settings, got list"),
        ({"a": 2.0}, r"config\['a'\] must be a mapping such as .*MINIMIZE_SOFT.*, got float"),
        ({"a": {"scale": 2.0}}, r"config\['a'\] must have a \"type\", one of MINIMIZE_SOFT, .*; got 'scale'"),
        ({"a": {"type": "MINIMISE", "scale": 2.0}}, r"config\['a'\]: \"type\" must be .*, got 'MINIMISE'"),
        ({"a": {"type": 3, "scale": 2.0}}, r"config\['a'\]: \"type\" must be .*, got 3"),
        ({"a": {"type": "UPPER", "limit": 2.0}}, r"config\['a'\]: Upper needs 'margin'"),
        ({"a": {"type": "UPPER", "limit": 2.0, "scale": 1}}, r"Upper has no 'scale': it takes limit, margin"),
        ({"a": {"type": "MINIMIZE_SOFT", "scale": -1.0}}, r"config\['a'\]: Minimize: scale must be"),
        ({"a": {"type": "MINIMIZE_HARD", "scale": "auto"}}, r"config\['a'\]: MinimizeHard: scale must be"),
        ({"a": {"members": {"b": {"members": {"c": Minimize(1.0)}}}}}, r"config\['a'\]: b must be .*another group"),
        ({}, "a GoalSet must have 1 to 64 goals, got 0"),
    ],
)
def test_what_is_wrong_is_said_of_its_goal(config: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        GoalSet.from_config(config)
