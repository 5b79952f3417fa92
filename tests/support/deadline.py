"""A pytest plugin for a run that has so much time and no more, and keeps what it found however it ends.

    python -m pytest tests -p tests.support.deadline --stop-at 1767225600 --failures failed.txt --at-most 40

- ``--stop-at``: seconds since 1970 after which no test is begun; the others are skipped, and counted at the end.
- ``--failures``: a file that gets each failure as it comes, its traceback shortened; `failed_in` reads the names.
- ``--at-most``: how many tests are kept, as many of each file as there are, evenly through it.

SIGTERM ends the run as Ctrl-C does: with its summary, and with the file of a benchmark.
"""

from __future__ import annotations

import re
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

REASON = "not begun: the time was over"
LINES = 60  # of a failure's text at most


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deadline")
    group.addoption("--stop-at", type=float, metavar="SECONDS", help="since 1970, after which no test is begun")
    group.addoption("--failures", type=Path, metavar="FILE", help="gets each failure as it comes")
    group.addoption("--at-most", type=int, metavar="N", help="tests to keep, evenly from every file")


def pytest_configure(config: pytest.Config) -> None:
    # A process of xdist ends with the one that started it, which has the summary to write.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if hasattr(config, "workerinput") else _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the summary short
    raise KeyboardInterrupt("SIGTERM")


def chosen(files: list[str], most: int) -> list[int]:
    """Which of the tests in ``files``, a file's name for each test, are kept: every file in turn, evenly through it."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, file in enumerate(files):
        places[file].append(place)
    share = dict.fromkeys(places, 0)
    for _ in range(min(most, len(files))):
        poorest = min((f for f in places if share[f] < len(places[f])), key=lambda f: share[f])
        share[poorest] += 1
    return sorted(p[n * len(p) // share[f]] for f, p in places.items() for n in range(share[f]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--at-most")
    if most is None:
        return
    kept = set(chosen([item.nodeid.partition("::")[0] for item in items], most))
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n not in kept])
    items[:] = [item for n, item in enumerate(items) if n in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    stop = item.config.getoption("--stop-at")
    if stop is not None and time.time() >= stop:
        pytest.skip(REASON)


class _Reports:
    """What the process that hears of every test does; one of xdist's would write each failure a second time."""

    def __init__(self, failures: Path | None) -> None:
        self.failures = failures
        self.late = 0  # tests that were not begun

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.late += report.skipped and REASON in str(report.longrepr)
        if self.failures and report.failed:
            lines = report.longreprtext.splitlines()
            cut = [*lines[: LINES // 3], "...", *lines[-LINES * 2 // 3 :]] if len(lines) > LINES else lines
            with self.failures.open("a") as file:
                file.write("\n".join([f"FAILED {report.nodeid}", *(f"    {line}" for line in cut), ""]) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.late:
            terminalreporter.write_line(f"{self.late} tests were not begun in time", yellow=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Reports(session.config.getoption("--failures")), "deadline-reports")


def failed_in(text: str) -> list[str]:
    """The names of the tests in a file of ``--failures``, each once."""
    return list(dict.fromkeys(re.findall(r"^FAILED (.+)$", text, re.MULTILINE)))
