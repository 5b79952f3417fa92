"""Test the seven constraints against their formulas, written here as scores, and test their errors."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bomkern import Box, BoxAsymmetric, ConstraintTable, Lower, Maximize, Minimize, MinimizeHard, Upper, min_goal_loss
from bomkern.constraints import Constraint
from tests.support.constraints import arguments, kinds


def box_score(x: float, lower: float, healthy: float, upper: float, tail: float) -> float:
    r = (x - healthy) / (upper - healthy) if x >= healthy else (healthy - x) / (healthy - lower)
    return 1 - r if r <= 1 - tail else tail * math.exp(-(r - 1 + tail) / tail)


CASES = [
    (Minimize(0.4), lambda x: math.exp(-x / 0.4)),
    (Minimize(2.0, ideal=-1.5), lambda x: math.exp(-(x + 1.5) / 2)),
    (Maximize(0.4), lambda x: math.exp(x / 0.4)),
    (Maximize(2.0, ideal=-1.5), lambda x: math.exp((x + 1.5) / 2)),
    (MinimizeHard(0.7), lambda x: 1 / (1 + (x / 0.7) ** 2)),
    (Upper(1.5, 0.5), lambda x: 1.0 if x <= 1.5 else math.exp(-(x - 1.5) / 0.5)),
    (Lower(-0.5, 2.0), lambda x: 1.0 if x >= -0.5 else math.exp(-(-0.5 - x) / 2)),
    (Box(-1.0, 3.0), lambda x: box_score(x, -1, 1, 3, 0.05)),
    (Box(-1.0, 3.0, tail=0.3), lambda x: box_score(x, -1, 1, 3, 0.3)),
    (BoxAsymmetric(-1.0, 0.5, 4.0, tail=0.1), lambda x: box_score(x, -1, 0.5, 4, 0.1)),
]


def test_every_constraint_has_a_formula_here() -> None:
    assert {type(constraint).__name__ for constraint, _ in CASES} == set(kinds())


@pytest.mark.parametrize("kind", kinds().values(), ids=kinds())
def test_a_table_holds_every_constraint(kind: type[Constraint]) -> None:
    """A table represents each constraint by its ramp and curve, which is all that the kernels read."""
    constraint = kind(**arguments(kind, 0.5, 0.25, 0.1))
    x = torch.linspace(-1, 2, 31, dtype=torch.float64)
    for impl in ("reference", None):
        table = ConstraintTable([constraint], dtype=torch.float64)
        a, b = (min_goal_loss([x], given, reduction="none", impl=impl) for given in (constraint, table))
        assert torch.equal(a, b) and pickle.loads(pickle.dumps(constraint)) == constraint


@pytest.mark.parametrize(("constraint", "score"), CASES, ids=lambda c: repr(c) if isinstance(c, Constraint) else "")
@given(x=st.floats(-20, 20))
def test_formula(constraint: Constraint, score: object, x: float) -> None:
    expected = -math.log(score(x))  # type: ignore[operator]
    for impl in ("reference", None):
        loss = min_goal_loss([torch.tensor([x], dtype=torch.float64)], constraint, impl=impl)
        assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("constraint", [c for c, _ in CASES], ids=repr)
def test_continuous_and_monotone(constraint: Constraint) -> None:
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    d = min_goal_loss([x], constraint, reduction="none")
    assert d.diff().abs().max() < 1e-2  # the deficit has no jump, also not at a limit or seam
    center = constraint.ramp[0]
    if not isinstance(constraint, Maximize):
        assert (d[x >= center].diff() >= 0).all()
    if not isinstance(constraint, Minimize):
        assert (d[x <= center].diff() <= 0).all()


@pytest.mark.parametrize(
    "constraint", [Box(-1.0, 3.0), Box(0.0, 1.0, tail=0.4), BoxAsymmetric(-1.0, 0.5, 4.0)], ids=repr
)
def test_box_is_smooth_at_the_seam(constraint: Constraint) -> None:
    center, right, _, tail = constraint.ramp
    seam = center + (1 - tail) / right
    x = torch.tensor([seam - 1e-9, seam + 1e-9], dtype=torch.float64, requires_grad=True)
    min_goal_loss([x], constraint, reduction="sum").backward()
    assert x.grad[0] == pytest.approx(float(x.grad[1]), rel=1e-6)  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: Minimize(0.0), ValueError, "scale"),
        (lambda: Minimize(-1.0), ValueError, "scale"),
        (lambda: Minimize(1e-320), ValueError, "scale"),
        (lambda: Minimize(math.nan), ValueError, "scale"),
        (lambda: Maximize(0.0), ValueError, "Maximize: scale"),
        (lambda: Maximize(1.0, torch.tensor(1.0)), TypeError, r"ideal .* write \.item\(\).* ConstraintTable"),  # type: ignore[arg-type]
        (lambda: Minimize("auto"), TypeError, "scale"),  # type: ignore[arg-type]
        (lambda: Minimize(torch.tensor(1.0)), TypeError, "ConstraintTable"),  # type: ignore[arg-type]
        (lambda: Minimize(1.0, ideal=math.inf), ValueError, "ideal"),
        (lambda: MinimizeHard(0), ValueError, "scale"),
        (lambda: Upper(1.0, -0.5), ValueError, "margin"),
        (lambda: Lower(math.nan, 0.5), ValueError, "limit"),
        (lambda: Box(1.0, 0.0), ValueError, "lower"),
        (lambda: Box(1.0, 1.0), ValueError, "lower"),
        (lambda: Box(0.0, 1.0, tail=1.0), ValueError, "tail"),
        (lambda: Box(0.0, 1.0, tail=0.0), ValueError, "tail"),
        (lambda: BoxAsymmetric(0.0, 2.0, 1.0), ValueError, "healthy"),
        (lambda: ConstraintTable([]), ValueError, "constraints"),
        (lambda: ConstraintTable(Minimize(1.0)), TypeError, "constraints"),  # type: ignore[arg-type]
        (lambda: ConstraintTable([1.0]), TypeError, r"constraints\[0\]"),  # type: ignore[list-item]
        (lambda: ConstraintTable([Minimize(1.0)], dtype=torch.float16), TypeError, "dtype"),
    ],
)
def test_bad_arguments_are_named(make: object, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        make()  # type: ignore[operator]


def test_value_semantics() -> None:
    assert Minimize(2) == Minimize(2.0) and hash(Minimize(2)) == hash(Minimize(2.0))
    assert Minimize(2.0) != Minimize(3.0) and Upper(0.0, 1.0) != Minimize(1.0)
    assert Minimize(2.0, 0.5).scale == 2.0 and Minimize(2.0, 0.5).ideal == 0.5
    assert repr(Box(0, 1)) == "Box(lower=0, upper=1, tail=0.05)"
    with pytest.raises(AttributeError, match="immutable"):
        Minimize(2.0).scale = 3.0  # type: ignore[misc]
    with pytest.raises(AttributeError, match="sclae"):
        _ = Minimize(2.0).sclae
    for constraint, _ in CASES:
        assert pickle.loads(pickle.dumps(constraint)) == constraint


def test_table_changes_in_place() -> None:
    table = ConstraintTable([Minimize(1.0), Upper(0.0, 1.0)])
    raw = [torch.tensor([4.0]), torch.tensor([1.0])]
    assert float(min_goal_loss(raw, table)) == 4.0
    before = table.params.data_ptr()
    table[0] = Minimize(8.0)
    assert table.params.data_ptr() == before
    assert float(min_goal_loss(raw, table)) == 1.0  # the deficits are now 0.5 and 1.0
    table.params[1, 1] = 3.0
    assert float(min_goal_loss(raw, table)) == 3.0
    with pytest.raises(ValueError, match="curve"):
        table[0] = Box(0.0, 1.0)
    with pytest.raises(TypeError, match="constraint"):
        table[0] = 3.0  # type: ignore[assignment]
