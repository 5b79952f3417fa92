"""Keeps each bench as soon as it ends, so that whoever stops the run, SIGKILL too, takes the bench in flight alone.

pytest bench/ops/bench_min_goal.py --benchmark-only --keep FILE   # again and again: it goes on where it was
python -m bench.report FILE [FILE ...]                        # reads such files as those of --benchmark-json

FILE holds a JSON object a line, each on the disk before the next bench begins; many bench files may share one:

- the head: ``kind``, ``machine`` as `bench.machine.described` has it, ``code``, a sum over the sources that are timed,
  ``date`` and ``command``;
- ``ceilings``, the most that the machine does of a unit in a second, when a run has measured it for the first time;
- ``bench``, the name that pytest has for it, and ``row``, what is kept of it; that of a peer which was wrong says so.

A bench that is in FILE is not timed again; one that failed or was skipped is not in it. FILE goes on with the machine,
the torch and the sources that it was begun with, and is refused with others: their figures would stand side by side.
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

TIMED = ("bomkern", "csrc", "kernels")  # folders of the sources that decide what a bench finds
SOURCES = (".py", ".cpp", ".h", ".cu")


def code() -> str:
    """A sum over the sources."""
    found = hashlib.sha256()
    for path in sorted(path for folder in TIMED for path in (machine.ROOT / folder).rglob("*")):
        if path.suffix in SOURCES:
            found.update(f"{path.relative_to(machine.ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Keeper:
    """The plugin of ``--keep``.

    Raises:
        pytest.UsageError: the file is of something else, another machine, another torch or other sources.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()  # names of benches
        self.wrong = len(harness.WRONG)  # of those that are in the file
        self.ceilings: set[str] = set()  # those of this run that are in the file
        self.left_out = 0  # benches of this run that are in the file
        try:
            lines, size = kept_lines(path) if path.exists() else ([], 0)
        except json.JSONDecodeError as why:
            raise pytest.UsageError(f"--keep {path} is no file of --keep: {why}") from why
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
            raise pytest.UsageError(f"--keep {path} is no file of --keep")
        was, now = ({**apart(one["machine"]), "sources": one["code"]} for one in (begun, head))
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
