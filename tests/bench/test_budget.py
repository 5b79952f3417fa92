"""Test `python -m bench.budget`: its arms, draws and report, with a few steps each."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchjd")

from bench.budget import command, draws, owners, owners_report, report, results, run, variance
from bench.budget.arms import ARMS, EXACT
from bench.budget.visits import Visits
from bench.policies import command as policies
from bench.policies import peers
from bench.policies.digits import Digits
from bench.policies.faults import FAULTS
from bench.policies.problem import Anchor
from bench.policies.rules import anchored
from bomkern import GoalSet, Lazy, Spill


@pytest.mark.slow
def test_a_short_study_makes_the_page_and_goes_on(tmp_path: Path) -> None:
    runs = tmp_path / "out.jsonl"
    known = {**record("sum", "none", 20, 10.0, 0.9), "data": "digits"}
    runs.write_text(json.dumps(known) + '\n{"data": "dig')  # one run, and a line that was interrupted
    options = ["--data", "digits", "--seeds", "20", "--arms", "sum", "exact", "budget 2", "--workers", "1"]
    for _ in range(2):
        assert command.main([*options, "--steps", "8", "--runs", str(runs)]) == 0
        found = command.read(runs)
        assert len(found) == len(runs.read_text().splitlines()) - 1 == 3 * len(FAULTS)
    assert found[run.Job("digits", "none", 20, "sum")] == known
    for r in found.values():
        assert any(point[0] == r["steps"] for point in r["points"])
        assert r["points"][-1][1] >= r["clock"] or r["arm"] == EXACT or r is known
    assert "## Digits" in (tmp_path / "out.md").read_text() and (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_short_measurement_of_the_variance(tmp_path: Path) -> None:
    assert command.main(["--variance", "--data", "digits", "--steps", "2", "--runs", str(tmp_path / "out.jsonl")]) == 0
    found = json.loads((tmp_path / "out_variance.json").read_text())["digits"]
    assert len(found["goals"]) == 6 and set(found["ratios"]) == {"0.333", "0.5", "0.8"}
    assert "### Digits" in (tmp_path / "out.md").read_text() and (tmp_path / "out_variance.png").exists()


@pytest.mark.parametrize("data", ["digits", pytest.param("photographs", marks=pytest.mark.slow)])
def test_a_short_measurement_of_the_owners(data: str, tmp_path: Path) -> None:
    assert command.main(["--owners", "--data", data, "--steps", "8", "--runs", str(tmp_path / "out.jsonl")]) == 0
    found = json.loads((tmp_path / "out_owners.json").read_text())[data]
    assert list(found["stale"]) == ["epoch", "1"] if data == "digits" else ["1"]
    assert list(found["ages"]) == ["0", "1", "2"] and found["ages"]["0"]["same"] == [None, 1.0, None]
    page = (tmp_path / "out.md").read_text()
    assert ("no sample comes twice" in page) == (data == "photographs") and "| 1 step, the same batch |" in page


def test_long_runs_have_few_arms_under_faults_and_short_ones_all() -> None:
    jobs = list(command.jobs(["digits", "photographs"], (20, 21), list(ARMS)))
    faulty = {job.arm for job in jobs if job.data == "photographs" and job.fault != "none"}
    assert faulty == {"sum", "hard", EXACT, "budget 2"}
    peers = {name for name, arm in ARMS.items() if arm.peer}
    assert {job.arm for job in jobs if job.data == "digits" and job.fault == "drift"} == set(ARMS) - peers
    assert {job.arm for job in jobs if job.fault == "none"} == set(ARMS)
    assert len(jobs) == len(set(jobs))


@pytest.mark.parametrize(
    "argv, message", [(["--steps", "4"], "give them --runs FILE"), (["--arms", "budget 9"], "there are sum, hard")]
)
def test_bad_options_are_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(argv)
    assert message in capsys.readouterr().err


def test_lazy_goals_are_the_same_goals() -> None:
    problem = Digits(0, FAULTS["floor"], 4)
    other = copy.deepcopy(problem)
    raw, lazies = problem.raw(), other.lazy_raw()
    assert {name for name, x in lazies.items() if isinstance(x, Lazy)} == {"reconstruction", "realism"}
    for (name, x), y in zip(raw.items(), Lazy.tensors(list(lazies.values())), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_the_tuned_sum_is_the_best_of_the_committed_study() -> None:
    problem = Digits(0, FAULTS["none"], 8)
    runner = run.Runner(problem, "tuned sum")
    runs = [json.loads(line) for line in policies.RUNS.read_text().splitlines()]
    sums = [r for r in runs if r["data"] == "digits" and r["arm"].startswith("sum ") and r["seed"] == policies.TUNING]
    best = min(sums, key=lambda r: r["validation"]["worst"])
    torch.testing.assert_close(runner.arm.weights, peers.drawn(int(best["arm"][4:]), len(problem.anchors)))
    runner.advance(2)
    assert runner.step == 2


def test_the_judge_trains_on_the_rows_that_were_made() -> None:
    runner = run.Runner(Digits(0, FAULTS["none"], 8), "budget 1")
    seen: list[int] = []
    train = runner.problem._train_judge
    runner.problem._train_judge = lambda real, fake: (seen.append(len(fake)), train(real, fake))[1]  # type: ignore
    runner.advance(3)
    # Before the first step goals weigh alike, so each takes a sixth of the 64 samples.
    assert seen[0] == 11 and all(n < 64 for n in seen) and 0 < runner.walked < 0.6


# The draws.


def a_step() -> draws.Step:
    generator = torch.Generator().manual_seed(0)
    weights = Spill(0.5).weights(3).double()
    deficits = torch.rand(3, 12, generator=generator).double()
    norms = deficits.sqrt() + 0.1
    return draws.Step(weights, torch.tensor([9, 5, 1]), deficits, norms, norms.std(1), [1])


@pytest.mark.parametrize("method", draws.METHODS)
def test_every_way_to_draw_is_unbiased(method: str) -> None:
    """The mean of 20,000 draws is within 5 standard errors, so a bias of 30% in any row would be seen."""
    torch.manual_seed(0)
    step = a_step()
    drawn = draws.METHODS[method](step, 20000)
    if method == "calibrated":  # biased in the second order: its sum alone is exact
        torch.testing.assert_close(drawn.sum(2), step.weights.expand(20000, 3))
        full = step.weights * step.deficits.mean(1)
        torch.testing.assert_close((drawn * step.deficits).sum(2)[:, :2], full[:2].expand(20000, 2))
        return
    whole = (step.weights / 12)[:, None].expand(3, 12)
    error = drawn.std(0) / 20000**0.5
    assert ((drawn.mean(0) - whole).abs() <= 5 * error + 1e-9).all()
    assert (error < 0.04 * whole).all()


def test_chances_are_below_one_and_sum_to_the_count() -> None:
    chance = draws._chances(torch.tensor([[0.9, 0.05, 0.03, 0.02], [0.25] * 4]).double(), torch.tensor([2, 3]))
    torch.testing.assert_close(chance.sum(1), torch.tensor([2.0, 3.0]).double())
    torch.testing.assert_close(chance[0], torch.tensor([1, 0.5, 0.3, 0.2]).double())


def test_the_variance_is_that_of_a_goal_set() -> None:
    """Over 200 draws the error of the measured variance is some 8%; a row less for each goal adds 43%."""
    torch.manual_seed(0)
    problem = Digits(0, FAULTS["none"], 4)
    deficits = peers.deficits(problem, problem.raw()).T[:, :16]
    gradients = variance.gradients_of(deficits.flatten(), problem.parameters)
    goals = GoalSet(anchored(problem), spill=Spill(0.5, budget=1.5))
    weights = Spill(0.5).weights(6)
    values = {
        name: (d * (anchor.nadir - anchor.ideal) + anchor.ideal).detach().requires_grad_()
        for d, (name, anchor) in zip(deficits, problem.anchors.items(), strict=True)
    }
    scales = torch.tensor([anchor.nadir - anchor.ideal for anchor in problem.anchors.values()])
    whole = (weights / 16)[:, None].expand(6, 16).flatten() @ gradients
    distances = []
    for _ in range(200):
        goals.multipliers.copy_(weights)
        grads = torch.autograd.grad(goals(values).loss, list(values.values()))
        distances.append(((torch.stack(grads) * scales[:, None]).flatten() @ gradients - whole).square().sum())
    counts = variance.budget_of(problem, 0.5, 1.5).rows(weights, 16)
    gram = (gradients @ gradients.T).double()
    step = draws.Step(weights.double(), counts, deficits.detach().double(), *variance._sizes(gram, 6), [])
    assert variance.over_draws("nested", step, gram, 2000) == pytest.approx(
        float(torch.stack(distances).mean()), rel=0.25
    )


def test_the_variance_over_batches_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    mean, spread = torch.ones(3, 5).double(), 0.5
    gradients = mean + spread * torch.randn(400, 3, 5).double()
    products = torch.einsum("akp,blp->akbl", gradients, gradients)
    signal, found = variance.over_batches(products, torch.tensor([0.5, 0.3, 0.2]).double())
    assert signal == pytest.approx(5, rel=0.05)
    assert found == pytest.approx(spread**2 * 5 * (0.25 + 0.09 + 0.04), rel=0.15)


# The owners.


def test_a_fixed_owner_is_predicted_and_a_random_one_by_chance() -> None:
    torch.manual_seed(0)
    visited = {"fixed": Visits(20, 4), "random": Visits(20, 4)}
    for step in range(600):
        rows = torch.randint(20, (16,))
        visited["fixed"].add(step, step // 200, rows % 4, rows)
        visited["random"].add(step, step // 200, torch.randint(4, (16,)), rows)
    fixed, chance = visited["fixed"].found(), visited["random"].found()
    assert fixed["last"] == [1.0] * 3 and fixed["chance"] == pytest.approx([0.25] * 3, abs=0.02)
    assert fixed["common"] == pytest.approx([0.25] * 3, abs=0.05)
    assert chance["last"] == pytest.approx(chance["chance"], abs=0.05)
    assert fixed["age"] == pytest.approx([1 / (1 - 0.95**16)] * 3, rel=0.1)  # the mean wait of a sample


def test_the_gradient_of_true_owners_is_that_of_a_goal_set_and_needs_no_trust() -> None:
    problem = Digits(0, FAULTS["none"], 4)
    problem.anchors = {**problem.anchors, "realism": Anchor(0.5, 0.64)}  # as bad as reconstruction
    batches = owners.note(problem, 3, Visits(problem.samples, 6))
    assert len(torch.cat([b.owners for b in batches]).unique()) > 1
    image, noise, owner, _ = batches[0]
    out = GoalSet(anchored(problem))(problem.forward(image, torch.Generator().manual_seed(noise))[0])
    assert torch.equal(out.bottleneck, owner)
    same = owners.trust(problem, batches, [b.owners for b in batches])
    assert same["one"] == [1.0] * 3 and same["gap"] == [0.0] and len(set(same["expected"])) == 1
    assert owners_report.bias(same["expected"])[:3] == pytest.approx((0, 1, 0))
    other = owners.trust(problem, batches, [(b.owners + 1) % 6 for b in batches])
    assert other["gap"][0] > 0.1 and owners_report.bias(other["one"]).off > 0.1


def test_the_products_of_expected_gradients_are_without_bias() -> None:
    """Products of 4,000 sets of 3 noisy batches have those of the means as their mean, within 5%."""
    torch.manual_seed(0)
    true, stale = torch.ones(4), torch.tensor([1.0, 1.0, 0.5, 0.0])
    noise = torch.randn(4000, 3, 1, 4)
    found = [owners.products(true + each[:, 0], stale + each[:, 0])[1] for each in noise]
    assert torch.stack(found).mean(0).tolist() == pytest.approx([4, 2.25, 2.5], rel=0.05)


# The report.


def record(arm: str, fault: str, seed: int, psnr: float, worst: float, pace: float = 1.0) -> dict[str, Any]:
    """Return a run of 100 steps that gains a dB and 0.1 in each further 100; a step takes ``pace`` seconds."""
    points = [[step, step * pace, step * pace, psnr + (step - 100) / 100, worst - (step - 100) / 1000]
              for step in range(50, 251, 50)]  # fmt: skip
    job = run.Job("photographs", fault, seed, arm)
    return {**job._asdict(), "steps": 100, "clock": 100.0, "points": points, "deficits": {}, "walked": 0.5}


def test_figures_at_equal_steps_and_at_equal_time() -> None:
    fast = record("budget 2", "none", 1, 15.0, 0.5, pace=0.5)
    assert results.at_steps(results.PSNR)(fast) == 15.0 and results.at_steps(results.WORST)(fast) == 0.5
    assert results.at_time(results.PSNR)(fast) == 16.0 and results.at_time(results.WORST)(fast) == 0.4
    assert results.milliseconds(fast) == 500 and results.speed(fast) == 2


@pytest.mark.parametrize("loss, met", [(0.05, True), (0.15, False)])
def test_the_page_says_what_was_asked_for_and_whether_it_is_met(tmp_path: Path, loss: float, met: bool) -> None:
    lines = []
    for seed in (20, 21, 22):
        lines += [record(EXACT, fault, seed, 15.0 + seed, 0.5) for fault in ("none", "drift")]
        lines += [record("budget 2", "none", seed, 15.0 + seed, 0.5, 0.5)]
        lines += [record("budget 2", "drift", seed, 15.0 + seed - loss, 0.51, 0.5)]
    page = report.write(lines, {}, tmp_path / "out")
    assert page == (tmp_path / "out.md").read_text()
    assert f"at least {-loss:+.2f} dB from exact (drift), worst goal at most +0.010 (drift)" in page
    assert ("are asked for: missed" in page) != met
    assert "at equal time: PSNR +1.00 dB from exact, worst goal -0.100. At least +0.3 dB" in page
    assert f"| {-loss:+.2f} / +0.010 |" in page and "| 37.00, +1.00 (+1.00, +1.00) |" in page
    assert (tmp_path / "out.png").stat().st_size > 10_000
