"""Test the trainer end to end: run folder, bitwise resuming, command line and diagnosis."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")

import torch

from bomkern import History, cli
from bomkern.train import checkpoint, loop, recorder, terminal
from bomkern.train.config import BUDGET, SPILL, Config, TrainError
from bomkern.train.nine_goals import GOALS, anchors
from bomkern.train.presets import DIAGNOSIS
from tests.support.training import SMALL, assert_same, config, leaves

PARTS = {"raw", "level", "share", "deficit", "ideal", "scale"}

# A run folder.


@pytest.mark.parametrize(
    ("scales", "reduction"),
    [
        ("anchored", "mean"),
        ("anchored", "min"),
        ("moving", "mean"),
        ("probed", "mean"),
        ("auto", "mean"),
        ("diagnosis", "mean"),
    ],
)
def test_every_preset_runs_and_leaves_its_folder(tmp_path: Path, scales: str, reduction: str) -> None:
    out = tmp_path / "run"
    how = {"calibration_steps": 2, "eval_every": 2, "probe": 2 * (scales == "probed")}
    summary = loop.train(config(out, scales=scales, reduction=reduction, **how))
    names = {path.name for path in out.iterdir()}
    own = set(recorder.OWN) - ({recorder.PAYOFF} if scales != "probed" else set())
    # the run saved once, so it has no previous checkpoint
    own.remove(checkpoint.before(Path(recorder.CHECKPOINT)).name)
    assert own <= names and any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]

    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["steps"] == 3 and summary["rejected_steps"] == 0 and summary["steps_per_second"] > 0
    assert 0 < summary["psnr"] < 60 and -1 <= summary["ssim"] <= 1 and summary["baseline_psnr"] > 10
    assert set(summary["share"]) == set(summary["longest_starvation"]) == set(GOALS)
    assert sum(summary["share"].values()) == pytest.approx(1)
    assert all((share > 0) == (summary["longest_starvation"][name] < 3) for name, share in summary["share"].items())
    assert summary["spill"] == (SPILL if scales in ("anchored", "moving", "probed") and reduction == "mean" else 0)
    assert summary["probe_updates"] == (18 if scales == "probed" else 0)
    assert {"torch", "bomkern", "lightning-fabric"} <= set(summary["versions"])
    assert summary["impl"] in ("cpu", "reference")
    assert json.loads((out / "config.json").read_text())["scales"] == scales

    lines = recorder.read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3]
    assert set(lines[0]["goals"]) == set(GOALS) and set(lines[0]["goals"]["realism"]) == PARTS
    assert lines[0]["psnr"] > 0 and lines[0]["loss"] == lines[0]["loss"]
    if scales == "anchored":
        expected = {name: {"ideal": a.ideal, "scale": a.nadir - a.ideal} for name, a in anchors(4).items()}
        for name in GOALS:
            assert summary["constraints"][name] == pytest.approx(expected[name])
    if scales == "diagnosis":
        for name, scale in DIAGNOSIS.items():
            assert summary["constraints"][name] == pytest.approx({"ideal": 0, "scale": scale})


def test_pictures_are_pictures(tmp_path: Path) -> None:
    from PIL import Image

    loop.train(config(tmp_path / "run", image_size=64))
    for name in recorder.PICTURES:
        with Image.open(tmp_path / "run" / name) as image:
            assert image.width > 400 and image.height > 200 and len(image.convert("RGB").getcolors(2**24) or []) > 50


@pytest.mark.usefixtures("plain")
def test_a_folder_with_a_run_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "run"
    loop.train(config(out, steps=1))
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(TrainError, match="--resume to go on with it, or --overwrite"):
        loop.train(config(out, steps=1))
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / recorder.FORMER[0]).write_bytes(b"a picture of an older version")
    assert loop.train(config(out, steps=2, overwrite=True))["steps"] == 2
    assert not (out / recorder.FORMER[0]).exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot write there"):
        loop.train(config(tmp_path / "file" / "run"))
    with pytest.raises(TrainError, match="nothing to resume"):
        loop.train(config(tmp_path / "absent", resume=True))
    monkeypatch.setattr(recorder, "ROOM", 2**70)
    with pytest.raises(TrainError, match="MiB free, a run needs"):
        loop.train(config(tmp_path / "full"))


@pytest.mark.usefixtures("plain")
def test_a_users_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.effect_noise((80, 80), 50).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "bad.jpg").write_bytes(b"bad")
    summary = loop.train(config(tmp_path / "run", data=str(tmp_path / "images"), steps=1))
    assert summary["steps"] == 1
    printed = capsys.readouterr()
    assert "skipped 1 files" in printed.out + printed.err and "bad.jpg" in printed.out + printed.err


# Checkpoints and resuming.


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("scales", ["anchored", "probed", "auto"])
def test_resuming_is_bit_for_bit(tmp_path: Path, scales: str) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    settings = {"scales": scales, "calibration_steps": 5, "eval_every": 2, "probe": 2 * (scales == "probed")}
    loop.train(config(straight, steps=6, **settings))
    loop.train(config(parts, steps=3, **settings))
    torch.manual_seed(1234)  # no result depends on the global generator
    loop.train(Config(out=str(parts), steps=6, resume=True), {"out", "steps", "resume"})

    a, b = (leaves(checkpoint.load(out / recorder.CHECKPOINT)) for out in (straight, parts))
    for name in ("/config/out", "/config/steps", "/config/resume"):
        a.pop(name), b.pop(name)
    assert_same(a, b)
    lines = [recorder.read_lines(out / recorder.METRICS) for out in (straight, parts)]
    for line in lines[0] + lines[1]:
        walked = line.pop("walked", 1.0)  # weighted by measured times
        assert "goals" not in line or 0 < walked < 1
    assert lines[0] == lines[1]
    if scales == "probed":
        tables = [json.loads((out / recorder.PAYOFF).read_text()) for out in (straight, parts)]
        for table in tables:
            assert table.pop("seconds") > 0 and table.pop("training") in (3, 6)  # of the run that was then begun
        assert tables[0] == tables[1]


@pytest.mark.usefixtures("plain")
def test_what_must_not_change_when_resuming(tmp_path: Path) -> None:
    loop.train(config(tmp_path, steps=2))
    with pytest.raises(TrainError, match="--seed 5 differs from the 0"):
        loop.train(config(tmp_path, steps=3, seed=5, resume=True), {"seed", "steps"})
    with pytest.raises(TrainError, match="is at step 2 already"):
        loop.train(config(tmp_path, steps=1, resume=True), {"steps"})
    assert loop.train(config(tmp_path, resume=True), set())["steps"] == 2


@pytest.mark.usefixtures("plain")
def test_checkpoints_are_loaded_with_weights_only_and_written_whole(tmp_path: Path) -> None:
    loop.train(config(tmp_path, steps=1))
    path = tmp_path / recorder.CHECKPOINT
    state = torch.load(path, weights_only=True)
    assert state["step"] == 1 and {"vae", "average", "discriminator", "optimizers", "goals", "tally"} <= set(state)
    before = path.read_bytes()

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*tmp"))
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(TrainError, match="not a readable checkpoint"):
        checkpoint.load(path)


# The command line.


def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = (
        ["--steps", "0"],
        ["--steps", "3", "--epochs", "1"],
        ["--batch-size", "3"],
        ["--image-size", "48"],
        ["--scales", "none"],
        ["--lr", "nan"],
        ["--device", "tpu"],
        ["--resume", "--overwrite"],
        ["--nonsense"],
    )
    for arguments in bad:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--out", str(tmp_path / "x"), *arguments])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and "error" in printed.err, arguments
    assert not (tmp_path / "x").exists()


def test_a_run_that_cannot_start_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "empty")]) == 1
    assert "no images" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["train", "--out", str(tmp_path / "run"), "--device", "cuda"]) == 1
        assert "no CUDA device" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--impl", "cuda"]) == 1
    assert "--impl cuda cannot serve on cpu: " in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--scales", "probed"]) == 1
    assert "say how long with --probe STEPS" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--temperature", "0.1", "--spill", "0.5"]) == 1
    assert "--temperature 0.1 and --spill 0.5 exclude each other" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert cli.main(["train", "--steps", "1"]) == 1
    assert "pip install 'bomkern[train]'" in capsys.readouterr().err


def test_the_command_line_imports_nothing_heavy() -> None:
    # torch itself imports tqdm if it is installed.
    code = "import sys, bomkern.cli; print(*[m for m in bomkern.cli.EXTRA if m in sys.modules and m != 'tqdm'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.usefixtures("plain")
def test_info_and_train_print_something_useful(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "bomkern" in capsys.readouterr().out
    assert cli.main(["train", "--out", str(tmp_path), *SMALL, "--epochs", "0.01", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mean colour" in printed and all(name in printed for name in GOALS) and str(tmp_path) in printed
    learnt, look, following = printed.splitlines()[-3:]
    assert learnt.startswith("learnt: held-out PSNR") and "worst goal" in learnt
    assert look.startswith(f"open:   {tmp_path}/report.html")
    assert following == "next:   bomkern train --data FOLDER_OF_YOUR_IMAGES --out runs/own"


@pytest.mark.usefixtures("plain")
def test_spill_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["train", "--out", str(tmp_path), *SMALL, "--steps", "2", "--device", "cpu", "--spill", "auto"]) == 0
    )
    summary = json.loads((tmp_path / recorder.SUMMARY).read_text())
    assert summary["spill"] == "auto" and summary["budget"] == BUDGET and summary["rejected_steps"] == 0
    assert Config(spill="auto").row_budget == BUDGET
    with pytest.raises(SystemExit):
        cli.main(["train", "--spill", "automatic"])
    assert "argument --spill: 'automatic' is not a number" in capsys.readouterr().err


def test_the_progress_line_names_the_worst_goal() -> None:
    goals = {"near": {"deficit": 0.1, "share": 0.9}, "far": {"deficit": 0.61, "share": 0.1}}
    assert terminal.progress(goals, None) == "worst far 0.61"
    assert terminal.progress(goals, 19.24) == "worst far 0.61, PSNR 19.2 dB"


@pytest.mark.usefixtures("plain")
def test_a_run_on_own_images_is_told_to_go_on(tmp_path: Path) -> None:
    summary = loop.train(config(tmp_path))
    last = terminal.report({**summary, "data": "photos", "steps": 7}, "a folder").splitlines()[-1]
    assert last == "next:   bomkern train --out 'a folder' --resume --steps 14"


# The diagnosis.


@pytest.mark.usefixtures("plain")
def test_the_top_finding_is_printed_and_the_rest_can_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = loop.train(config(tmp_path, steps=40, log_every=20))
    capsys.readouterr()
    assert cli.main(["diagnose", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary["diagnosis"]
    assert len(History.load(tmp_path / recorder.HISTORY)) == 40

    finding = {
        "kind": "locked",
        "goals": ["realism"],
        "confidence": 0.9,
        "evidence": "see here",
        "suggestion": "do this",
    }
    more = {**finding, "kind": "starved", "evidence": "not shown"}
    for findings, tail in (([finding], ""), ([finding, more], "1 more: bomkern diagnose")):
        printed = terminal.report({**summary, "diagnosis": {"note": "", "findings": findings}}, str(tmp_path))
        assert "realism: locked (90% sure)\n  see here\n  -> do this" in printed and "not shown" not in printed
        assert tail in printed and ("1 more" in printed) == bool(tail)
    unsure = terminal.report({**summary, "diagnosis": {"note": "", "findings": [{**finding, "confidence": 0.3}]}}, "")
    assert "realism: perhaps locked (30% sure)" in unsure
    calm = terminal.report({**summary, "diagnosis": {"note": "", "findings": [{**finding, "kind": "idle"}]}}, "")
    assert "no bucket has a hole" in calm
    assert "of the images' backward saved" in calm and 0 < summary["walked"] < 1
    assert "backward saved" not in terminal.report({**summary, "walked": 1.0}, "")
    assert "75% of the images' backward saved" in terminal.report({**summary, "walked": 0.25}, "")


@pytest.mark.usefixtures("plain")
def test_a_run_that_is_still_going_can_be_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_finish", lambda *_: {})  # as if the process had been killed after its last checkpoint
    loop.train(config(tmp_path, steps=5, checkpoint_every=2))
    assert cli.main(["diagnose", str(tmp_path), "--no-report"]) == 0
    assert len(History.load(tmp_path / recorder.HISTORY)) == 5


@pytest.mark.usefixtures("plain")
def test_a_run_is_not_lost_over_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no room,\nnowhere")

    monkeypatch.setattr(loop, "diagnose_folder", fail)
    summary = loop.train(config(tmp_path))
    assert caplog.messages == ["the run is complete, but its diagnosis failed: ValueError: no room, nowhere"]
    assert summary["diagnosis"] is None and summary["psnr"] > 0 and (tmp_path / recorder.SUMMARY).is_file()
    assert "diagnosis" not in terminal.report(summary, str(tmp_path))


# Quality of the result.


@pytest.mark.usefixtures("plain")
def test_mixed_precision(tmp_path: Path) -> None:
    summary = loop.train(config(tmp_path, precision="bf16-mixed"))
    assert summary["rejected_steps"] == 0 and summary["psnr"] > 0


@pytest.mark.slow
def test_training_beats_the_mean_colour(tmp_path: Path) -> None:
    summary = loop.train(Config(out=str(tmp_path), steps=150, device="cpu"))
    assert summary["psnr"] > summary["baseline_psnr"]
    assert summary["share"]["reconstruction"] > 0.02 and summary["share"]["realism"] < 0.5
