"""Test what a missing extension, or one for another torch, tells the user to install."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bomkern
from bomkern import _version
from bomkern.dispatch import built_for, extension

COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir"
HERE = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that bomkern is installed in a folder of packages, and return the folder."""
    monkeypatch.setattr(built_for, "PACKAGE", tmp_path / "bomkern")
    monkeypatch.setattr(built_for, "RECORD", tmp_path / "bomkern" / "_build.json")
    (tmp_path / "bomkern").mkdir()
    return tmp_path


def library(built: str, cuda: str = "") -> Any:
    return SimpleNamespace(build=lambda: {"torch": built, "cuda": cuda})


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (ModuleNotFoundError("no _C"), "install a C++ compiler. Then build it again"),
        (ImportError("undefined symbol"), "do not load (undefined symbol); build bomkern again"),
        (library("2.3.1+cpu"), f"was built for torch 2.3.1+cpu and this is torch {torch.__version__}"),
    ],
)
def test_what_lacks_is_told_with_the_way_to_get_it(
    found: Any, told: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice avoids pip's cache, which may hold the previous wheel."""

    def import_module(name: str) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(extension.importlib, "import_module", import_module)
    module, why = extension.load()
    assert module is None and told in why
    assert why.endswith(f"`{COMMAND} --no-binary bomkern bomkern=={bomkern.__version__}`")


def test_a_library_for_another_torch_is_not_imported(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record says it before the import, which may crash."""
    (installed / "bomkern" / "_build.json").write_text(json.dumps({"torch": "2.3.1+cpu", "cuda": ""}))
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: pytest.fail("imported"))
    module, why = extension.load()
    assert module is None and "was built for torch 2.3.1+cpu" in why


@pytest.mark.parametrize(
    ("built", "cuda", "version", "cuda_here", "told"),
    [
        ("2.13.0+cpu", "", "2.13.1+cpu", None, ""),
        ("2.13.0+cpu", "", "2.13.0+cu130", "13.0", ""),  # the CPU kernels do not use torch's CUDA
        ("2.13.0+cu130", "13.0", "2.13.0+cu132", "13.2", ""),
        ("2.13.0+cpu", "", "2.14.1+cu130", "13.0", "wheel of version {}+torch2.14.cpu, or"),
        ("2.13.0+cu130", "13.0", "2.13.0+cu126", "12.6", "wheel of version {}+torch2.13.cu126, or"),
        ("2.13.0+cu130", "13.0", "2.13.0+cpu", None, "wheel of version {}+torch2.13.cpu, or"),
        ("2.13.0", "13.0", "2.13.0", "12.6", "torch 2.13.0 with CUDA 13.0 and this is torch 2.13.0 with CUDA 12.6;"),
        ("", "", "2.13.0+cpu", None, ""),
    ],
)
def test_the_wheel_that_fits_is_named(
    built: str, cuda: str, version: str, cuda_here: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda_here)
    why = built_for.why_other(built, cuda)
    assert told.format(bomkern.__version__) in why and bool(told) == bool(why)


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        (None, f"--no-binary bomkern bomkern=={bomkern.__version__}"),
        ({"url": "file:///a%20b/bomkern", "dir_info": {}}, "file:///a%20b/bomkern"),
        ({"url": "file:///x/bomkern-0.2.0.tar.gz", "archive_info": {}}, "file:///x/bomkern-0.2.0.tar.gz"),
        ({"url": "file:///x/w.whl", "archive_info": {}}, f"--no-binary bomkern bomkern=={bomkern.__version__}"),
        ({"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://x/y@abc"),
    ],
)
def test_the_command_builds_from_where_it_was_installed(origin: Any, source: str, installed: Path) -> None:
    info = installed / "bomkern-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: bomkern\nVersion: 0.2.0\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    assert built_for.build_again() == f"`{COMMAND} {source}`"


def test_a_checkout_is_built_in_place(installed: Path) -> None:
    (installed / "setup.py").touch()
    assert built_for.build_again() == f"`{COMMAND} -e {installed}`"


@pytest.mark.skipif(extension.extension is None, reason="not compiled")
def test_a_copy_recorded_for_another_torch_runs_pure_python(tmp_path: Path) -> None:
    package = Path(bomkern.__file__).parent
    shutil.copytree(package, tmp_path / "bomkern", ignore=shutil.ignore_patterns("__pycache__"))
    record = tmp_path / "bomkern" / "_build.json"
    code = (
        "import bomkern, torch; print(bomkern.__file__)\n"
        "print(bomkern.min_goal_loss(torch.tensor([[0.5, 0.25]])).item(), bool(bomkern.info()['build']))"
    )

    def run() -> tuple[list[str], str]:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), done.stderr

    record.write_text(json.dumps({"torch": torch.__version__, "cuda": ""}))
    out, warned = run()
    assert out[0].startswith(str(tmp_path)) and out[1].endswith(" True") and not warned
    record.write_text(json.dumps({"torch": "2.3.1+cpu", "cuda": ""}))
    out, warned = run()
    assert out[1].startswith("1.386") and out[1].endswith(" False")
    assert warned.count("RuntimeWarning") == 1 and f"+torch{HERE}.cpu, or build it here: `pip install" in warned


def test_versions_of_wheels_are_valid_and_come_after_the_public_one() -> None:
    packaging = pytest.importorskip("packaging.version")
    for torch_version, cuda in (("2.13.0+cpu", ""), ("2.14.1+cu130", "13.0"), ("2.15.0a0+git1234", "")):
        version = _version.version_for(torch_version, cuda)
        assert str(packaging.Version(version)) == version and packaging.Version(version) > packaging.Version("0.2.0")
    assert _version.version_for("2.14.1+cu130", "13.0") == f"{_version.__version__}+torch2.14.cu130"
    assert re.fullmatch(r"\d+\.\d+\.\d+", _version.__version__)
