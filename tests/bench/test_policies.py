"""Test `python -m bench.policies`: its problems, arms, measures and report, with a few steps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchjd")
from torchjd.aggregation import UPGrad

from bench.policies import balancers, command, costs, gradients, peers, readme, report, results, run, toy
from bench.policies.arms import ARMS, BRIGHT, DEFAULT, EQUAL, TUNED
from bench.policies.digits import Digits
from bench.policies.faults import DRIFT_FROM, FAULTS, lift
from bench.policies.overview import Overview
from bench.policies.problems import LONG, PROBLEMS
from bench.policies.results import Results
from bench.policies.rules import Arm
from bench.readme import README, put


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.fits(Digits)])
def test_every_arm_trains(name: str) -> None:
    arm, probes = ARMS[name].make("digits"), name.startswith("probed")
    found = run.train(Digits(0, FAULTS["none"], 100 if probes else 4), arm)
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-4)
    assert 0 <= found["entropy"] <= 1 + 1e-6
    assert 4 < found["test"]["psnr"] < 30 and found["test"]["worst"] == max(found["test"]["deficits"].values())
    assert found["probes"] == arm.spent and (0 < arm.spent <= 100 / 4 if probes else arm.spent == 0)


def test_seeds_are_paired() -> None:
    """Every arm gets the same batches and the same initial model."""

    def images(arm: Arm) -> torch.Tensor:
        problem = Digits(3, FAULTS["none"], 4)
        seen = []
        arm.start(problem)
        for _ in range(4):
            arm.backward(problem, problem.raw())
            seen.append(problem.image)
            problem.update()
            arm.after(problem)
        return torch.stack(seen)

    first = images(peers.Weighted())
    several = gradients.JacobianDescent(UPGrad)
    for arm in (balancers.FastAdaptive(), peers.Half(), several, ARMS[DEFAULT].make("digits")):
        assert torch.equal(images(arm), first)


def test_faults_lift_what_they_say_and_evaluation_does_not_see_it() -> None:
    assert lift(FAULTS["drift"], DRIFT_FROM) == (0, 0) and lift(FAULTS["drift"], 1.0)[0] == pytest.approx(1.5)
    clean, blocked = Digits(0, FAULTS["none"], 4), Digits(0, FAULTS["floor"], 4)
    difference = {n: (blocked.raw()[n] - x).mean() for n, x in clean.raw().items() if n == "decorrelation"}
    anchor = Digits.anchors["decorrelation"]
    assert difference["decorrelation"].item() == pytest.approx(0.8 * (anchor.nadir - anchor.ideal), rel=0.05)
    assert clean.evaluate("test")["deficits"] == blocked.evaluate("test")["deficits"]


def test_starvation_is_neglect_that_hurts() -> None:
    def longest(share: float, deficits: list[float], other: float) -> float:
        seen = run.Starvation(2)
        for d in deficits:
            seen.add(torch.tensor([share, 1 - share]), torch.tensor([d, other]))
        return seen.longest

    rising = np.linspace(0.5, 1.5, 100).tolist()
    assert longest(0.0, rising, 1.0) > 50
    assert longest(0.2, rising, 1.0) == 0  # the goal gets gradient
    assert longest(0.0, rising[::-1], 1.0) == 0  # the goal improves
    assert longest(0.0, [x / 10 for x in rising], 1.0) == 0  # the goal is well off beside the other


def test_the_fault_that_locks_a_run_is_reported() -> None:
    problem = Digits(0, FAULTS["floor"], 200)
    arm = ARMS["anchored"].make("digits")
    run.train(problem, arm)
    assert run.reported(problem, arm) is not None
    calm = Digits(0, FAULTS["floor"], 200)
    calm.blocked = "consistency"  # pretend that another goal is at fault
    assert run.reported(calm, arm) is None


@pytest.mark.slow
@pytest.mark.parametrize("data", ["burgers", "vicreg-sgd"])
def test_every_arm_that_fits_trains_on_other_problems(data: str) -> None:
    kind = PROBLEMS[data]
    for name, arm in ARMS.items():
        if arm.fits(kind):
            found = run.train(kind(0, FAULTS["none"], 100 if name.startswith("probed") else 3), arm.make(data))
            assert sum(found["share"].values()) == pytest.approx(1, abs=1e-4), name
            assert 0 < found["test"][kind.measure.key] < 2, name


def test_a_run_ends_before_a_step_that_is_not_finite() -> None:
    problem = PROBLEMS["poisson"](0, FAULTS["none"], 6)
    raw = problem.raw
    problem.raw = lambda: {name: x * (torch.nan if problem.step == 2 else 1) for name, x in raw().items()}  # type: ignore
    assert run.train(problem, peers.Weighted())["diverged"] == 2
    with torch.no_grad():
        problem.average["layers.0.weight"].fill_(torch.nan)
    held = problem.evaluate("test")
    assert held["worst"] == np.inf and problem.measure.of(held) == np.inf


def test_an_arm_gets_the_time_of_equal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 3)
    monkeypatch.setattr(costs, "BLOCK", 4)
    found = costs.measure("tasks13", ["UPGrad"])
    assert 1.2 < found["UPGrad"] < 20  # thirteen gradients in place of one
    made = run.run(run.Job("tasks13", "none", EQUAL, 1), steps=8, cost=4.0)
    assert made["steps"] == 2 and made["backward_ms"] < made["step_ms"]


def test_arms_run_where_they_fit_and_faults_where_they_mean_something() -> None:
    def ran(data: str) -> set[tuple[str, str]]:
        return {(job.arm, job.fault) for job in command.jobs(data, (1,), {TUNED: "sum 3", BRIGHT: "sum 4"})}

    pairs = {data: ran(data) for data in PROBLEMS}
    assert {data for data in PROBLEMS if ("VQGAN", "none") in pairs[data]} == {"digits"}
    assert {data for data in PROBLEMS if ("gradient norms", "none") in pairs[data]} == set(LONG) - {"photographs"}
    assert {fault for _, fault in pairs["burgers"]} == {"none", "drift", "floor"}
    assert {fault for _, fault in pairs["tasks3-sgd"]} == {"none"}
    assert ("sum 3", "floor") in pairs["tasks3"] and ("sum 4", "floor") not in pairs["tasks3"]
    assert ("sum 3", "floor") not in pairs["burgers"] and ("spill auto", "floor") in pairs["burgers"]
    assert ("STCH", "floor") in pairs["tasks13"] and ("STCH", "floor") not in pairs["burgers"]


@pytest.mark.slow
def test_a_short_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"data": "tas')  # an interrupted line
    argv = ["--data", "tasks3", "--arms", EQUAL, DEFAULT, "--seeds", "1", "--steps", "4", "--runs", str(path)]
    assert command.main([*argv, "--workers", "1"]) == 0
    assert {job.arm for job in command.read(path)} == {EQUAL, DEFAULT}
    assert "## 3 tasks" in capsys.readouterr().out


def test_quick_looks_do_not_go_where_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--steps", "4"])
    assert "give them --runs FILE" in capsys.readouterr().err


def record(arm: str, seed: int, psnr: float, worst: float, fault: str = "none") -> dict[str, Any]:
    held = {"psnr": psnr, "worst": worst, "ssim": 0.5, "kl": 1.0, "active": 0.5}
    more = {"entropy": 0.5, "starvation": 0.0, "backward_ms": 1.0, "step_ms": 2.0}
    return {**run.Job("digits", fault, arm, seed)._asdict(), "validation": held, "test": held, **more}


def test_the_tuned_sums_are_the_best_of_the_random_ones(tmp_path: Path) -> None:
    lines = [record(f"sum {n}", command.TUNING, 10 + n / 10, 0.5 + abs(n - 12) / 10) for n in range(peers.SUMS)]
    path = tmp_path / "runs.jsonl"
    # a file whose last line was interrupted
    path.write_text("\n".join(map(json.dumps, lines[:-1])) + '\n{"data": "dig')
    assert command.picks(command.read(path), "digits") == {}
    path.write_text("\n".join(map(json.dumps, lines)))
    # The worst goal picks number 12. PSNR picks the last arm that leaves no goal worse than no training.
    assert command.picks(command.read(path), "digits") == {TUNED: "sum 12", BRIGHT: "sum 16"}


def test_the_report_gives_paired_differences_and_verdicts(tmp_path: Path) -> None:
    lines = [record(f"sum {n}", command.TUNING, 15.0, 0.6) for n in range(peers.SUMS)]
    for seed in (1, 2, 3):
        lines += [record("sum 4", seed, 15 + seed, 0.6), record(DEFAULT, seed, 16 + seed, 0.4)]
        lines += [record("auto", seed, 10 + seed, 2.0), record(DEFAULT, seed, 15 + seed, 0.5, "floor")]
        lines += [{**record("auto", seed, 9 + seed, 2.0, "floor"), "reported": 7 if seed < 3 else None}]
    records = {run.Job(*(line[field] for field in run.Job._fields)): line for line in lines}
    page = report.write(records, {"digits": {TUNED: "sum 4"}}, (1, 2, 3), command.TUNING, tmp_path / "out")
    assert page == (tmp_path / "out.md").read_text()
    assert "PSNR, dB +1.00 (+1.00, +1.00) (more is better), worst goal -0.200" in page
    assert "It dominates 30 of the 30 random sums, and 0 dominate it." in page
    assert "none +6.0, floor +6.0" in page and "| 2 of 3, 7 steps |" in page
    for name in ("front", "faults"):
        assert (tmp_path / f"out_{name}.png").stat().st_size > 10_000


def results_of(data: str, figures: dict[str, list[tuple[float, float]]]) -> Results:
    """Return runs with a measure and a worst goal of each seed, by arm."""
    key = PROBLEMS[data].measure.key
    lines = [
        {**run.Job(data, "none", arm, seed)._asdict(), "test": {key: good, "worst": bad}}
        for arm, pairs in figures.items()
        for seed, (good, bad) in enumerate(pairs)
    ]
    return Results(data, lines, {TUNED: "sum 4"}, (0, 1), command.TUNING)


def test_the_readme_shows_the_committed_runs() -> None:
    runs = command.read(command.RUNS)
    tuned = {data: command.picks(runs, data) for data in PROBLEMS}
    part = readme.table(report.sets_of(runs, tuned, command.SEEDS, command.TUNING))
    text = README.read_text()
    assert put(text, readme.COMMAND, part) == text, "run python -m bench.policies --report"


def test_the_readme_names_the_best_peer_and_what_was_not_measured() -> None:
    good, bad = [(0.9, 0.1)] * 2, [(0.5, 0.5)] * 2
    sets = {"tasks3": results_of("tasks3", {DEFAULT: good, EQUAL: bad, "UPGrad": [(0.7, 0.3)] * 2, "sum 4": bad})}
    part = readme.table(sets)
    assert "| 0.500 / 0.50 | 0.500 / 0.50 |  | UPGrad: 0.700 / 0.30 | 0.900 / 0.10 |" in part
    assert "among the 3 rules that fit all of them: bomkern 1.0 (1.0 by the measure, 1.0 by the worst goal)" in part
    assert "equal weights 3.0 (3.0 by the" in part and "published balancer of these, UPGrad 2.0 (2.0 by" in part
    assert "better on 3 tasks; worse on none; undecided on none" in part and "no lower, on 1 of 1: 3 tasks." in part
    assert "Not measured yet: Digits, Photographs, Helmholtz, Burgers, Poisson, 13 tasks, VICReg." in part
    assert "at equal updates" in part


def test_ranks_and_wins_over_problems() -> None:
    """Errors are better if smaller, scores if larger, and the two optimizers of the tasks count as one problem."""
    low, high, mid = [(0.1, 0.1)] * 2, [(0.9, 0.9)] * 2, [(0.5, 0.5)] * 2
    tasks = {DEFAULT: [(0.9, 0.1)] * 2, EQUAL: [(0.5, 0.5)] * 2, "UPGrad": [(0.5, 0.5)] * 2, "sum 4": mid}
    found = Overview(
        {
            "poisson": results_of(
                "poisson", {DEFAULT: low, EQUAL: high, "UPGrad": mid, "SoftAdapt": high, "sum 4": low}
            ),
            "tasks3": results_of("tasks3", tasks),
            "tasks3-sgd": results_of("tasks3-sgd", {**tasks, DEFAULT: [(0.1, 0.9)] * 2}),
        }
    )
    assert set(found.field) == {DEFAULT, EQUAL, "UPGrad"}
    assert [r.tolist() for r in found.ranks(DEFAULT, "main")] == [[1, 1], [2, 2]]
    assert [r.tolist() for r in found.ranks(EQUAL, "worst")] == [[3, 3], [2, 2]]
    assert found.mean_rank("UPGrad").tolist() == [2, 2]
    assert found.mean_rank("SoftAdapt").tolist() == [3.5, 3.5]  # as bad as the worst of the three
    assert found.ahead(DEFAULT, EQUAL) == (1, 2)  # level on the tasks, over both optimizers
    assert found.level(DEFAULT, EQUAL) == (2, 2) and found.level(EQUAL, DEFAULT) == (1, 2)
    assert (
        found.verdicts(DEFAULT, EQUAL)["poisson"] == "better" and found.verdicts(EQUAL, DEFAULT)["poisson"] == "worse"
    )
    assert found.winning(DEFAULT, EQUAL) == ["poisson"]
    assert found.ahead(DEFAULT, TUNED) == (0, 2)


def test_a_divergence_is_the_worst_there_is_and_is_named() -> None:
    found = results_of("tasks3", {DEFAULT: [(0.9, 0.1), (0.9, 0.1)], EQUAL: [(float("nan"), np.inf), (0.9, 0.1)]})
    assert results.cell(found.values(EQUAL, "none", found.main), 2) == "diverged"
    assert results.mean(found.values(EQUAL, "none", results.worst), 2) == "diverged"
    assert found.better(DEFAULT, EQUAL).tolist() == [np.inf, 0]


def test_runs_of_other_seeds_are_shown_until_there_are_new_ones() -> None:
    old = [record(EQUAL, 10, 15.0, 0.5)]
    assert Results("digits", old, {}, (30, 31), command.TUNING).seeds == (10,)
    assert Results("digits", [*old, record(EQUAL, 31, 15.0, 0.5)], {}, (30, 31), command.TUNING).seeds == (30, 31)


def test_the_toy_says_which_starts_reach_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy.Toy, "rate", 0.05)
    assert toy.gap(toy.front()[100]) == 0 and toy.gap(toy.front()[100] + 0.1) == pytest.approx(0.1, abs=0.01)
    runs = [toy.run((EQUAL, 3, 300)), toy.run((EQUAL, 0, 20))]
    assert [r["reached"] for r in runs] == [True, False] and runs[0]["path"][0] == list(toy.STARTS[3])
    toy.draw(runs, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    assert toy.section(tmp_path / "toy") == []
    (tmp_path / "toy.json").write_text(json.dumps([{k: v for k, v in r.items() if k != "path"} for r in runs]))
    assert "reached the front: sum 1." in toy.section(tmp_path / "toy")[1]


def test_intervals_hold_the_mean() -> None:
    mean, low, high = report.interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and 1 <= low < 2 < high <= 3
    assert all(np.isnan(report.interval(np.array([]))))
