"""The rooms of bomkern/: imports go down, in no circle; public classes do not know where they live."""

from __future__ import annotations

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
    assert not {name for name in bomkern.__all__ if name != "nn"} & set(rooms.FLOOR)
