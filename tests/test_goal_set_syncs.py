"""No step of a `GoalSet` makes the host wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Calibrated,
    Fixed,
    GoalSet,
    Group,
    MinimizeHard,
    Policy,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
    history,
)
from tests.test_min_goal_bridge import CountSyncs

RULES: dict[str, dict[str, Any]] = {
    "hard": {},
    "global": {"reduction": "min"},
    "smooth": {"temperature": 0.1},
    "spill": {"spill": Spill(0.5)},
    "guard": {"guard": ShareGuard(0.1, 0.3)},
}
EACH = pytest.mark.parametrize("rule", RULES)


def everything(**rule: Any) -> GoalSet:
    """Every policy and a group."""
    goals: dict[str, Policy | Group] = {
        "max": Calibrated(4),
        "quantile": Calibrated(4, statistic=0.9),
        "hard": Fixed(MinimizeHard(1.0)),
        "tracking": Tracking(halflife=3),
        "moving": Anchored(0.5, 1.0, moving=True),
        "both": Group(a=Anchored(0.0, 2.0), b=Fixed(Upper(1.0, 0.5))),
    }
    return GoalSet(goals, **rule)


def values(device: str) -> dict[str, Any]:
    def raw() -> Tensor:
        return torch.rand(8, device=device, requires_grad=True)

    return {**{n: raw() for n in ("max", "quantile", "hard", "tracking", "moving")}, "both": {"a": raw(), "b": raw()}}


def step(goals: GoalSet, raw: dict[str, Any], ok: Tensor) -> None:
    out = goals(raw)
    out.loss.backward()
    goals.accept(ok)
    goals.remeasure({"moving": (raw["moving"].detach(), raw["moving"].detach() + 1)})
    goals.temperature.mul_(0.9)


@EACH
def test_no_host_sync_in_a_step(rule: str) -> None:
    goals, raw, ok = everything(**RULES[rule]), values("cpu"), torch.tensor(True)
    with CountSyncs() as counter:
        for _ in range(6):  # through the end of the calibration
            step(goals, raw, ok)
    assert not counter.seen.keys() - {"_to_copy"}  # of numbers, to where the goals are: here the host itself
    assert goals.steps == 6


@EACH
def test_nothing_depends_on_values(rule: str) -> None:
    """On a device whose tensors have no values to read, where ``item``, ``tolist`` and ``if tensor`` raise."""
    goals = everything(impl="reference", **RULES[rule]).to("meta")
    raw, ok = values("meta"), torch.ones((), dtype=torch.bool, device="meta")
    for _ in range(6):
        step(goals, raw, ok)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        goals.anchors()  # which does read


def test_the_history_is_copied_once_in_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """To pinned memory, behind an event that is waited for when the next copy is made."""
    made = []
    copy = history._Copy
    monkeypatch.setattr(history, "_Copy", lambda *given: made.append(given) or copy(*given))
    goals, raw = everything(), values("cpu")
    for _ in range(2 * history.ROWS + 1):
        goals(raw)
    assert len(made) == 2 and all(rows == history.ROWS for _, rows in made)
