"""Test a dry run of the routing table: every part once, into its own folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.results import HERE
from bench.route import command

report = pytest.importorskip("bench.route.report")


def test_the_kept_page_is_that_of_the_kept_figures() -> None:
    found = json.loads((HERE / "route.json").read_text())
    assert report.page(found, "route.png") == (HERE / "route.md").read_text()


def test_a_gpu_has_its_name_and_its_waits_on_the_page() -> None:
    found = json.loads((HERE / "route.json").read_text())
    page = report.page({**found, "gpu": "Some GPU", "waits": {"64": 12.0, "8192": 20.0}}, "Some-GPU_route.png")
    assert "Some GPU (" in page and "Some-GPU_route.png" in page and "memory that torch allocated above" in page
    assert "12.0 us at B = 64, 20.0 us at B = 8,192" in page


def test_what_a_gpu_left_is_drawn_elsewhere(tmp_path: Path) -> None:
    found = json.loads((HERE / "route.json").read_text())
    (tmp_path / "Some-GPU_route.json").write_text(json.dumps({**found, "gpu": "Some GPU", "waits": {"64": 12.0}}))
    assert command.main(["--report", "--results", str(tmp_path)]) == 0
    assert "](Some-GPU_route.png)" in (tmp_path / "Some-GPU_route.md").read_text()
    assert (tmp_path / "Some-GPU_route.png").stat().st_size > 10_000


def test_a_dry_run_does_not_go_where_results_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--quick"])
    assert "give it --results FOLDER" in capsys.readouterr().err


@pytest.mark.skipif(command.torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_is_asked_for(tmp_path: Path) -> None:
    assert command.main(["--device", "cuda", "--results", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_makes_the_page_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.route import measure, variants

    monkeypatch.setattr(variants, "SIZE", 32)  # a quarter of the pixels
    monkeypatch.setattr(measure, "memory", measure.memory_here)  # only a separate process could measure all of them
    assert command.main(["--quick", "--results", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"route.json", "route.md", "route.png"}
    found = json.loads((tmp_path / "route.json").read_text())
    assert found["times"][0]["batch"] == 9 and len(found["memory"]) == 4 and "gpu" not in found
