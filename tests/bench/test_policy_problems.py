"""Test the problems of `python -m bench.policies` that are no VAEs: equations, anchors, figures of known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchjd")

from bench.policies import vicreg
from bench.policies.burgers import Burgers
from bench.policies.faults import FAULTS
from bench.policies.helmholtz import Helmholtz
from bench.policies.peers import deficits
from bench.policies.pinn import Equation, Net
from bench.policies.poisson import Poisson
from bench.policies.problems import PROBLEMS, VAES
from bench.policies.tasks import Split, Tasks, Tasks3, Tasks13, digits, f1
from bench.policies.vicreg import EMBEDDING, FLOOR, VICReg, probe, view
from bomkern import anchors

EQUATIONS = (Helmholtz, Burgers, Poisson)
OTHERS = [name for name in PROBLEMS if name not in VAES]


class Known(nn.Module):
    """A given function of points in place of a network, with derivatives by two backward passes in float64."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, points: Tensor) -> Tensor:
        return self.function(points.double()).to(points.dtype)

    def derivatives(self, points: Tensor, along: tuple[int, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = points.double().requires_grad_()
            value = self.function(x)
            first = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
            second = sum(torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0][:, i] for i in along)
        return tuple(t.detach().to(points.dtype) for t in (value, first.T, second))


def later(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function at a slightly larger second coordinate where that is 0."""
    return lambda x: function(torch.stack([x[:, 0], torch.where(x[:, 1] == 0, 1e-9, x[:, 1])], 1))


def nothing(points: Tensor) -> Tensor:
    return 0 * points.pow(3).sum(1)


def solved_by(kind: type[Equation], function: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return deficits and error on the test grid of a function."""
    problem = kind(0, FAULTS["none"], 4)
    problem.model, problem.average = Known(function), {}
    held = problem.evaluate("test")
    return {**held["deficits"], "error": held["error"]}


def test_the_network_carries_its_derivatives() -> None:
    torch.manual_seed(0)
    net, points = Net(7, 3).double(), torch.rand(5, 2).double()
    torch.set_default_dtype(torch.float64)
    try:
        for along in ((0, 1), (0,)):
            for a, b in zip(net.derivatives(points, along), Known(net).derivatives(points, along), strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", EQUATIONS)
def test_the_exact_solution_solves_the_equation(kind: type[Equation]) -> None:
    points = [part.double() for part in kind(0, FAULTS["none"], 4).points("validation")]
    value, first, second = Known(kind.exact).derivatives(points[0], kind.along)
    residual = kind.residual(points[0], value, first, second)
    assert residual.abs().max() < 1e-9
    # On the sides it has the values that are given. Burgers' is an integral for t > 0, whose limit is given.
    sides = torch.cat(points[1:])
    torch.testing.assert_close(later(kind.exact)(sides), kind.given(sides).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", EQUATIONS)
def test_the_exact_solution_scores_as_one(kind: type[Equation]) -> None:
    assert max(solved_by(kind, later(kind.exact)).values()) < 1e-6


def test_burgers_solution_has_the_known_shock() -> None:
    """The slope at the origin at t = 0.5 is -152.005 (Basdevant et al. 1986, time 1.6037 / pi)."""
    x = torch.tensor([[0.0, 1.6037 / math.pi]]).double().requires_grad_()
    slope = torch.autograd.grad(Burgers.exact(x).sum(), x)[0][0, 0]
    assert float(slope) == pytest.approx(-152.00516, rel=1e-4)


@pytest.mark.parametrize("kind", [Helmholtz, Poisson])
def test_nothing_scores_as_nothing(kind: type[Equation]) -> None:
    found = solved_by(kind, nothing)
    assert found.pop("residual") == pytest.approx(1, rel=1e-4) and found.pop("error") == pytest.approx(1)
    assert set(found.values()) == {0.0}  # u = 0 has no error on the boundary
    size = math.sqrt(kind.anchors[next(iter(kind.faces))].nadir)
    wrong = solved_by(kind, lambda x: nothing(x) + size)  # what ignores the boundary
    assert [wrong[name] for name in kind.faces] == pytest.approx([1.0] * len(kind.faces), rel=0.02)


def test_nadirs_of_boundaries_whose_values_are_zero() -> None:
    """Poisson's is the mean square of the solution, Helmholtz's what `bomkern.anchors` says."""
    size = float(Poisson.exact(torch.rand(100_000, 2, dtype=torch.float64)).square().mean())
    assert [Poisson.anchors[name].nadir for name in Poisson.faces] == pytest.approx([size] * 4, rel=0.02)
    points = 2 * torch.rand(100_000, 2, dtype=torch.float64) - 1
    source = (1 - 17 * math.pi**2) * Helmholtz.exact(points)
    given = anchors.boundary(torch.zeros(4), scale=anchors.solution_scale(source, [2.0, 2.0]))
    assert Helmholtz.anchors["boundary"].nadir == pytest.approx(given.known["nadir"], rel=0.02)


def test_initial_values_that_never_change_have_the_residuals_nadir() -> None:
    found = solved_by(Burgers, lambda x: -torch.sin(math.pi * x[:, 0]))
    assert found["residual"] == pytest.approx(1, rel=1e-4)
    assert found["initial"] == pytest.approx(0, abs=1e-9) and found["boundary"] == pytest.approx(0, abs=1e-9)
    assert solved_by(Burgers, nothing)["initial"] == pytest.approx(1, rel=1e-4)


def test_points_lie_on_their_sides() -> None:
    inside, initial, boundary = Burgers(0, FAULTS["none"], 4).batch()
    assert inside[:, 0].abs().max() < 1 and inside[:, 0].min() < 0 and 0 < inside[:, 1].min() < inside[:, 1].max() < 1
    assert (initial[:, 1] == 0).all() and initial[:, 0].min() < 0 < initial[:, 0].max()
    assert boundary[:, 0].tolist() == [-1.0, 1.0] * (len(boundary) // 2)


# Tasks.


def trivial(data: Split) -> Tensor:
    """Return the outputs of 13 tasks that know frequencies and means alone."""
    shares = torch.cat([data.labels.bincount() / len(data.labels), (data.labels % 2).float().mean()[None]])
    row = torch.cat([torch.logit(shares), data.ink.mean()[None], data.pixels.mean(0)])
    return row.expand(len(data.labels), -1)


def test_a_trivial_predictor_has_the_nadirs_and_no_score() -> None:
    problem, data = Tasks13(0, FAULTS["none"], 4), digits()["train"]
    found = problem.named_deficits(problem.losses(trivial(data), data, data.pixels))
    assert list(found.values()) == pytest.approx([1.0] * 13, rel=1e-5)
    scores = problem.scores(trivial(data), data)
    odd = scores.pop("parity")  # half of the digits: to call all odd finds them all
    assert odd == pytest.approx(2 * 0.504 / 1.504, abs=1e-3) and max(scores.values()) < 1e-5
    three = Tasks3(0, FAULTS["none"], 4)
    out = torch.cat([data.labels.bincount().log(), torch.logit((data.labels % 2).float().mean())[None], torch.zeros(1)])
    found = three.named_deficits(three.losses(out.expand(len(data.labels), -1), data, data.pixels))
    assert list(found.values()) == pytest.approx([1.0] * 3, rel=1e-5)


def test_a_perfect_predictor_has_the_ideals_and_full_scores() -> None:
    data = digits()["test"]
    sure = 40 * torch.nn.functional.one_hot(data.labels, 10).float() - 20
    parity = 40 * (data.labels[:, None] % 2) - 20.0
    every: list[tuple[Tasks, Tensor]] = [
        (Tasks13(0, FAULTS["none"], 4), torch.cat([sure, parity, data.ink[:, None], data.pixels], 1)),
        (Tasks3(0, FAULTS["none"], 4), torch.cat([sure, parity, Tasks3.standard(data.ink)[:, None]], 1)),
    ]
    for problem, out in every:
        assert max(problem.named_deficits(problem.losses(out, data, data.pixels)).values()) < 1e-6
        assert list(problem.scores(out, data).values()) == [1.0] * len(problem.anchors)


def test_one_of_thirteen_tasks_starts_far_from_its_nadir() -> None:
    start = Tasks13(1, FAULTS["none"], 4)
    found = start.named_deficits(start.raw())
    assert found.pop("ink") > 60 and max(found.values()) < 10


def test_f1() -> None:
    found, true = torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])
    assert f1(found, true) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1(~true & true, true) == 0


# VICReg.


def test_the_probe_of_labels_is_perfect_and_that_of_nothing_finds_the_commonest() -> None:
    train, test = digits()["train"], digits()["test"]
    onehot = torch.nn.functional.one_hot
    assert (probe(onehot(train.labels), train.labels, onehot(test.labels)) == test.labels).all()
    blind = probe(torch.ones(1200, 3), train.labels, torch.ones(300, 3))
    assert (blind == train.labels.bincount().argmax()).all()


def test_vicregs_anchors_are_reached_by_known_embeddings() -> None:
    problem = VICReg(0, FAULTS["none"], 4)
    problem.model = nn.Sequential(nn.Linear(64, 1))  # the raw values are those of the function below
    torch.manual_seed(0)

    def found(function: Callable[[Tensor], Tensor]) -> dict[str, float]:
        problem.model = Known(function)
        return problem.named_deficits(problem.values(torch.zeros(2048, 64), problem.draw))

    apart = found(lambda x: torch.randn(len(x), EMBEDDING).double())  # B is 1024 here
    assert apart["invariance"] == pytest.approx(1, abs=0.05) and apart["variance"] == pytest.approx(0, abs=0.03)
    assert apart["covariance"] == pytest.approx(((EMBEDDING - 1) / 1023 - FLOOR) / 2, abs=0.02)
    alike = found(lambda x: torch.ones(len(x), EMBEDDING).double())
    assert alike["invariance"] == 0 and alike["variance"] == pytest.approx(0.99)


def test_views_are_moved_by_up_to_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = digits()["train"].pixels[:200]
    assert not torch.equal(*(view(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 1)))
    monkeypatch.setattr(vicreg, "NOISE", 0.0)
    monkeypatch.setattr(vicreg, "CONTRAST", 0.0)
    seen = view(pixels, torch.Generator().manual_seed(0)).view(200, 8, 8)
    wide = torch.nn.functional.pad(pixels.view(200, 8, 8), (1, 1, 1, 1))
    moves = torch.stack([wide[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], 1)
    same = (seen[:, None] == moves).all(3).all(2)
    assert same.any(1).all() and (same.sum(0) > 5).all()  # every view is a move, and every move is seen


# All.


@pytest.mark.parametrize("name", OTHERS)
def test_equal_weights_train_each_problem(name: str) -> None:
    problem = PROBLEMS[name](1, FAULTS["none"], 40)
    raw = problem.raw()
    again = problem.values_after_update()  # before any update
    assert list(raw) == list(problem.anchors) == list(again)
    for goal, value in raw.items():
        torch.testing.assert_close(value.detach(), again[goal])
    begin = problem.evaluate("validation")
    assert problem.measure.key in begin and begin["worst"] == max(begin["deficits"].values())
    for _ in range(40):
        deficits(problem, problem.raw()).mean().backward()
        problem.update()
    assert sum(problem.evaluate("validation")["deficits"].values()) < sum(begin["deficits"].values())
    assert (type(problem.optimizer) is torch.optim.SGD) == name.endswith("-sgd")


@pytest.mark.parametrize("name", OTHERS)
def test_faults_lift_the_goals_that_they_name(name: str) -> None:
    clean, blocked = PROBLEMS[name](0, FAULTS["none"], 4), PROBLEMS[name](0, FAULTS["floor"], 4)
    change = blocked.outside(blocked.raw()) - clean.outside(clean.raw())
    expected = [0.8 * (goal == clean.blocked) for goal in clean.anchors]
    assert change.tolist() == pytest.approx(expected, abs=1e-3)
    assert clean.drifting in clean.anchors and clean.drifting != clean.blocked


def test_the_averaged_weights_are_evaluated_and_training_goes_on_from_its_own() -> None:
    problem = Poisson(0, FAULTS["none"], 4)
    deficits(problem, problem.raw()).sum().backward()
    problem.update()
    trained = [p.detach().clone() for p in problem.parameters]
    for name, value in problem.average.items():
        value.fill_(0.0 if "weight" in name else 0.1)
    assert problem.evaluate("test")["deficits"]["top"] == pytest.approx(0.01 / Poisson.anchors["top"].nadir, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(trained, problem.parameters, strict=True))
