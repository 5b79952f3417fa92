"""Test the file of kept benches: what survives a kill, where the next run resumes, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import harness, keep, machine
from bench.results import kept_lines, read, row_of
from tests.support.processes import outside_xdist

ROOT = Path(__file__).resolve().parents[2]
BENCHES = """
import os, signal
import pytest
from bench import harness, machine

def test_first(benchmark):
    machine.CEILINGS["bytes"] = 3e9
    harness.about(benchmark, "gaussian_kl", "gaussian_kl", "forward", "bomkern", {"B": 2, "D": 3})
    benchmark.extra_info.update(impl="cpu", work=8.0, unit="bytes", host="not kept")
    benchmark.pedantic(lambda: None, rounds=3)

def test_wrong(benchmark):
    row = {"op": "gaussian_kl", "case": "gaussian_kl", "direction": "forward", "peer": "eager"}
    harness.WRONG.append({**row, "size": {"B": 2, "D": 3}, "regime": "sharp", "wrong": "a value is off"})
    pytest.skip("eager is wrong here")

def test_not_had(benchmark):
    pytest.skip("no KeOps here")

def test_fails(benchmark):
    harness.about(benchmark, "gaussian_kl", "gaussian_kl", "forward", "torch.compile", {"B": 2, "D": 3})
    benchmark.pedantic(lambda: None, rounds=3)
    assert os.environ.get("MENDED")

def test_in_flight(benchmark):
    harness.about(benchmark, "gaussian_kl", "gaussian_kl", "forward", "KeOps", {"B": 2, "D": 3})
    benchmark.pedantic(lambda: os.environ.get("MENDED") or os.kill(os.getpid(), signal.SIGKILL), rounds=3)
"""
NAMES = ("first", "wrong", "fails", "in_flight")


def run(folder: Path, file: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    benches = folder / "bench_some.py"
    benches.write_text(BENCHES)
    command = [sys.executable, "-m", "pytest", str(benches), "-p", "bench.conftest", "-p", "no:cacheprovider"]
    command += [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(folder),
        "--benchmark-only",
        f"--keep={file}",
        *more,
    ]
    env = {**outside_xdist(), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "some" / "bench.jsonl"
    killed = run(tmp_path, file)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert [line.get("bench", "").rpartition("::test_")[2] for line in kept_lines(file)[0]] == [
        "",
        "",
        "first",
        "wrong",
    ]
    results = read([file])  # the file already counts as a result
    assert [row["peer"] for row in results.rows] == ["bomkern", "eager"]
    assert results.machine["ceilings"] == {"bytes": 3e9, "exponentials": None, "flops": None}
    assert (
        results.rows[0].items() >= {"rounds": 3, "impl": "cpu", "work": 8.0}.items() and "host" not in results.rows[0]
    )

    with file.open("a") as kept:
        kept.write('{"bench": "bench_some.py::test_in_fl')  # a kill can leave half a line
    mended = run(tmp_path, file, MENDED="1")
    assert mended.returncode == 0 and "2 deselected" in mended.stdout, mended.stdout + mended.stderr
    names = [line["bench"].rpartition("::test_")[2] for line in kept_lines(file)[0] if "bench" in line]
    assert names == list(NAMES)
    assert len(read([file, file]).rows) == 2 * len(NAMES)  # several files are joined
    assert not any(str(place) in file.read_text() for place in (ROOT, tmp_path, Path.home()))

    again = run(tmp_path, file, "-k", "first")  # a run with nothing left to do succeeds
    assert again.returncode == 0 and "deselected" in again.stdout, again.stdout + again.stderr


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that holds its header only."""
    monkeypatch.setattr(machine, "CEILINGS", {})
    monkeypatch.setattr(harness, "SLOWEST", {})
    keep.Keeper(tmp_path / "bench.jsonl").pytest_unconfigure()
    return tmp_path / "bench.jsonl"


@pytest.mark.parametrize("what", ["torch", "name", "sources"])
def test_another_machine_torch_or_code_is_refused(begun: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    keep.Keeper(begun).pytest_unconfigure()
    before = begun.read_bytes()
    if what == "sources":
        monkeypatch.setattr(keep, "code", lambda: "other")
    else:
        described = machine.described()
        monkeypatch.setattr(machine, "described", lambda: {**described, what: "other"})
    with pytest.raises(pytest.UsageError, match=f"was begun with {what} .*, not other: name another file"):
        keep.Keeper(begun)
    assert begun.read_bytes() == before


@pytest.mark.parametrize("text", ['{"machine_info": {}}\n', "[1]\n", "no JSON\n"])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "other").write_text(text)
    with pytest.raises(pytest.UsageError, match="is not a file of --keep"):
        keep.Keeper(tmp_path / "other")
    assert (tmp_path / "other").read_text() == text


def test_a_head_that_was_not_written_whole_is_written_again(begun: Path) -> None:
    head = begun.read_bytes()
    begun.write_bytes(head[:40])
    with pytest.raises(ValueError, match="is not a file of pytest bench/"):
        read([begun])
    keep.Keeper(begun).pytest_unconfigure()
    assert [line["kind"] for line in kept_lines(begun)[0]] == ["kept benches"] and not read([begun]).rows


def test_the_sum_over_the_sources_sees_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "some.cu"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    sums = []
    for text in ("1", "2"):
        source.write_text(text)
        sums.append(keep.code())
    (tmp_path / "kernels" / "some.so").write_text("built")
    assert sums[0] != sums[1] == keep.code()


def test_the_slowest_regime_is_known_again(begun: Path) -> None:
    """A later run benches the regime that an earlier run found slowest."""
    row: dict[str, Any] = {
        "direction": harness.TURNS,
        "case": "gaussian_kl",
        "size": {"B": 2, "D": 3},
        "slowest": "sharp",
    }
    with begun.open("a") as file:
        file.write(json.dumps({"bench": "bench_some.py::test_turns", "row": row}) + "\n")
    keep.Keeper(begun).pytest_unconfigure()
    assert harness.SLOWEST == {("gaussian_kl", (("B", 2), ("D", 3))): "sharp"}


def test_a_row_is_what_the_file_of_pytest_benchmark_gives() -> None:
    info = {
        "op": "a",
        "case": "a",
        "direction": "forward",
        "peer": "eager",
        "size": {"B": 1},
        "share": 0.123456,
        "x": 1,
    }
    row = row_of({"extra_info": info, "stats": {"median": 1.23456e-5, "iqr": 0.0, "rounds": 7, "mean": 2.0}})
    assert row == {
        "op": "a", "case": "a", "direction": "forward", "peer": "eager", "size": {"B": 1}, "seconds": 1.235e-5,
        "iqr": 0.0, "rounds": 7, "share": 0.1235,
    }  # fmt: skip
