"""The tuner: values are put back, wrong results are not timed, and what it advises is what was measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench import machine, rounds, tune


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LOOKING", 0.0)
    monkeypatch.setattr(rounds, "LOOKS", (2, 2))


def row(knob: str, now: str, us: dict[str, float]) -> dict[str, Any]:
    return {"knob": knob, "now": now, "us": us}


def test_advice_is_the_value_that_is_best_over_all_sizes() -> None:
    rows = [
        row("a", "1", {"1": 10.0, "2": 5.0, "4": 4.0}),
        row("a", "1", {"1": 10.0, "2": 9.0, "4": 30.0}),
        row("b", "1", {"1": 10.0, "2": 9.9}),
        row("c", "1", {"2": 9.9}),
        {"knob": "route", "layers": 1, "us": {"never": 1.0, "always": 2.0}},
        {"knob": "route", "layers": 8, "us": {"never": 9.0, "always": 2.0}},
    ]
    a, b, c, route = tune.advice(rows)
    assert a == "a: 2 is 1.49 times as fast as 1: commit it"
    assert b == "b: 1 stays" and "no right result" in c
    assert route == "route: always is faster with 8 layers behind a goal"


def test_a_knob_is_put_back_and_a_wrong_value_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = SimpleNamespace(LEAST=3)
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: constants)
    seen: list[int] = []

    def ours(x: torch.Tensor, impl: str) -> torch.Tensor:
        seen.append(constants.LEAST)
        return x * (2.0 if constants.LEAST != 5 or impl == "reference" else 3.0)

    case = tune.Case(
        "min_goal",
        lambda regime, B: (torch.ones(B, requires_grad=True),),
        ours,
        lambda x: 2 * x,
        torch.sum,
        lambda *_: 1.0,
    )
    knob = tune.Knob("some.module", "LEAST", (3, 4, 5), (case,), ({"B": 4},))
    (found,) = tune.tune(knob, tune.Clock(), False)
    assert set(found["us"]) == {"3", "4"} and "off by" in found["wrong"]["5"]
    assert set(seen) == {3, 4, 5} and constants.LEAST == 3


def test_it_stops_in_time_and_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if machine.DEVICE != "cpu":
        pytest.skip("tuning takes minutes on a GPU")
    out = tmp_path / "tuned.json"
    run = functools.partial(tune.main, ["route", "--device", "cpu", "--quick", "--json", str(out)])
    assert run() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["layers"] for r in rows] == [1, 2] and all(r["wait_us"] is None for r in rows)
    assert tune.main(["route", "--device", "cpu", "--quick", "--stop-at", "1"]) == 0
    assert "the time was over" in capsys.readouterr().out


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["nothing"])
    assert "no knob of nothing" in capsys.readouterr().err
    other = "cuda" if machine.DEVICE == "cpu" else "cpu"
    assert tune.main(["route", "--device", other]) == 2
