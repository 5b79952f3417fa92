"""Test the regimes of bench inputs: how they are drawn, timed and reported."""

from __future__ import annotations

import importlib
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, compare, harness, machine, regimes, rounds
from bench.ops import (
    bench_gaussian_kl,
    bench_goal_set,
    bench_guard,
    bench_min_goal,
    bench_total_correlation,
)
from bench.report import page, worst, write
from bench.results import USUAL, Results, read
from bomkern import min_goal_loss
from tests.support.bench_results import MACHINE, made, results, row

CASES = [cases.find(op, label) for op, benches in cases.OPS.items() for label in benches.shown]
GOAL_CASES = [*bench_min_goal.CASES.values(), *bench_goal_set.CASES.values()]
CODE_CASES = [case for case in CASES if case.op not in ("min_goal", "goal_set")]
EACH = [
    *((case, {"K": 9, "B": 64}, regime) for case in GOAL_CASES for regime in (case.usual, *case.regimes)),
    *((case, {"B": 48, "D": 32}, regime) for case in CODE_CASES for regime in (case.usual, *case.regimes)),
]
IDS = [f"{case.name}-{regime}" for case, _, regime in EACH]
BOTH = "forward+backward"


@pytest.mark.parametrize(("case", "size", "regime"), EACH, ids=IDS)
def test_ours_is_right_in_every_regime(case: harness.Case, size: dict[str, int], regime: str) -> None:
    key = tuple(size.items())
    x = harness.inputs(case, key, regime)
    for t in x:
        assert t.isfinite().all() and t.requires_grad and t.is_leaf and t.device.type == machine.DEVICE
        assert t.dtype is (torch.bfloat16 if regime == regimes.HALF else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(x, case.make(regime, **size), strict=True))
    harness.check(case, harness.peer(case, harness.OURS, key, regime), key, True, regime, harness.OURS)


@pytest.mark.parametrize(("case", "size", "regime"), EACH, ids=IDS)
def test_eager_is_right_where_scores_do_not_vanish(case: harness.Case, size: dict[str, int], regime: str) -> None:
    key = tuple(size.items())
    if regime in ("far beyond", "one hopeless"):
        with pytest.raises(harness.Wrong, match="off by inf"):
            harness.check(case, case.plain, key, True, regime)
    else:
        harness.check(case, case.plain, key, True, regime)


def test_every_regime_has_its_words() -> None:
    assert set(worst.WORDS) == {*USUAL.values(), *regimes.CODES, *regimes.GOALS}
    assert {case.op for case in (*GOAL_CASES, *CODE_CASES)} == set(USUAL)
    with pytest.raises(KeyError):
        regimes.codes("purple", 4, 4)
    with pytest.raises(KeyError):
        regimes.goals("purple", bench_min_goal.ANCHORED, 4)


def test_codes_of_a_run_at_other_sizes() -> None:
    """Rows beyond those kept are drawn from the same posteriors. Columns beyond those kept are no copies."""
    few, many = ([x.detach() for x in regimes.codes("step 1000", B, 128)] for B in (regimes.ROWS, 2 * regimes.ROWS))
    first, again = many[1].split(regimes.ROWS)
    logvar = many[2][: regimes.ROWS]
    assert torch.equal(few[2], logvar) and torch.equal(first, few[1])
    moved = (again - first) * torch.exp(-logvar / 2)
    assert moved.std().item() == pytest.approx(1, rel=0.02) and moved.mean().abs() < 0.02
    left, right = regimes.codes("step 100", 512, 256)[1].chunk(2, 1)
    assert not torch.equal(left, right) and torch.equal(left.sort(0).values, right.sort(0).values)
    for step in regimes.STEPS:
        assert (regimes.DATA / f"step_{step}.npz").stat().st_size < 300_000


def test_separated_codes_lie_ten_deviations_apart() -> None:
    _, mu, logvar = regimes.codes("separated", 512, 16)
    with torch.no_grad():
        away = (mu[:, 0, None] - mu[:, 0]) * torch.exp(-logvar[:, 0] / 2)
    places = (away / regimes.APART).round()
    assert places.abs().max() >= regimes.PLACES - 1
    spread = (away - regimes.APART * places)[places == 0].std().item()
    assert spread == pytest.approx(regimes.SPREAD * 2**0.5, rel=0.25)  # the tails lie in the neighbouring places


@pytest.mark.parametrize("deficit", [0.0, 1e-6, 0.3, 5.0, 40.0])
def test_a_raw_value_has_its_deficit(deficit: float) -> None:
    given = torch.tensor([deficit], dtype=torch.float64)
    for constraint in (*bench_min_goal.ANCHORED, *bench_min_goal.MIXED):
        loss = min_goal_loss([regimes.raw(constraint, given)], [constraint], impl="reference")
        assert loss.item() == pytest.approx(deficit, rel=1e-9, abs=1e-15)


def test_goals_tie_exactly_or_not_at_all() -> None:
    """Goals are either equal or clearly apart.

    Near ties would let rounding decide who gets the gradient, and the check would reject a correct peer.
    """
    for regime, constraints in itertools.product(regimes.GOALS, (bench_min_goal.ANCHORED, bench_min_goal.MIXED)):
        raw = [x.detach().double() for x in regimes.goals(regime, constraints, 2000)]
        pairs = zip(raw, constraints, strict=True)
        deficits = [min_goal_loss([x], [c], reduction="none", impl="reference") for x, c in pairs]
        first, second = torch.stack(deficits).topk(2, 0).values
        if regime == "all tied":
            assert torch.equal(first, second) and first.min() > 0
        elif regime != regimes.HALF:
            assert ((first - second) / first).min() > 0.01
        else:
            assert ((first - second) / first < 0.01).float().mean() < 0.05


def test_a_peer_that_is_wrong_in_a_regime_is_noted_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "WRONG", [])
    case, size = bench_min_goal.CASES["anchored"], {"K": 9, "B": 64}
    with pytest.raises(pytest.skip.Exception, match="eager is wrong here"):
        harness.measure(None, case, "eager", size, BOTH, "far beyond")
    told = harness.WRONG.pop()
    assert told.pop("wrong").startswith("a value is off by inf")
    where = {"direction": BOTH, "peer": "eager", "size": size, "regime": "far beyond"}
    assert told == {"op": "min_goal", "case": "min_goal anchored", **where}
    off = replace(case, ours=lambda *x, impl=None: case.ours(*x, impl=impl) * (1 if impl else 1.001))
    with pytest.raises(harness.Wrong):  # our result must be right in every regime
        harness.measure(None, off, "bomkern", size, BOTH, "far beyond")
    off = replace(case, plain=lambda *x: case.plain(*x) * 1.001)
    with pytest.raises(harness.Wrong):  # every peer must be right in the usual regime
        harness.measure(None, off, "eager", size, BOTH)
    assert not harness.WRONG


def test_halves_have_their_own_tolerance() -> None:
    case, key = bench_gaussian_kl.CASE, (("B", 64), ("D", 8))

    def off(by: float) -> Any:
        return lambda mu, logvar: case.plain(mu.float(), logvar.float()) * (1 + by)

    harness.check(case, off(0.02), key, True, regimes.HALF)
    for by, name in ((0.02, harness.OURS), (0.2, "eager")):
        with pytest.raises(harness.Wrong):
            harness.check(case, off(by), key, True, regimes.HALF, name)


@pytest.mark.parametrize("call", [1e-6, 1e-4, 5e-3, 0.1, 0.4, 3.0])
def test_other_regimes_are_brief(call: float) -> None:
    calls, times = rounds.planned(call, brief=True)
    assert times == (1 if call > rounds.SLOW else 2) if call > rounds.BRIEF else times >= 3
    assert times <= 3 or calls * times * call <= 1.01 * rounds.BRIEF


def benches(test: Any) -> list[tuple[dict[str, int], str, str, str]]:
    """Return the sizes and regimes with which `harness.sizes_and` parametrised a test."""
    return next(mark.args[1] for mark in test.pytestmark if "regime" in mark.args[0])


@pytest.mark.parametrize("case", write.SHOWN)
def test_what_the_readme_shows_is_benched_in_every_regime(case: str) -> None:
    module: Any = importlib.import_module(f"bench.ops.bench_{case.split()[0]}")
    made = benches(module.test_peers)
    made += benches(module.test_large) if case == "total_correlation" else []
    asked = regimes.GOALS if "goal" in case else regimes.CODES
    for batch in write.SHOWN[case]:
        for regime in ("", *asked):
            found = {n for size, r, d, n in made if size["B"] == batch and r == regime and d == BOTH}
            assert found >= set(harness.COMPARED), (batch, regime)
    other = [size["B"] for size, regime, direction, _ in made if regime and direction == BOTH]
    assert set(other) == set(write.SHOWN[case])


def in_regimes(**times: dict[str, Any]) -> Results:
    """Return gaussian_kl results at B = 512 in several regimes.

    ``times`` holds the seconds of each peer, or None where its result was wrong.
    """
    rows = []
    for regime, peers in times.items():
        for peer, seconds in peers.items():
            told = row("gaussian_kl", peer, seconds or 1.0, B=512, D=128) | {"regime": regime.replace("_", " ")}
            if seconds is None:
                told = {n: told[n] for n in ("op", "case", "direction", "peer", "size", "regime")} | {"wrong": "by 2"}
            rows.append(told)
    ours = {regime: peers["bomkern"] for regime, peers in times.items()}
    turns = worst.as_info(ours)
    rows.append(row("gaussian_kl", "bomkern", 1.0, worst.TURNS, B=512, D=128) | turns)
    return Results(MACHINE, "2026-01-02", "pytest bench/ --benchmark-only", rows)


SEEN = in_regimes(
    busy_and_idle={"bomkern": 1e-4, "eager": 9e-4, "torch.compile": 3e-4, "KeOps": 1e-2},
    sharp={"bomkern": 1.4e-4, "eager": 7e-4, "torch.compile": 2.8e-4},
    normal={"bomkern": 1.1e-4, "eager": 8.8e-4, "torch.compile": None},
    half={"bomkern": 0.5e-4, "eager": 9e-4, "torch.compile": 0.9e-4},
)


def test_the_worst_regime_is_what_is_shown() -> None:
    (found,) = worst.by_case(SEEN, "gaussian_kl", BOTH).values()
    assert found.where == "sharp" and found.slowest["seconds"] == 1.4e-4
    assert found.spread == pytest.approx(1.4)  # half precision does not count
    assert found.least["eager"] == (pytest.approx(5), "sharp")
    assert found.least["torch.compile"] == (pytest.approx(1.8), "half")
    assert found.least["KeOps"] == (pytest.approx(100), "busy and idle")
    table = write.readme_table(SEEN)
    assert "| `gaussian_kl`, B = 512 | 140 us | **1.40x** | 5.0x | 1.8x | 100x | sharp |" in table
    assert "In bold: more than the 1.3x that is allowed." in table
    text = page.page([SEEN])
    for line in (
        *("| bomkern | 140 us |", "| slowest / fastest | **1.40x** |", "| slowest regime | sharp |"),
        *("| worst regime | sharp |", "| gaussian_kl | B = 512, D = 128 | **1.40x** | sharp |"),
        "| B = 512, D = 128 | busy and idle | 100 us | 9.0x | 3.0x |",  # KeOps was measured in one regime only
        "| B = 512, D = 128 | normal | 110 us | 8.0x | wrong |",
    ):
        assert line in text
    held = in_regimes(busy_and_idle={"bomkern": 1e-4}, sharp={"bomkern": 1.2e-4}, half={"bomkern": 1e-5})
    assert "The limit holds everywhere." in " ".join(page.page([held]).split()) and "**" not in write.readme_table(held)
    assert worst.spread({"normal": 1.0, "sharp": 1.5, "half": 2.0}) == (1.5, "sharp")
    assert worst.spread({"normal": 1.0, "half": 1.5}) is None and worst.as_info({"half": 1.0}) == {}


def test_what_is_wrong_is_kept_and_never_a_time(tmp_path: Path) -> None:
    again = read([made(tmp_path / "run.json", SEEN)])
    again.save(tmp_path / "kept.json")
    for found in (again, read([tmp_path / "kept.json"])):
        (wrong,) = [one for one in found.rows if "wrong" in one]
        assert wrong["peer"] == "torch.compile" and "seconds" not in wrong
        assert page.page([found]) == page.page([SEEN])
        assert found.groups()["gaussian_kl forward+backward B=512 D=128 in normal"].keys() == {"bomkern", "eager"}


def test_results_from_before_there_were_regimes_are_of_the_usual_one() -> None:
    old = results()
    assert all("regime" not in one for one in old.rows)
    assert "Kinds of data" not in page.page([old]) and "**" not in write.readme_table(old)
    sizes = old.regimes("gaussian_kl", BOTH).values()
    assert all(list(regime) == ["busy and idle"] for regime in sizes)
    new = Results(MACHINE, "", "", [{**one, "regime": USUAL.get(one["op"])} for one in old.rows])
    assert new.groups().keys() == old.groups().keys() and compare.compare(old, [new])[1]


def test_the_guard_holds_the_worst_regime_and_the_spread() -> None:
    def run(pair: float, spread: float) -> Results:
        told = row("gaussian_kl", "bomkern", 1.0, "forward+backward in pairs", B=64, D=2)
        more = {"pair": pair, "worst": "sharp", "spread": spread, "slowest": "sharp"}
        return Results(MACHINE, "", "", [told | more])

    old = run(5.0, 1.1)
    del old.rows[0]["spread"], old.rows[0]["slowest"]
    assert compare.compare(old, [run(4.9, 1.2)])[1] and not compare.compare(old, [run(4.0, 1.2)])[1]
    lines, fine = compare.compare(old, [run(5.0, 1.6), run(5.0, 1.4)])
    assert not fine and re.match(r"1\.40x between kinds of data, slowest in sharp: .*MORE than 1\.3x", lines[-1])
    assert compare.compare(old, [run(5.0, 1.6), run(4.0, 1.2)])[1]  # the best run of each peer counts
    del old.rows[0]["worst"]  # a baseline of the usual regime is no bound for the worst one
    assert compare.compare(old, [run(4.0, 1.2)])[1] and not compare.compare(old, [run(2.4, 1.2)])[1]


def test_the_guard_takes_eager_where_it_is_right() -> None:
    case, size = bench_min_goal.CASES["anchored"], {"K": 9, "B": 16}
    found = {regime: bench_guard.steps(case, size, regime) for regime in (case.usual, *case.regimes)}
    assert [regime for regime, calls in found.items() if "eager" not in calls] == ["far beyond", "one hopeless"]
    assert all("bomkern" in calls for calls in found.values())


def test_times_in_turn_are_the_best_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([0.2, 0.3, 0.1, 0.4])  # in the order a, b, a, b
    monkeypatch.setattr(rounds, "least", lambda steps: 1.0)
    monkeypatch.setattr(rounds, "LOOKS", (2, 2))
    monkeypatch.setattr(machine, "seconds", lambda step: next(spent))
    assert rounds.looked_at({"a": lambda: None, "b": lambda: None}) == {"a": 0.1, "b": 0.3}


class Fixture:
    """A stand-in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group, self.calls = "", 0

    def pedantic(self, step: Any, rounds: int) -> None:
        step()
        self.calls += rounds


def test_regimes_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SLOWEST", {})
    times = dict.fromkeys(["uniform", *regimes.GOALS], 2.0) | {"one behind": 3.0, "half": 1.0}

    def look(steps: dict[str, Any]) -> dict[str, float]:
        assert all(len(step()) == 9 for step in steps.values())
        return {regime: times[regime] for regime in steps}

    monkeypatch.setattr(harness, "looked_at", look)
    case, size, benchmark = bench_min_goal.CASES["anchored"], {"K": 9, "B": 16}, Fixture()
    harness.in_turn(benchmark, case, size)
    assert benchmark.extra_info["spread"] == 1.5 and benchmark.extra_info["slowest"] == "one behind"
    assert benchmark.extra_info["direction"] == worst.TURNS and benchmark.calls == 1
    assert harness.slowest(case, size) == "one behind"


def test_keops_is_asked_where_we_are_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    case, size = bench_total_correlation.CASE, {"B": 8, "D": 4}
    monkeypatch.setattr(harness, "SLOWEST", {})
    assert harness.slowest(case, size) == "wide"
    info = {"direction": worst.TURNS, "case": "total_correlation", "size": size}
    harness.note_slowest(info | worst.as_info({"wide": 1.0, "sharp": 1.1, "half": 1.2}))
    assert harness.slowest(case, size) == "sharp"


def test_a_subnormal_gradient_may_be_zero() -> None:
    """Kernels may flush gradients that single precision cannot hold as normal numbers."""

    def flushed(*x: Tensor) -> Tensor:
        return case.plain(*x)[0], *case.plain(*x)[1:]

    case = bench_goal_set.CASES["smooth"]
    key = (("K", 9), ("B", 64))
    _, gradients = harness.exact(case, key, "one behind")
    assert any(0 < float(g.abs().max()) < harness.TINY for g in gradients)
    harness.check(case, flushed, key, True, "one behind")
