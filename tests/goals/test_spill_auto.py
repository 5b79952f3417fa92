"""Test the parts of `Spill("auto")`: an even part, goals beyond their nadirs, and weights that change slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bomkern import GoalSet, Minimize, Spill
from bomkern.goals.rules import EVEN, INERTIA
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("goal_set"))
DEFICITS = st.lists(st.floats(0.0, 200.0), min_size=1, max_size=13)


def make(count: int, spill: Any, **options: Any) -> GoalSet:
    return GoalSet({f"g{k}": Minimize(1.0) for k in range(count)}, spill=spill, **options)


def feed(goals: GoalSet, deficits: list[float], steps: int) -> Tensor:
    """Return the weights after some steps with the same deficits."""
    for _ in range(steps):
        goals({f"g{k}": torch.tensor([d], device=goals.params.device) for k, d in enumerate(deficits)})
    return goals.multipliers


@given(deficits=DEFICITS, even=st.floats(0.0, 0.9), ratio=st.floats(0.1, 0.9))
def test_every_goal_has_at_least_its_even_part(deficits: list[float], even: float, ratio: float) -> None:
    weights = feed(make(len(deficits), Spill(ratio, even=even)), deficits, 2)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert float(weights.min()) >= even / len(deficits) - 1e-6


@given(deficits=DEFICITS)
def test_a_relative_goal_pulls_by_its_logarithm(deficits: list[float]) -> None:
    """Weights are those of the order, divided by what the average exceeds 1 by, and sum to 1."""
    goals = make(len(deficits), Spill(0.5, halflife=0.01, relative=True))  # an average that follows at once
    weights = feed(goals, deficits, 3)
    plain = feed(make(len(deficits), Spill(0.5, halflife=0.01)), deficits, 3)
    want = plain / torch.tensor(deficits).clamp(min=1)
    assert torch.allclose(weights, want / want.sum(), atol=1e-5)


def test_a_goal_eighty_nadirs_away_leaves_the_others_their_gradient() -> None:
    deficits = [80.0, 0.9, 0.8]
    pull = {
        relative: feed(make(3, Spill(0.5, halflife=0.01, relative=relative)), deficits, 3) * torch.tensor(deficits)
        for relative in (False, True)
    }
    assert pull[False][0] / pull[False].sum() > 0.98  # of the gradient of goals whose losses are squares or larger
    assert pull[True][0] / pull[True].sum() < 0.65


def test_weights_follow_with_the_half_life_that_was_given() -> None:
    goals = make(2, Spill(0.5, halflife=0.01, inertia=10.0))
    before = feed(goals, [1.0, 0.0], 200)[0].item()
    assert before == pytest.approx(2 / 3, abs=1e-4)
    after = feed(goals, [0.0, 1.0], 10)[0].item()  # half of the way from 2/3 to 1/3
    assert after == pytest.approx(0.5, abs=1e-3)


def test_a_goal_that_alternates_keeps_its_weight() -> None:
    """Two goals that take turns in being worst have nearly even weights, where the order alone would swap them."""
    swung, calm = ([] for _ in range(2))
    for kept, inertia in ((swung, 0.0), (calm, 50.0)):
        goals = make(2, Spill(0.2, halflife=0.01, inertia=inertia))
        for step in range(300):
            kept.append(feed(goals, [float(step % 2), float((step + 1) % 2)], 1)[0].item())
    assert max(swung[-50:]) - min(swung[-50:]) > 0.6
    assert max(calm[-50:]) - min(calm[-50:]) < 0.02


@IMPLS
@pytest.mark.parametrize(
    "spill", [Spill("auto"), Spill(0.7, even=0.3), Spill(0.5, relative=True), Spill(0.5, inertia=3)]
)
def test_every_impl_has_the_weights_of_the_reference(server: tuple[str, str], spill: Spill) -> None:
    impl, device = server
    source = torch.Generator().manual_seed(0)
    ours, theirs = (make(9, spill, impl=name).to(where) for name, where in ((impl, device), ("reference", "cpu")))
    for _ in range(20):
        deficits = (3 * torch.randn(9, generator=source)).exp().tolist()
        got, want = feed(ours, deficits, 1), feed(theirs, deficits, 1)
        assert torch.allclose(got.cpu(), want, rtol=1e-5, atol=1e-7)
    assert float(want.sum()) == pytest.approx(1, abs=1e-5)


def test_the_loss_is_the_weighted_sum_of_the_deficits() -> None:
    goals = make(3, "auto")
    feed(goals, [30.0, 0.5, 0.2], 40)
    weights = goals.multipliers.clone()
    raw = {f"g{k}": torch.tensor([d], requires_grad=True) for k, d in enumerate((20.0, 0.4, 0.3))}
    out = goals(raw)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(float((weights * torch.tensor([20.0, 0.4, 0.3])).sum()), rel=1e-5)
    assert torch.allclose(torch.stack([x.grad[0] for x in raw.values()]), weights)
    assert torch.allclose(out.share, weights)


def test_compiled_it_has_the_same_weights() -> None:
    eager, compiled = make(4, "auto"), make(4, "auto")
    step = torch.compile(lambda raw: compiled(raw).loss, backend="aot_eager", fullgraph=True)
    for scale in (90.0, 3.0, 1.0, 0.4):
        raw = {f"g{k}": torch.tensor([scale / (k + 1)]) for k in range(4)}
        eager(raw), step(raw)
    assert torch.equal(eager.multipliers, compiled.multipliers)


def test_a_budget_takes_rows_by_these_weights() -> None:
    goals = make(5, Spill("auto", budget=2.0))
    rows = torch.rand(5, 64)
    for _ in range(30):
        out = goals({f"g{k}": rows[k] + k for k in range(5)})
    want = (2.0 * goals._multipliers_before * 64).ceil().clamp(1, 64)
    assert out.rows.tolist() == want.tolist()


def test_another_rule_finds_its_weights_from_the_averages_of_a_checkpoint() -> None:
    old, new = make(3, 0.5), make(3, "auto")
    feed(old, [4.0, 0.5, 0.1], 30)
    new.load_state_dict(old.state_dict())
    assert torch.allclose(new.multipliers, Spill("auto").weights_of(old.average))
    same = make(3, "auto")
    same.load_state_dict(new.state_dict())
    assert torch.equal(same.multipliers, new.multipliers)


def test_auto_is_what_the_docstring_says() -> None:
    auto, written = Spill("auto"), Spill(0.5, even=EVEN, relative=True, inertia=INERTIA)
    assert auto.by_order == written.by_order and torch.equal(auto.weights(9), written.weights(9))
    assert repr(auto) == "Spill('auto')" and repr(Spill("auto", even=0.25)) == "Spill('auto', even=0.25)"
    assert repr(written) == f"Spill(0.5, even={EVEN:g}, relative=True, inertia={INERTIA:g})"
    assert Spill(0.5).by_order == 0.5 and "spill=auto" in repr(make(2, "auto"))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"even": 1.0}, ValueError, "Spill: even must be at least 0 and below 1, got 1.0"),
        ({"even": -0.1}, ValueError, "Spill: even must be at least 0"),
        ({"relative": 1}, TypeError, "Spill: relative must be True or False"),
        ({"inertia": -1.0}, ValueError, "Spill: inertia must be at least 0, got -1.0"),
        ({"ratio": "much"}, TypeError, "Spill: ratio must be a number, got str 'much'"),
    ],
)
def test_bad_numbers_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Spill(**given)
