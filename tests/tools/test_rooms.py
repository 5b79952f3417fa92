"""Test the rooms of bomkern/ and tests/: imports go down without a circle, and no test imports a test."""

from __future__ import annotations

import ast
import pickle
import sys
from pathlib import Path

import pytest

import bomkern
from bomkern import Anchored, Diagnosis, Minimize, Upper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import rooms  # noqa: E402  where tools/ is on the path


def test_imports_go_down() -> None:
    assert rooms.upward() + rooms.circles() == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("common/checks.py", "from ..ops.min_goal import min_goal_loss", "common may import no room"),
        ("goals/record.py", "from .. import train", "goals may import"),
        ("diagnosis/trends.py", "import bomkern.ops.min_goal", "diagnosis may import common, goals"),
        ("ops/min_goal.py", "from bomkern import GoalSet", "ops may import"),
        ("train/data.py", "from ..goals.history import History", "train may import bomkern, common, report"),
    ],
)
def test_an_import_that_goes_up_is_named(tmp_path: Path, file: str, line: str, message: str) -> None:
    for source in rooms.PACKAGE.rglob("*.py"):
        copy = tmp_path / "bomkern" / source.relative_to(rooms.PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    changed = tmp_path / "bomkern" / file
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    (wrong,) = rooms.upward(tmp_path / "bomkern")
    assert wrong.startswith(f"bomkern.{file[:-3].replace('/', '.')} imports bomkern") and message in wrong


def test_a_circle_is_named(tmp_path: Path) -> None:
    for name, text in {"__init__": "", "a": "from . import b", "b": "from . import a"}.items():
        (tmp_path / "bomkern").mkdir(exist_ok=True)
        (tmp_path / "bomkern" / f"{name}.py").write_text(text)
    assert rooms.circles(tmp_path / "bomkern") == ["bomkern.a -> bomkern.b -> bomkern.a"]


def test_public_classes_say_that_they_are_of_bomkern() -> None:
    for name in bomkern.__all__:
        public = getattr(bomkern, name)
        if isinstance(public, type):
            assert (public.__module__, public.__qualname__) == ("bomkern", name)
    for value in (Minimize(2.0), Upper(1.0, 0.5), Anchored(0.0, 2.0), Diagnosis((), (1, 2), {}, {})):
        written = pickle.dumps(value)
        assert repr(pickle.loads(written)) == repr(value) and b"bomkern." not in written


def test_no_room_has_the_name_of_a_function() -> None:
    assert not set(bomkern.__all__) & set(rooms.FLOOR)


def imported_tests(folder: Path) -> list[str]:
    """Return every import of a test file or of a conftest by a Python file in ``folder``."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            for module in modules:
                if any(part == "conftest" or part.startswith("test_") for part in module.split(".")):
                    found.append(f"{path.relative_to(folder)} imports {module}")
    return found


def test_no_test_imports_a_test() -> None:
    assert imported_tests(ROOT / "tests") == [], "move what they share into tests/support"


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from tests.ops.test_min_goal import SIX", "tests.ops.test_min_goal.SIX"),
        ("from tests.ops import test_min_goal", "tests.ops.test_min_goal"),
        ("from . import test_min_goal", ".test_min_goal"),
        ("import tests.conftest", "tests.conftest"),
        ("def late(): from .conftest import ROOT", "conftest.ROOT"),
    ],
)
def test_an_import_of_a_test_is_named(tmp_path: Path, line: str, module: str) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "test_it.py").write_text(f"import pytest\nfrom tests.support.goals import SIX\n{line}\n")
    assert imported_tests(tmp_path) == [f"ops/test_it.py imports {module}"]
