"""Test the tool that trains what docs/trainer.md compares, and the figures that it wrote."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bomkern.report.page import is_information

pytest.importorskip("skimage")
from bomkern.train.nine_goals import GOALS

ROOT = Path(__file__).parents[2]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("trainer_figures", ROOT / "tools" / "trainer_figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load()


def summary(kinds: list[str]) -> dict[str, Any]:
    findings = [{"kind": kind, "goals": ["realism"], "confidence": 0.9} for kind in kinds]
    return {
        "steps": 3,
        "seed": 0,
        "threads": 1,
        "versions": {"torch": "2"},
        "psnr": 20.00001,
        "ssim": 0.5,
        "baseline_psnr": 16.0,
        "baseline_ssim": 0.25,
        "share": {"realism": 0.75, "consistency": 0.25},
        "diagnosis": {"findings": findings, "note": ""},
    }


def test_the_first_fault_is_kept_and_information_is_not() -> None:
    assert tool.kept(summary(["idle", "locked", "starved"]), is_information)["finding"]["kind"] == "locked"
    assert tool.kept(summary(["idle"]), is_information)["finding"] is None
    assert tool.kept(summary([]) | {"diagnosis": None}, is_information)["finding"] is None


def test_a_run_that_is_there_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    anew: list[str] = []

    def run(command: list[str], **_: Any) -> None:
        folder = Path(command[command.index("--out") + 1])
        trained.append(folder.name)
        anew.extend([folder.name] if "--overwrite" in command else [])
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary(["locked"])))

    monkeypatch.setattr(tool.subprocess, "run", run)
    to = tmp_path / "trainer.json"
    monkeypatch.setattr(sys, "argv", ["trainer_figures", str(tmp_path), "--steps", "3", "--to", str(to)])
    assert tool.main() == 0
    assert trained == ["default", "spill_auto", "spill_0", "scales_auto", "budget_0"]
    first = to.read_text()
    (tmp_path / "spill_0" / "summary.json").write_text(json.dumps(summary(["locked"]) | {"steps": 2}))  # was killed
    assert tool.main() == 0
    assert trained[5:] == anew == ["spill_0"] and to.read_text() == first


def test_the_options_are_those_of_the_command() -> None:
    from bomkern import cli

    for options in tool.SETTINGS:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *options.split(), "--help"])
        assert ended.value.code == 0


def test_the_page_shows_what_the_tool_wrote() -> None:
    found = json.loads(tool.FIGURES.read_text())
    assert {options: run["says"] for options, run in found["runs"].items()} == tool.SETTINGS
    for run in found["runs"].values():
        assert tuple(run["share"]) == GOALS and sum(run["share"].values()) == pytest.approx(1, abs=1e-2)
    assert found["steps"] == 1000
    page = (ROOT / "docs" / "trainer.md").read_text()
    assert "<!-- trainer -->" in page
    # What the page says of the run, in words, next to its figures.
    assert "`--scales auto` pours the" in " ".join(re.sub(r"\n", " ", page).split())
    share = found["runs"]["--scales auto"]["share"]
    assert max(share, key=lambda goal: share[goal]) == "realism" and share["realism"] > 0.5
