"""Count the bad inputs that are refused, as a pytest plugin.

It counts each ``pytest.raises`` whose block raised the expected error.

    python -m pytest tests -m "not slow" -p tests.refusals -n auto

The run writes tests/results/refusals.json: the counts, the number of tests, and the counts by error. A test that fails
does not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parent / "results" / "refusals.json"
COMMAND = "pytest tests -m 'not slow' -p tests.refusals -n auto"
_here: list[str] = []  # errors of the running test
_errors: Counter[str] = Counter()
_tests = 0
_exit = pytest.RaisesExc.__exit__


def _counting(
    self: Any, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> bool:
    right = bool(_exit(self, kind, error, trace))
    if right and kind is not None:
        _here.append(kind.__name__)
    return right


def pytest_configure() -> None:
    pytest.RaisesExc.__exit__ = _counting  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    global _tests
    _here.clear()
    yield  # raises if the test failed
    _errors.update(_here)
    _tests += bool(_here)


def pytest_testnodedown(node: Any) -> None:
    """Add the counts of an xdist process that has ended."""
    global _tests
    told = getattr(node, "workeroutput", {}).get("refusals", {"tests": 0, "errors": {}})
    _tests += told["tests"]
    _errors.update(told["errors"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = {"command": COMMAND, "tests": _tests, "errors": dict(_errors.most_common())}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["refusals"] = found
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
