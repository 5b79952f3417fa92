"""Test that files from strangers run no code, and that nothing is written to unexpected places."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bomkern import History, cli
from bomkern.common.files import load_plain
from bomkern.report import diagnose_folder
from bomkern.train.config import TrainError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = [*ROOT.glob("bomkern/**/*.py"), *ROOT.glob("kernels/**/*.py")]
BESIDE = [
    ROOT / "setup.py",
    *(path for name in ("bench", "examples", "tools") for path in ROOT.glob(f"{name}/**/*.py")),
]


# Pickles that contain code.


class Harm:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def _zip(harm: Harm, path: Path) -> None:
    torch.save({"format": 3, "layout": {}, "rows": harm}, path)


def _legacy(harm: Harm, path: Path) -> None:
    torch.save({"format": 3, "rows": harm}, path, _use_new_zipfile_serialization=False)


def _bare(harm: Harm, path: Path) -> None:
    path.write_bytes(pickle.dumps(harm, protocol=2))


def _swapped(harm: Harm, path: Path) -> None:
    """Write a valid `torch.save` file with a replaced pickle."""
    whole = io.BytesIO()
    torch.save({"format": 3}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(harm, protocol=2) if name.endswith("data.pkl") else old.read(name))


def _resume(path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    from bomkern.train import checkpoint

    checkpoint.load(path)


def _diagnose(path: Path) -> None:
    path.rename(path.with_name("history.pt"))
    diagnose_folder(path.parent)


@pytest.mark.parametrize("write", [_zip, _legacy, _bare, _swapped])
@pytest.mark.parametrize("load", [load_plain, History.load, _resume, _diagnose])
@pytest.mark.parametrize("forced", [False, True], ids=["", "forced"])
def test_code_in_a_file_is_not_run(
    load: Callable[[Path], Any],
    write: Callable[[Harm, Path], None],
    forced: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if forced:  # torch's switch for old scripts must not affect bomkern
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "file.pt"
    write(Harm(marker), path)
    with contextlib.suppress(Exception):  # the legacy reader fails on the result of the code that it has run
        torch.load(path, weights_only=False)
    assert marker.exists(), "the file is harmless, and proves nothing"
    marker.unlink()
    with pytest.raises((ValueError, TrainError)) as refused:
        load(path)
    assert not marker.exists() and "\n" not in str(refused.value) and "trust" not in str(refused.value)


def test_the_command_line_runs_no_code_of_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning_fabric")
    marker = tmp_path / "marker"
    for name in ("checkpoint.pt", "history.pt"):
        _zip(Harm(marker), tmp_path / name)
    assert cli.main(["diagnose", str(tmp_path)]) == 1 and "not a history" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(tmp_path), "--resume"]) == 1
    assert "pickle with code" in capsys.readouterr().err and not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", b"noise" * 20, pickle.dumps([1], 2), pickle.dumps({}, 2)]
)
def test_what_is_no_such_file_is_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
        History.load(path)
    assert "\n" not in str(refused.value)


# Calls that the sources may make.


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _is(call: ast.Call, name: str, value: object) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def _wrong(tree: ast.AST) -> list[str]:
    """Return the calls that run text, a shell or a pickle."""
    found = []
    for name, call in _calls(tree):
        bare = name.removeprefix("builtins.")
        if bare in ("eval", "exec", "compile", "os.system", "os.popen") or re.match(r"(pickle|marshal|shelve)\.", bare):
            found.append(f"line {call.lineno}: {name}")
        if any(k.arg == "shell" for k in call.keywords) and not _is(call, "shell", False):
            found.append(f"line {call.lineno}: {name} with a shell")
        if name == "torch.load" and not _is(call, "weights_only", True):
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if name.endswith("np.load") and any(k.arg == "allow_pickle" for k in call.keywords):
            found.append(f"line {call.lineno}: {name} with pickles")
    return found


@pytest.mark.parametrize("path", [*PACKAGE, *BESIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_run_no_text_and_no_pickle(path: Path) -> None:
    assert _wrong(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_starts_no_program_and_opens_no_connection(path: Path) -> None:
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    banned = {"ctypes", "marshal", "multiprocessing", "pickle", "requests", "shelve", "socket", "subprocess", "urllib"}
    assert not names & banned


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)",
        "builtins.exec(x)",
        "os.system(x)",
        "pickle.load(f)",
        "run(x, shell=True)",
        "run(x, shell=wish)",
        "torch.load(f)",
        "torch.load(f, weights_only=safe)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_look_at_the_sources_sees(text: str) -> None:
    assert _wrong(ast.parse(text)) and not _wrong(ast.parse("model.eval(); torch.load(f, weights_only=True)"))


# Files that a run writes.

# Python's audit events report every file that is opened for writing, made, renamed or removed.
AUDITED = """
import os, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT)
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        os.write(log, os.fsencode(os.path.abspath(args[0])) + b"\\n")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate"):
        for path in args[:2]:
            if isinstance(path, (str, bytes)):
                os.write(log, os.fsencode(os.path.abspath(path)) + b"\\n")
sys.addaudithook(hook)
from bomkern.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_writes_into_its_folder_alone(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("tensorboard")
    for name in ("cwd", "home", "tmp"):
        (tmp_path / name).mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL", "TORCH", "TRITON", "BOMKERN"))}
    environment = {
        **kept,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out, log = tmp_path / "runs" / "out", tmp_path / "log"
    command = [sys.executable, "-c", AUDITED, str(log), "train", "--out", str(out), "--steps", "4", "--batch-size", "8"]
    command += ["--eval-every", "2", "--log-every", "2", "--checkpoint-every", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "report.html").is_file()
    assert not list((tmp_path / "cwd").iterdir())
    # The README names both: torch's own folder, which is empty, and matplotlib's list of fonts.
    assert all(path.name.startswith("torchinductor_") and path.is_dir() for path in (tmp_path / "tmp").rglob("*"))
    left = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert all(re.fullmatch(r"\.cache/matplotlib/fontlist-v[\d.]+\.json", name) for name in left), left
    written = {Path(line) for line in log.read_text().splitlines()}
    homes = (
        tmp_path / "home" / ".cache" / "matplotlib",
        tmp_path / "home" / ".config" / "matplotlib",
        tmp_path / "tmp",
    )
    parents = {*out.parents, *(parent for home in homes for parent in home.parents)}
    outside = {
        p for p in written - parents if not p.is_relative_to(out) and not any(p.is_relative_to(h) for h in homes)
    }
    assert not outside - {Path(os.devnull)}
    assert out / "checkpoint.pt" in written, "the hook saw nothing"
