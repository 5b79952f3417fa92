"""Test `python -m bench.policies`: its problems, arms, measures and report, with a few steps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchjd")

from bench.policies import command, peers, report, run
from bench.policies.arms import ARMS, BRIGHT, DEFAULT, TUNED
from bench.policies.digits import Digits
from bench.policies.faults import DRIFT_FROM, FAULTS, lift
from bench.policies.rules import Arm


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(name: str) -> None:
    found = run.train(Digits(0, FAULTS["none"], 200 if name == "probed" else 4), ARMS[name].make("digits"))
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-4)
    assert 0 <= found["entropy"] <= 1 + 1e-6
    assert 4 < found["test"]["psnr"] < 30 and found["test"]["worst"] == max(found["test"]["deficits"].values())
    assert found["probes"] == (180 if name == "probed" else 0)


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
    for arm in (peers.FastAdaptive(), peers.Half(), peers.JacobianDescent(), ARMS[DEFAULT].make("digits")):
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
    assert "PSNR +1.00 (+1.00, +1.00) dB, worst goal -0.200" in page
    assert "It dominates 30 of the 30 random sums, and 0 dominate it." in page
    assert "none +6.0, floor +6.0" in page and "| 2 of 3, 7 steps |" in page
    for name in ("front", "faults"):
        assert (tmp_path / f"out_{name}.png").stat().st_size > 10_000


def test_intervals_hold_the_mean() -> None:
    mean, low, high = report.interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2 and 1 <= low < 2 < high <= 3
    assert all(np.isnan(report.interval(np.array([]))))
