"""Test `make gpu` without a GPU: a call ends on time and keeps its results, and every stage can run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.deadline import REASON, chosen, failed_in
from tests.support.processes import ROOT, outside_xdist

TESTS = """
import time

def test_right(): pass

def test_wrong(): assert 1 == 2

def test_long():
    print("begun")
    time.sleep(60)

def test_after(): assert 3 == 4
"""
PLUGIN = [
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "tests.support.deadline",
    "-p",
    "no:cacheprovider",
    "-q",
    "-rf",
    "--tb=short",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import tools/gpu.py, which is not part of a package."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    for name in ("gpu", "gpu_stages"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu as module  # type: ignore[import-not-found]

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keeps pytest's own handlers
    return module


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def packed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        return {entry.name.partition("/")[2]: tar.extractfile(entry).read().decode() for entry in tar}  # type: ignore


def test_every_file_keeps_its_share_of_tests_evenly() -> None:
    files = ["a"] * 100 + ["b"] * 3 + ["c"] * 50
    kept = chosen(files, 23)
    assert kept == sorted(set(kept)) and len(kept) == 23
    assert [sum(files[n] == name for n in kept) for name in "abc"] == [10, 3, 10]
    assert [n for n in kept if files[n] == "a"] == list(range(0, 100, 10))
    assert chosen(files, 1000) == list(range(153))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_the_stages_of_a_call_may_take_fits_into_it(gpu: ModuleType, number: int) -> None:
    stages = gpu.CALLS[number]
    assert gpu.START + sum(stage.seconds for stage in stages) + gpu.PACKING <= gpu.SECONDS
    assert all(stage.seconds > max(gpu.SHORT, gpu.GRACE) for stage in stages)
    assert gpu.GRACE > gpu.KILL and gpu.PACKING > gpu.KILL


def test_a_stage_has_its_seconds_and_what_others_left(gpu: ModuleType, tmp_path: Path) -> None:
    call = gpu.Call(1, tmp_path, dry=False)
    stage = gpu.Stage("it", 20, lambda call: None)
    for kept, seconds in ((0, 100), (30, 70), (80, 20), (95, 20), (500, 20)):
        now = time.time()
        assert gpu.run(call, stage, now + 100, kept) == "well: there was nothing to do"
        assert call.stop_at - now == pytest.approx(seconds - gpu.GRACE, abs=2)


def test_a_stage_that_hangs_takes_nothing_from_the_next(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that does not end is interrupted and then killed, within its own seconds."""
    call = gpu.Call(1, tmp_path, dry=False)
    stage = gpu.Stage("hangs", 16, lambda call: python("import time; time.sleep(60)"))
    monkeypatch.setattr(gpu, "KILL", 12.0)
    begun = time.time()
    assert gpu.run(call, stage, begun + 100, 84).startswith("CUT SHORT")
    assert time.time() - begun < 14


def test_no_test_begins_after_the_time(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [*PLUGIN, str(tmp_path), "--stop-at", f"{time.time() - 1:.0f}", "-rs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "4 tests were not begun in time" in done.stdout and REASON in done.stdout


def test_a_run_that_is_stopped_keeps_its_failures_and_its_summary(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    failures = tmp_path / "failed.txt"
    command = [*PLUGIN, str(tmp_path), "-s", "--failures", str(failures)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = ""
    while "begun" not in said:
        line = process.stdout.readline()
        assert line, f"it ended before the test began: {said}"
        said += line
    assert [name.partition("::")[2] for name in failed_in(failures.read_text())] == ["test_wrong"]
    assert "assert 1 == 2" in failures.read_text()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=30)
    assert "1 failed, 1 passed" in rest and "FAILED" in rest


def test_stages_that_fail_or_hang_do_not_keep_the_others_from_the_archive(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SHORT", 0.1)
    monkeypatch.setattr(gpu, "KILL", 0.5)
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)  # {tmp_path}'])"
    )
    write = "import sys; open(sys.argv[1], 'w').write('[1]')"
    stages = (
        gpu.Stage("bad", 20, lambda call: python("print('told'); raise SystemExit(3)")),
        gpu.Stage("absent", 20, lambda call: "there is no such tool here"),
        gpu.Stage("hangs", 1.0, lambda call: python(child)),
        gpu.Stage("good", 20, lambda call: [*python(write), str(call.work / "made.json")]),
    )
    monkeypatch.setitem(gpu.CALLS, 1, stages)
    archive = tmp_path / "it.tar.xz"
    given = ["--dry", "--work", str(tmp_path / "work"), "--archive", str(archive), "--seconds", "60"]
    assert gpu.main(given) == 1
    found = packed(archive)
    assert found["made.json"] == "[1]" and "told" in found["bad.log"]
    lines = {line.partition(":")[0]: line for line in found["summary.txt"].splitlines() if not line.startswith(" ")}
    assert "exit status 3" in lines["bad"] and "no such tool" in lines["absent"]
    assert "CUT SHORT" in lines["hangs"] and "well" in lines["good"]
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not [pid for pid in running if int(pid) != os.getpid()], "what a stage started goes on"


def test_sigterm_ends_a_call_with_its_archive(tmp_path: Path) -> None:
    archive = tmp_path / "it.tar.xz"
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu
gpu.SHORT = 0.1
def stage(name, seconds, text):
    return gpu.Stage(name, seconds, lambda call: [sys.executable, "-c", text])
sleep = "import time; print('begun', flush=True); time.sleep(60)"
gpu.CALLS[1] = (stage("first", 20, "print('found')"), stage("second", 60, sleep))
sys.exit(gpu.main(["--dry", "--work", {str(tmp_path / "work")!r}, "--archive", {str(archive)!r}]))
"""
    process = subprocess.Popen(python(script), stdout=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "second.log"
    until = time.time() + 30
    while not (log.exists() and "\nbegun" in log.read_text()):
        assert time.time() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    found = packed(archive)
    assert (
        "stopped by SIGTERM" in found["summary.txt"]
        and "found" in found["first.log"]
        and "begun" in found["second.log"]
    )


def test_an_archive_is_never_too_large(gpu: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "summary.txt").write_text("all well")
    for n in range(6):
        (work / f"{n}.log").write_text("head" + os.urandom(60_000).hex() + "tail")
    gpu.pack(work, tmp_path / "it.tar.xz", most=200_000)
    assert (tmp_path / "it.tar.xz").stat().st_size <= 200_000
    found = packed(tmp_path / "it.tar.xz")
    assert found["summary.txt"] == "all well"
    assert all(
        text.startswith("head") and text.endswith("tail") for name, text in found.items() if name != "summary.txt"
    )


def test_a_later_call_runs_what_failed_before(gpu: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "failed.txt").write_text(
        "FAILED tests/test_a.py::test_b[c d]\n    E  assert\n\nFAILED tests/test_e.py::f\n\n"
    )
    gpu.pack(work, tmp_path / "call1.tar.xz")
    call = gpu.Call(3, tmp_path / "next", dry=True, before=[tmp_path / "call1.tar.xz"])
    again = {stage.name: stage for stage in gpu.CALLS[3]}["again"].command
    assert again(call)[3:5] == ["tests/test_a.py::test_b[c d]", "tests/test_e.py::f"]
    assert again(gpu.Call(3, tmp_path / "next", dry=True)) is None
    assert "no such archive" in gpu.Call(3, tmp_path, dry=True, before=[tmp_path / "nothing.tar.xz"]).why_not()


def test_a_build_has_the_kernels_that_are_only_tuned(gpu: ModuleType) -> None:
    flags = {stage.environment.get("NVCC_APPEND_FLAGS", "") for call in gpu.CALLS.values() for stage in call[:1]}
    (macro,) = {flag.removeprefix("-D") for given in flags for flag in given.split() if flag.startswith("-DBOMKERN")}
    source = (ROOT / "kernels" / "total_correlation" / "cuda.cu").read_text()
    assert f"#if defined({macro})" in source and {stage[0].name for stage in gpu.CALLS.values()} == {"build"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_every_stage_runs_dry(number: int, tmp_path: Path) -> None:
    """A dry run covers every stage, so that none runs for the first time on a GPU."""
    archive = tmp_path / f"call{number}.tar.xz"
    given = ["--call", str(number), "--dry", "--archive", str(archive), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu.py"), *given],
        cwd=ROOT,
        env=outside_xdist(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert archive.stat().st_size < 12_000_000
    assert "not well: none" in done.stdout
