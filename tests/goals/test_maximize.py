"""Test goals to maximize: their deficits in every implementation, their anchors, and what is told of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bomkern import (
    Anchored,
    Box,
    Constraint,
    GoalSet,
    Group,
    History,
    Lower,
    Maximize,
    Minimize,
    MinimizeHard,
    Payoff,
    Policy,
    ShareGuard,
    Upper,
    diagnose,
    min_goal_loss,
    probe,
)
from bomkern.goals.constraint_info import from_text
from bomkern.integrations import log_goals
from bomkern.report import write_report
from tests.support.servers import servers

# The rule.


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "min"])
@pytest.mark.parametrize("server", servers("min_goal"))
def test_min_goal_loss_maximizes(server: tuple[str, str], reduction: str) -> None:
    """The loss, its gradient and its statistics are those of the negative raw value to minimize."""
    impl, device = server
    x, y = torch.linspace(-2, 2, 33, device=device), torch.linspace(3, -1, 33, device=device)
    a, b = x.clone().requires_grad_(), (-x).requires_grad_()
    got, want = (
        min_goal_loss([goal, y], [constraint, Minimize(1.0)], reduction=reduction, return_stats=True, impl=impl)
        for goal, constraint in ((a, Maximize(0.5, 0.75)), (b, Minimize(0.5, -0.75)))
    )
    got[0].sum().backward()
    want[0].sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert a.grad is not None and b.grad is not None and a.grad.any() and torch.equal(a.grad, -b.grad)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2}, {"spill": 0.5}], ids=["hard", "soft", "spill"])
@pytest.mark.parametrize("server", servers("goal_set"))
def test_a_goal_set_maximizes(server: tuple[str, str], options: dict[str, Any]) -> None:
    """Similarity s in [0, 1] with ideal 1 and nadir 0 is the error 1 - s, for loss, gradient and record."""
    impl, device = server
    ours = GoalSet(s=Anchored(ideal=1.0, nadir=0.0), other=Anchored(0.0, 2.0), impl=impl, **options).to(device)
    theirs = GoalSet(s=Anchored(0.0, 1.0), other=Anchored(0.0, 2.0), impl=impl, **options).to(device)
    for step in range(3):
        source = torch.Generator().manual_seed(step)
        s, other = (torch.randint(0, 64, (40,), generator=source).to(device) / 64 for _ in range(2))  # exact 1 - s
        leaf = s.clone().requires_grad_()
        out, want = ours({"s": leaf, "other": other}), theirs({"s": 1 - leaf, "other": other})
        (grad,), (expected,) = (torch.autograd.grad(x.loss, [leaf]) for x in (out, want))
        torch.testing.assert_close(out.loss, want.loss)
        torch.testing.assert_close(grad, expected)
        assert grad.any() and (grad <= 0).all()
        for part in ("share", "level", "deficit", "scale", "loss", "finite"):
            torch.testing.assert_close(out[part], want[part])
    assert ours.anchors() == {"s": (1.0, 1.0), "other": (0.0, 2.0)}


def test_deficit_is_0_at_the_ideal_and_1_at_the_nadir() -> None:
    goals = GoalSet(x=Anchored(ideal=-10.0, nadir=-40.0)).eval()  # a log-likelihood
    for raw, deficit in ((-10.0, 0.0), (-40.0, 1.0), (-25.0, 0.5), (-100.0, 3.0), (5.0, -0.5)):
        assert goals({"x": torch.tensor(raw)})["deficit"].item() == pytest.approx(deficit)


def test_training_maximizes() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    goals = GoalSet(similarity=Anchored(1.0, 0.0), size=Anchored(0.0, 10.0))
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(150):
        y = net(torch.randn(32, 4))[:, 0]
        out = goals({"similarity": torch.exp(-(y - 2).square()), "size": y.square()})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    raw = goals.history["raw"][:, 0]
    assert raw[-10:].mean() > raw[:10].mean() + 0.2


# Anchors.


def test_what_is_refused() -> None:
    for make, text in (
        (
            lambda: Anchored(1.0, 1.0),
            "ideal and nadir must differ, got 1 for both: the nadir is the raw value of doing",
        ),
        (lambda: Anchored(0.0, 1.0, maximize=True), "ideal must be above nadir with maximize=True, got ideal=0 and"),
        (lambda: Anchored(1.0, 0.0, maximize=False), "ideal must be below nadir with maximize=False"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(TypeError, match="maximize must be True, False or None, got 1"):
        Anchored(maximize=1)  # type: ignore[arg-type]


def test_measured_anchors(caplog: pytest.LogCaptureFixture) -> None:
    goals = GoalSet(x=Anchored(1.0, "baseline", maximize=True), y=Anchored("floor", 1.0), z=Anchored(0.0, "baseline"))
    goals.anchor(baseline={"x": 0.25, "z": 2.0}, floor={"y": 0.5})
    for name, anchors in {"x": (1.0, 0.75), "y": (0.5, 0.5), "z": (0.0, 2.0)}.items():
        assert goals.anchors()[name] == pytest.approx(anchors)
    assert not caplog.messages
    raw = {"x": torch.tensor([0.25, 1.0]), "y": torch.tensor([1.0, 0.5]), "z": torch.tensor([2.0, 0.0])}
    assert goals(raw)["deficit"].tolist() == pytest.approx([0.5, 0.5, 0.5])
    again = GoalSet(x=Anchored(1.0, "baseline", maximize=True), y=Anchored("floor", 1.0), z=Anchored(0.0, "baseline"))
    again.anchor(baseline={"x": 1.5, "z": -1.0}, floor={"y": 0.5})
    assert caplog.messages == [
        "the nadir of x, 1.5, is not below its ideal, 1: it will hold the gradient; if it is on purpose, write "
        "Anchored(..., maximize=False)",
        "the nadir of z, -1, is not above its ideal, 0: it will hold the gradient; if it is on purpose, write "
        "Anchored(..., maximize=True)",
    ]


def test_moving_anchors_and_their_drift() -> None:
    goals = GoalSet(x=Anchored(1.0, 0.5, moving=True, halflife=1.0), guard=ShareGuard(0.1, 0.5, rate=0.1))
    goals({"x": torch.tensor([0.5, 0.7])})  # the guard widens the scale
    assert goals.params[0, 1] == goals.params[0, 2] == pytest.approx(-2 * math.exp(-0.1))
    goals = GoalSet(x=Anchored(1.0, 0.5, moving=True, halflife=1.0))
    goals.remeasure({"x": (torch.tensor([0.6, 0.6]), 0.3)})
    assert goals.anchors()["x"] == pytest.approx((0.8, 0.4)) and goals.drift() == {"x": pytest.approx(0.4)}
    for _ in range(30):
        goals.remeasure({"x": (0.6, 0.9)})  # the nadir crosses the ideal: the scale stays positive
    assert goals.anchors()["x"] == pytest.approx((0.6, 0.025)) and (goals.params[0, 1:3] < 0).all()
    goals["x"] = Maximize(2.0, 3.0)
    assert goals.anchors()["x"] == (3.0, 2.0)


class Doubling(Policy):
    """A policy whose scale doubles in every step."""

    until = None

    def __init__(self, constraint: Constraint) -> None:
        super().__init__(constraint)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(raw.mean(), 1.0), 2.0 ** (step + 1)


@pytest.mark.parametrize(
    ("constraint", "signs"),
    [
        (Upper(1.0, 1.0), (1, 0)),
        (Lower(1.0, 1.0), (0, -1)),
        (Minimize(1.0, 1.0), (1, 1)),
        (Maximize(1.0, 1.0), (-1, -1)),
        (MinimizeHard(1.0), (1, -1)),
        (Box(0.0, 2.0), (1, -1)),
    ],
    ids=repr,
)
def test_a_policy_changes_the_scale_and_not_the_sides(constraint: Constraint, signs: tuple[int, int]) -> None:
    goals = GoalSet(x=Doubling(constraint))
    for step in (1, 2, 3):
        goals({"x": torch.tensor([0.0, 1.5])})
        assert goals.params[0, :3].tolist() == [1.0, *(sign / 2**step for sign in signs)]
        assert goals.anchors()["x"] == (1.0, 2.0**step)


# The probe.


def test_a_probe_maximizes_what_is_to_be_maximized() -> None:
    torch.manual_seed(0)
    x = nn.Parameter(torch.zeros(()))
    goals = GoalSet(up=Anchored("probe", "probe", maximize=True), g=Group(low=Lower(1.0, 1.0), down=Minimize(1.0)))
    optimizer = torch.optim.SGD([x], 0.1)

    def step() -> None:
        out = goals({"up": 3 - (x - 3).square(), "g": {"low": x * 1.0, "down": (x + 1).square()}})
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

    payoff = probe(step, goals, 40, state=[optimizer, holder(x)], progress=False)
    assert payoff.maximize == ("up", "g.low")
    assert payoff.table[0, 0] > 2.9 and payoff.table[1, 1] > 3 and payoff.table[2, 2] < 0.1
    # The worst value of `up` is the lowest, after training on the others.
    assert payoff.anchors("ideal")["up"] == pytest.approx(3, abs=1e-3)
    assert payoff.anchors("nadir")["up"] == pytest.approx(-13, abs=0.01)
    assert payoff.anchors("nadir")["g.down"] == payoff.table[:, 2].amax()
    goals.anchor(probe=payoff)
    ideal, scale = goals.anchors()["up"]
    assert ideal - scale == pytest.approx(payoff.anchors("nadir")["up"], abs=1e-4)
    assert payoff.to_dict()["maximize"] == ["up", "g.low"]
    assert "maximize" not in Payoff(["a"], torch.ones(1, 1), 1).to_dict()
    assert diagnose(goals.history, payoff=payoff).note


def holder(x: nn.Parameter) -> nn.Module:
    module = nn.Module()
    module.x = x
    return module


# What is told.


def trained(batch: int = 8) -> GoalSet:
    goals = GoalSet(accuracy=Anchored(ideal=1.0, nadir=0.0), loss=Anchored(0.0, 2.0))
    for step in range(60):
        noise = 0.05 * torch.rand(batch, generator=torch.Generator().manual_seed(step))
        goals({"accuracy": 0.3 + step / 200 + noise, "loss": 1 - step / 100 + noise})
    return goals


def test_table_history_logs_and_report(tmp_path: Path) -> None:
    goals = trained()
    row = str(goals).splitlines()[2].split()
    assert row[:5] == ["accuracy", "Anchored(ideal=1,", "nadir=0)", "1", "1"]
    assert (goals.history["scale"] == torch.tensor([1.0, 2.0])).all()
    logged: dict[str, float] = {}
    log_goals(goals, type("Log", (), {"log": lambda self, values, step: logged.update(values)})(), 1)
    assert 0 < logged["goals/level/accuracy"] < 1 and logged["goals/raw/accuracy"] == pytest.approx(0.47, abs=0.05)
    goals.history.save(tmp_path / "history.pt")
    history = History.load(tmp_path / "history.pt")
    assert history.layout.constraints == goals.layout.constraints
    assert [c.direction for c in history.layout.constraints] == [-1, 1]
    write_report(tmp_path / "report.html", history, diagnose(history))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ideal 1 (off the scale), nadir 0" in page and "Anchored(ideal=1, nadir=0)" in page


def test_an_old_text_tells_the_direction() -> None:
    for text, direction in (
        ("Anchored(ideal=1, nadir=0)", -1),
        ("Anchored(ideal=1, nadir='baseline', maximize=True)", -1),
        ("Maximize(scale=2, ideal=1)", -1),
        ("Anchored(ideal='floor', nadir=1)", 1),
        ("Anchored(ideal=0.2, nadir=1, moving=True)", 1),
    ):
        assert from_text(text).direction == direction
