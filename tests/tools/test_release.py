"""Test what a release refuses: a tree that is not ready, and archives that are not right."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import check_library
import fresh_install
import release

ROOT = Path(__file__).resolve().parents[2]
GXX = pytest.mark.skipif(shutil.which("g++") is None or shutil.which("readelf") is None, reason="no g++ or readelf")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a repository that is ready for the release of 1.2.3."""
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 - 2026-12-01\n\n- News.\n\n## 1.2.2 - 2026-11-01\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\ndate-released: 2026-12-01\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "One"]):
        git(tmp_path, *command)
    return tmp_path


def git(tree: Path, *command: str) -> None:
    own = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *own, *command], cwd=tree, check=True)


def commit(tree: Path, name: str, old: str, new: str) -> None:
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    git(tree, "commit", "-q", "-a", "-m", "Two")


def test_a_tree_that_is_ready(tree: Path) -> None:
    assert release.not_ready(tree, "1.2.3") == []


@pytest.mark.parametrize("name", ["CHANGELOG.md", "stray.txt"])
def test_a_tree_with_changes_is_not_released(tree: Path, name: str) -> None:
    with (tree / name).open("a") as file:
        file.write("more\n")
    (reason,) = release.not_ready(tree, "1.2.3")
    assert "not committed" in reason and name in reason


def test_a_version_with_a_tag_is_not_released_again(tree: Path) -> None:
    git(tree, "tag", "v1.2.3")
    (reason,) = release.not_ready(tree, "1.2.3")
    assert "the tag v1.2.3 exists" in reason


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("CHANGELOG.md", "## 1.2.3 -", "## Unreleased\n\n## 1.2.3 -", "begins with 'Unreleased'"),
        ("CHANGELOG.md", " - 2026-12-01", "", "begins with '1.2.3'"),
        ("CHANGELOG.md", "2026-12-01", "2026-12-02", "date-released"),
        ("CITATION.cff", "version: 1.2.3", "version: 1.2.2", "another version"),
    ],
)
def test_files_that_name_another_version_or_date(tree: Path, file: str, old: str, new: str, told: str) -> None:
    commit(tree, file, old, new)
    (reason,) = release.not_ready(tree, "1.2.3")
    assert told in reason


def test_the_files_of_this_checkout_are_those_of_its_version(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "CITATION.cff", tmp_path)
    text = (ROOT / "CHANGELOG.md").read_text()
    # Until the next release its entries have no version.
    released = re.sub(r"^## Unreleased.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "CHANGELOG.md").write_text(released)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "One"]):
        git(tmp_path, *command)
    assert release.not_ready(tmp_path, release.VERSION["__version__"]) == []


def wheel(folder: Path, files: dict[str, bytes], name: str = "bomkern-0.2.0-py3-none-any.whl") -> Path:
    with zipfile.ZipFile(folder / name, "w") as packed:
        for inside, data in files.items():
            packed.writestr(inside, data)
    return folder / name


def test_an_installation_is_compared_with_the_wheel(tmp_path: Path) -> None:
    files = {"bomkern/__init__.py": b"1", "bomkern/_C.so": b"2", "bomkern_command.py": b"", "x.dist-info/RECORD": b""}
    packed, package = wheel(tmp_path, files), tmp_path / "there" / "bomkern"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "x.pyc").touch()
    (package / "__init__.py").write_bytes(b"1")
    (package / "_C.so").write_bytes(b"2")
    assert release.differences(packed, package) == []
    (package / "_C.so").write_bytes(b"3")
    (package / "stray.py").touch()
    told = release.differences(packed, package)
    assert len(told) == 2 and "bomkern/_C.so differs" in told[0] and "bomkern/stray.py differs" in told[1]


@pytest.mark.parametrize(("cuda", "right"), [("", True), ("13.0", False)])
def test_the_version_of_a_wheel_is_that_of_its_kernels(cuda: str, right: bool, tmp_path: Path) -> None:
    name = f"{release.VERSION['version_for']('2.13.0+cpu', '')}-cp311-cp311-linux_x86_64.whl"
    record = json.dumps({"torch": "2.13.1", "cuda": cuda, "not_compiled_because": ""}).encode()
    told = release.wrong_record(wheel(tmp_path, {"bomkern/_build.json": record}, f"bomkern-{name}"))
    assert told == [] if right else "torch2.13.cu130" in told[0]


def test_a_wheel_without_a_library_is_told(tmp_path: Path) -> None:
    faults, needs = release.library_faults(wheel(tmp_path, {"bomkern/__init__.py": b""}), tmp_path)
    assert "holds 0 compiled libraries" in faults[0] and not needs


def build(folder: Path, code: str, *flags: str) -> Path:
    (folder / "one.cpp").write_text(code)
    library = folder / "_C.so"
    command = ["g++", "-shared", "-fPIC", "-fvisibility=hidden", str(folder / "one.cpp"), "-o", str(library), *flags]
    subprocess.run(command, check=True)
    return library


PUBLIC = '__attribute__((visibility("default")))'


@GXX
def test_a_library_exports_its_module_alone(tmp_path: Path) -> None:
    init = f'extern "C" {PUBLIC} void* PyInit__C() {{ return new int; }}\n'
    library = build(tmp_path, f"{init}int hidden() {{ return 1; }}\n")
    assert check_library.faults(library) == [] and "GLIBCXX 3.4" in check_library.as_text(
        check_library.versions(library)
    )
    told = check_library.faults(build(tmp_path, f'{init}extern "C" {PUBLIC} int leaked() {{ return 1; }}\n'))
    assert told == ["_C.so: exports leaked"]


@GXX
def test_a_library_names_no_folder_and_no_other_library(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = build(tmp_path / "other", f'extern "C" {PUBLIC} int other() {{ return 1; }}\n', "-Wl,-soname,libother.so.1")
    uses = f'extern "C" int other(); extern "C" {PUBLIC} int PyInit__C() {{ return other(); }}\n'
    told = check_library.faults(build(tmp_path, uses, str(other), "-Wl,-rpath,/opt/somewhere"))
    assert len(told) == 2 and "needs libother.so.1" in told[0] and "/opt/somewhere" in told[1]


@GXX
def test_a_library_for_newer_systems_alone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_library.NEWEST, "GLIBCXX", (3, 3))
    (told,) = check_library.faults(build(tmp_path, f'extern "C" {PUBLIC} void* PyInit__C() {{ return new int; }}\n'))
    assert "needs GLIBCXX 3.4" in told and "use an older system" in told


def test_a_fresh_environment_has_this_torch_and_no_other_package(tmp_path: Path) -> None:
    fresh_install.share_torch(tmp_path)
    code = (
        "import importlib.metadata as m, importlib.util as u, json, sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "print(json.dumps([m.version('torch'), u.find_spec('jinja2') is None, u.find_spec('pytest') is None]))"
    )
    # Without site-packages, and without the folders of this checkout.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [importlib.metadata.version("torch"), False, True]


def test_what_leads_to_the_checkout_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BOMKERN_LOCAL_VERSION", "other")
    passed = fresh_install.clean({"BOMKERN_BUILD": "cpu"})
    assert passed.keys().isdisjoint({"PYTHONPATH", "BOMKERN_LOCAL_VERSION"}) and passed["BOMKERN_BUILD"] == "cpu"


def test_how_to_publish_keeps_the_local_version_off_the_index() -> None:
    told = release.how_to_publish("1.2.3", "dist/a.tar.gz", "dist/b+torch2.13.cpu.whl")
    assert "twine upload dist/a.tar.gz\n" in told and "git tag -a v1.2.3" in told
    assert "Attach dist/b+torch2.13.cpu.whl" in told
