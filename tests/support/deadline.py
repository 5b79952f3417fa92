"""A pytest plugin that ends a run on time, and keeps its failures however it ends.

    python -m pytest tests -p tests.support.deadline --stop-at 1767225600 --failures failed.txt --at-most 40

- ``--stop-at``: seconds since 1970 after which no test begins; the others are skipped, and counted at the end.
- ``--failures``: a file that gets each failure as it occurs, with a shortened traceback; `failed_in` reads the names.
- ``--at-most``: the number of tests to keep, spread evenly over the files and within each file.

SIGTERM ends the run as Ctrl-C does: it still prints its summary and writes the benchmark's file.
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
LINES = 60  # at most so many lines of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deadline")
    group.addoption("--stop-at", type=float, metavar="SECONDS", help="since 1970, after which no test is begun")
    group.addoption("--failures", type=Path, metavar="FILE", help="gets each failure as it comes")
    group.addoption("--at-most", type=int, metavar="N", help="tests to keep, evenly from every file")


def pytest_configure(config: pytest.Config) -> None:
    # An xdist worker ends with its parent, which still has to write the summary.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if hasattr(config, "workerinput") else _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM would interrupt the summary
    raise KeyboardInterrupt("SIGTERM")


def chosen(files: list[str], most: int) -> list[int]:
    """Return the indices of the tests to keep, evenly over the files and within each file.

    ``files`` holds the file of each test.
    """
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
    """Write the failures and the count of skipped tests.

    Only the main process registers it; an xdist worker would write each failure twice.
    """

    def __init__(self, failures: Path | None) -> None:
        self.failures = failures
        self.late = 0  # tests that did not begin

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
    """Return the names of the failed tests in the text of a ``--failures`` file, without duplicates."""
    return list(dict.fromkeys(re.findall(r"^FAILED (.+)$", text, re.MULTILINE)))
