"""Test the profiler's script: a dry run on the CPU, an op that fails, and the GPU path with a stub."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench import kernels, machine
from bomkern.dispatch import select


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a dry run sets this variable


def test_every_op_has_a_case() -> None:
    assert [case.op for case, _, _ in kernels.cases()] == list(kernels.OPS)
    for case, size, small in kernels.cases():
        assert size.keys() == small.keys() and case.work(size, "forward") > case.work(small, "forward")


@pytest.mark.skipif(machine.DEVICE != "cpu", reason="the benches take the GPU that is here")
def test_a_dry_run_needs_no_gpu(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cpu"]) == 0
    served = sum(not select.why_not(op, impl, "cpu") for op in kernels.OPS for impl in kernels.IMPLS["cpu"])
    assert f"{served} done, 0 failed" in capsys.readouterr().err


@pytest.mark.skipif(machine.DEVICE != "cpu", reason="the benches take the GPU that is here")
def test_one_bad_op_does_not_take_the_others_with_it(
    quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal memory access")

    bad = [
        (dataclasses.replace(case, ours=fails) if case.op == "gaussian_kl" else case, size, small)
        for case, size, small in kernels.cases()
    ]
    monkeypatch.setattr(kernels, "cases", lambda: bad)
    assert kernels.main(["--device", "cpu", "--only", "min_goal,gaussian_kl,active_units,reference"]) == 1
    said = capsys.readouterr().err
    assert (
        "gaussian_kl by reference FAILED" in said and "an illegal memory access" in said and "2 done, 1 failed" in said
    )


def test_only_takes_ops_and_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.chosen("", "cuda") == (list(kernels.OPS), ["cuda", "triton"])
    assert kernels.chosen("triton,goal_set,min_goal", "cuda") == (["min_goal", "goal_set"], ["triton"])
    with pytest.raises(SystemExit):
        kernels.main(["--only", "furlongs"])
    assert "furlongs is neither an op nor what serves a cuda" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 1 and "needs a GPU" in capsys.readouterr().err


def test_the_profiler_sees_one_call_and_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU path, with CUDA's profiler replaced by a stub."""
    seen: list[str] = []
    case, _, small = kernels.cases()[0]

    def ours(*given: Any, impl: str) -> Any:
        seen.append("call")
        if seen.count("call") == 4:
            raise RuntimeError("no")
        return case.ours(*given, impl=impl)

    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    watched = dataclasses.replace(case, ours=ours)
    kernels.once(watched, "reference", small, "cuda")
    with pytest.raises(RuntimeError):
        kernels.once(watched, "reference", small, "cuda")
    assert seen == ["call", "start", "call", "stop"] * 2
