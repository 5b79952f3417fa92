"""Test how `make audit` reads pip-audit's answers."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tools import audit

FLAW = {"id": "X-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
BAD = {"name": "bad", "version": "1.0", "vulns": [FLAW]}
GOOD = {"name": "good", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD], 0, "1 packages looked up, 0 flaws"),
        ([GOOD, BAD], 1, "bad 1.0: X-1, fixed in 2.0"),
        ([GOOD, UNKNOWN], 0, "unknown: not found"),
        ([UNKNOWN], 0, "not audited: the database knows none of the 1 packages"),
        (None, 0, "not audited: no route"),
    ],
)
def test_every_answer_is_told(
    packages: list[object] | None,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = tmp_path / "pip-audit"
    answer = json.dumps({"dependencies": packages}) if packages is not None else ""
    fake.write_text(f"#!/bin/sh\necho '{answer}'\necho 'no route' >&2\nexit {code}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == code and said in capsys.readouterr().out


def test_its_absence_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.main() == 0 and "pip-audit is not installed" in capsys.readouterr().out


def test_the_lock_has_a_hash_for_every_version_and_names_no_index() -> None:
    """`pip install --require-hashes` accepts the lock on any machine."""
    text = audit.LOCK.read_text()
    blocks = [b for b in text.replace("\\\n", " ").splitlines() if b and not b.startswith("#")]
    assert len(blocks) > 50 and all("==" in b and "--hash=sha256:" in b for b in blocks)
    names = {b.split("==")[0] for b in blocks}
    assert not names & {"torch", "triton"} and not any(n.startswith("nvidia") for n in names)
    assert {"setuptools", "ninja", "pytest", "mypy", "ruff", "mkdocs-material"} <= names
    assert "://" not in text and "/" not in "".join(names)
