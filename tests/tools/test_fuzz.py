"""Test that the fuzzer finds and reproduces planted bugs, and passes the cases drawn here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern.dispatch import schemas, select
from tests.fuzz.cases import Case, Given
from tests.fuzz.running import OPS, draw, failure_of, main
from tests.support.servers import only_cpu

Serve = Callable[..., Any]


def test_every_op_is_fuzzed() -> None:
    assert set(schemas.OPS) <= set(OPS), "add a class to tests/fuzz, and an instance to the OPS of its file"


@pytest.mark.parametrize("op", OPS)
def test_some_cases_of_each_op(op: str) -> None:
    for number in range(6):
        case = draw(2026, number, op)
        assert failure_of(case) is None, f"python -m tests.fuzz --case 2026:{number} --op {op}: {case}"


def a_little_more(serve: Serve) -> Serve:
    return lambda *given: serve(*given) * (1 + 1e-5)


def a_gradient_a_little_wrong(serve: Serve) -> Serve:
    return lambda mu, *given: serve(mu, *given) + 1e-4 * (mu - mu.detach()).sum(1).to(torch.float32)


def an_edge_forgotten(serve: Serve) -> Serve:
    """Plant a bug: forget the last row of a batch if a tile holds only that row."""

    def wrong(mu: Tensor, *given: Any) -> Tensor:
        keep = torch.ones(len(mu))
        keep[-1] = len(mu) % 8 != 1
        return serve(mu, *given) * keep

    return wrong


def a_written_input(serve: Serve) -> Serve:
    def wrong(mu: Tensor, *given: Any) -> Tensor:
        value = serve(mu, *given)
        mu.detach()[..., -1].mul_(2)
        return value

    return wrong


def a_check_forgotten(serve: Serve) -> Serve:
    return lambda mu, logvar, block, rho: serve(mu, logvar, block, rho if -1 < rho < 1 else 0.0)


def an_error_of_its_own(serve: Serve) -> Serve:
    def wrong(mu: Tensor, *given: Any) -> Tensor:
        if mu.shape[1] == 1:
            raise RuntimeError("no kernel for one dimension")
        return serve(mu, *given)

    return wrong


class Constant(torch.autograd.Function):
    """A function whose gradient has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()


def a_second_derivative_forgotten(serve: Serve) -> Serve:
    return lambda mu, *given: serve(Constant.apply(mu), *given)


PLANTS = (a_little_more, a_gradient_a_little_wrong, an_edge_forgotten, a_written_input, a_check_forgotten)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Serve], Serve]], None]:
    def plant(key: str, bug: Callable[[Serve], Serve]) -> None:
        op, impl = key.split()
        select.choose(op, "cpu", impl)  # loads the implementation, so that it can be replaced
        monkeypatch.setitem(select._servers, key, bug(select._servers[key]))

    return plant


@only_cpu("gaussian_kl")
@pytest.mark.parametrize("bug", [*PLANTS, an_error_of_its_own, a_second_derivative_forgotten])
def test_finds_a_planted_bug_and_shows_it_again(
    bug: Callable[[Serve], Serve],
    planted: Callable[[str, Callable[[Serve], Serve]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted("gaussian_kl cpu", bug)
    command = ["--op", "gaussian_kl", "--impl", "cpu", "--most", "1", "--shrink", "3", "--cases", "400"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "FAILED gaussian_kl by cpu" in out and "1 failed" in out
    lines = [line.strip() for line in out.splitlines() if line.strip().startswith("python -m tests.fuzz --")]
    again = [shlex.split(line)[3:] for line in lines if "--case " in line or "--spec " in line]
    assert any("--case" in line for line in again)
    assert [main(line) for line in again] == [1] * len(again)  # each case fails alone, too
    monkeypatch.undo()
    assert [main(line) for line in again] == [0] * len(again)


@only_cpu("min_goal")
def test_finds_a_tie_that_goes_to_the_last(
    planted: Callable[[str, Callable[[Serve], Serve]], None],
) -> None:
    def to_the_last(serve: Serve) -> Serve:
        def wrong(goals: Any, params: Any, curves: Any, reduction: int, stats: bool, route: int = 0) -> Any:
            if len(goals) != 2 or params is None or not torch.equal(params[0], params[1]):
                return serve(goals, params, curves, reduction, stats, route)
            return serve(goals[::-1], params, curves[::-1], reduction, stats, route)

        return wrong

    planted("min_goal cpu", to_the_last)
    equal = tuple(Given(f"goals{k}", "B", "raw", values="constant") for k in range(2))
    options = {"reduction": "mean", "return_stats": True, "constraints": [["Minimize", 0.5], ["Minimize", 0.5]]}
    assert "grad goals0" in (failure_of(Case("min_goal", "cpu", "cpu", {"B": 3}, equal, options)) or "")


def test_a_case_is_its_number_alone() -> None:
    for number in range(50):
        case = draw(7, number)
        assert draw(7, number) == case == Case.from_json(case.to_json())
        for a, b in zip(case.tensors(), case.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert draw(7, number, case.op) == draw(7, number, case.op, case.impl)
        assert draw(7, number, None, case.impl) == case
    assert len({str(draw(7, number)) for number in range(50)}) == 50


def test_json_holds_what_ran(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found" / "fuzz.json"
    assert main(["--cases", "20", "--json", str(path), "--op", "active_units", "--seed", "3"]) == 0
    found = json.loads(path.read_text())
    assert sum(found["cases"]["active_units"].values()) == 20 and found["seed"] == 3 and found["failures"] == []
    assert found["torch"] == torch.__version__ and "--seed 3" in found["command"]
    assert "20 cases in" in capsys.readouterr().out
