"""Test the tuner: it restores values, times no wrong result, and advises what it measured."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        row("d", "1", {"1": 9.9}),
        {"knob": "route", "layers": 1, "us": {"never": 1.0, "always": 2.0}},
        {"knob": "route", "layers": 8, "us": {"never": 9.0, "always": 2.0}},
    ]
    a, b, c, d, route = tune.advice(rows)
    assert a == "a: 2 is 1.49 times as fast as 1: commit it"
    assert b == "b: 1 stays" and "no right result" in c and d == "d: no other value gave a right result"
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


DOUBLED = tune.Case(
    "gaussian_kl",
    lambda regime, B: (torch.ones(B, requires_grad=True),),
    lambda x, impl: 2 * x,
    lambda x: 2 * x,
    torch.sum,
    lambda *_: 1.0,
)


def test_a_value_that_the_library_refuses_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = {"rows.few_rows": 16}

    def setter(name: str, value: int = 0) -> int:
        before = thresholds[name]
        if 0 < value < 100:
            thresholds[name] = value
        return before

    monkeypatch.setattr(tune, "_cuda", setter)
    (found,) = tune.tune(tune.Knob("", "rows.few_rows", (8, 500), (DOUBLED,), ({"B": 4},)), tune.Clock(), False)
    assert set(found["us"]) == {"8", "16"} and thresholds["rows.few_rows"] == 16
    assert "rows.few_rows stays 16, 500 takes a build" in found["wrong"]["500"]


@pytest.mark.parametrize("asks_the_device", ["", "b"])
def test_calls_are_replayed_where_all_can_be_recorded(asks_the_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is recorded under its own setting. If one call has no graph, none is timed by replay."""
    at, called, replayed = [""], [], []

    @contextmanager
    def setting(name: str) -> Iterator[None]:
        at.append(name)
        yield
        at.pop()

    def ours(x: torch.Tensor, impl: str) -> torch.Tensor:
        called.append(at[-1])
        return 2 * x

    def recorded(step: Callable[[], object]) -> Callable[[], object] | None:
        step()
        return None if called[-1] == asks_the_device else functools.partial(replayed.append, called[-1])

    def timed(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
        for step in steps.values():
            step()
        return dict.fromkeys(steps, 40.0)

    monkeypatch.setattr(tune, "recorded", recorded)
    monkeypatch.setattr(tune, "timed", timed)
    case = dataclasses.replace(DOUBLED, ours=ours)
    settings = {name: functools.partial(setting, name) for name in "ab"}
    (found,) = tune.compare("title", "a", settings, "cpu", (case,), ({"B": 4},), tune.Clock(), False)
    assert called[-2:] == ["a", "b"] and replayed == ([] if asks_the_device else ["a", "b"])
    assert found["replayed"] is (not asks_the_device)
    assert found["us"] == dict.fromkeys("ab", 40.0 if asks_the_device else 40.0 / tune.RECORDED)


def test_knobs_have_a_row_each_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(name: str, count: int) -> Iterator[dict[str, Any]]:
        for i in range(count):
            if (name, i) == ("b", 2):
                raise tune.TimeOver
            yield row(name, "1", {"1": i + 1.0})

    fakes = [(name, functools.partial(rows, name, count)) for name, count in (("a", 2), ("b", 9), ("c", 9))]
    monkeypatch.setattr(tune, "jobs", lambda *_: iter(fakes))
    monkeypatch.setattr(tune, "why_not", lambda title: None)
    assert tune.main(["route", "--device", machine.DEVICE]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["knob"] for line in said[:6]] == ["a", "b", "c", "a", "b", "c"]
    assert said[6] == "not begun or not ended, the time was over: b, c"


def test_an_op_turns_the_knobs_that_it_shares() -> None:
    titles = [title for title, _ in tune.jobs(["latent_statistics"], tune.Clock(), True)]
    assert "cuda columns.most_slices" in titles and "cuda rows.few_rows" not in titles


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
    assert "no such knob: nothing" in capsys.readouterr().err
    other = "cuda" if machine.DEVICE == "cpu" else "cpu"
    assert tune.main(["route", "--device", other]) == 2
