"""Test that tools/sanitize.py and tools/tidy.sh can fail, and name a missing tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import sanitize  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "OUT", tmp_path)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo fine", []),
        ("exit 3", ["exit status 3"]),
        ("echo 'a.h:3:1: runtime error: shift'", ["a.h:3:1: runtime error: shift"]),
        ("echo 'WARNING: ThreadSanitizer: data race' >&2; exit 66", ["WARNING: ThreadSanitizer: data race"]),
        ("echo '==1==ERROR: AddressSanitizer: x' >&2; exit 1", ["==1==ERROR: AddressSanitizer: x"]),
    ],
)
def test_a_run_is_judged_by_its_report_and_its_status(script: str, found: list[str]) -> None:
    assert sanitize.run("a program", "address", ["sh", "-c", script]).found == found


@pytest.mark.parametrize(("says", "missed"), [("nothing", 5), ("a data race", 4)])
def test_a_planted_error_that_goes_unreported_is_a_finding(
    says: str, missed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho {says} >&2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sanitize, "build", lambda *_: program)
    assert sum(bool(done.found) for done in sanitize.planted()) == missed


@pytest.mark.slow
def test_the_sanitizers_report_what_is_planted() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    assert [done.found for done in sanitize.planted()] == [[]] * 5


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(sanitize.Missing, match=r"^g\+\+ is not installed"):
        sanitize.gxx()
    env = {**os.environ, "CLANG_TIDY": "no-such-clang-tidy"}
    done = subprocess.run(["bash", "tools/tidy.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "make tidy not run: clang-tidy is not installed" in done.stdout
