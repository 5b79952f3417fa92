"""Write each bench to a file as soon as it ends, so that a killed run loses the bench in flight alone.

pytest bench/ops/bench_min_goal.py --benchmark-only --keep FILE   # run again to continue
python -m bench.report FILE [FILE ...]                            # reads these files like those of --benchmark-json

FILE holds one JSON object per line. Each is on disk before the next bench begins, and several bench files may share
FILE:

- the head: ``kind``, ``machine`` from `bench.machine.described`, ``code``, a hash of the timed sources, ``date`` and
  ``command``;
- ``ceilings``: the machine's highest rate of a unit per second, written when a run first measures it;
- ``bench``, pytest's name of the bench, and ``row``, its figures; the row of a peer with a wrong result says so.

A bench in FILE is not timed again; one that failed or was skipped is not in it. FILE is refused on another machine,
with another torch or with other sources, because its figures would not be comparable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from bench import harness, machine
from bench.results import KEPT, apart, kept_lines, rounded, row_of

TIMED = ("bomkern", "csrc", "kernels")  # folders with the sources that benches time
SOURCES = (".py", ".cpp", ".h", ".cu")


def code() -> str:
    """Return a hash of the timed sources."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in TIMED for path in (machine.ROOT / folder).rglob("*")):
        if path.suffix in SOURCES:
            digest.update(f"{path.relative_to(machine.ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Keeper:
    """The pytest plugin of ``--keep``.

    Raises:
        pytest.UsageError: the file is not one of ``--keep``, or is of another machine, torch or version of the sources.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()  # names of the benches in the file
        self.wrong = len(harness.WRONG)  # how many entries of WRONG are in the file
        self.ceilings: set[str] = set()  # units whose ceiling this run has written
        self.left_out = 0  # benches of this run that are not run because they are in the file
        try:
            lines, size = kept_lines(path) if path.exists() else ([], 0)
        except json.JSONDecodeError as why:
            raise pytest.UsageError(f"--keep {path} is not a file of --keep: {why}") from why
        head = {
            "kind": KEPT, "machine": {**machine.described(), "ceilings": dict.fromkeys(machine.UNITS)}, "code": code(),
            "date": datetime.now(timezone.utc).isoformat(), "command": "pytest bench/ --benchmark-only --keep FILE",
        }  # fmt: skip
        if lines:
            self._go_on(path, lines, head)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        self.file.truncate(size)
        if not lines:
            self._write(head)

    def _go_on(self, path: Path, lines: list[dict[str, Any]], head: dict[str, Any]) -> None:
        begun = lines[0]
        if not isinstance(begun, dict) or begun.get("kind") != KEPT:
            raise pytest.UsageError(f"--keep {path} is not a file of --keep")
        was, now = ({**apart(each["machine"]), "sources": each["code"]} for each in (begun, head))
        if other := [f"{x} {was.get(x)}, not {now.get(x)}" for x in {**was, **now} if was.get(x) != now.get(x)]:
            raise pytest.UsageError(f"--keep {path} was begun with {'; '.join(other)}: name another file, or remove it")
        for line in lines:
            if "bench" in line:
                self.done.add(line["bench"])
                harness.note_slowest(line["row"])

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        known = [item for item in items if item.nodeid in self.done]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in self.done]
        self.left_out = len(known)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        outcome = yield
        if call.when != "call":
            return
        for row in harness.WRONG[self.wrong :]:
            self._write({"bench": item.nodeid, "row": row})
        self.wrong = len(harness.WRONG)
        fixture = item.funcargs.get("benchmark")
        if not outcome.get_result().passed or not fixture or not fixture.stats or fixture.has_error:
            return
        if new := {unit: rounded(most) for unit, most in machine.CEILINGS.items() if unit not in self.ceilings}:
            self._write({"ceilings": new})
            self.ceilings |= new.keys()
        self._write({"bench": item.nodeid, "row": row_of(fixture.stats.as_dict(include_data=False))})

    def pytest_unconfigure(self) -> None:
        self.file.close()
