"""Set up every test: threads, hypothesis, Triton's interpreter and common fixtures."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # a dependency of torch
from hypothesis import settings

from tests.support.interpreter import patch_once_a_launch

torch.manual_seed(0)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # otherwise each process would start a thread for every core
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # for the processes that tests start
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # avoids a pool of compile processes in each of them
settings.register_profile("bomkern", deadline=None)  # a test may be slow on a busy machine
settings.load_profile("bomkern")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_once_a_launch()


LONG = 15  # seconds that an unmarked test may take
Build = Callable[[Path], None]


@pytest.fixture(scope="session")
def built_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, Iterable[Path], Build], Path]:
    """Return ``built_once(name, how, sources, build)``, which builds a folder once for all processes and returns it.

    The folder is kept in pytest's cache. It is rebuilt when a source or ``how``, the build command, changes.
    """
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    root = cache.mkdir("builds") if cache else tmp_path_factory.mktemp("builds")

    def folder(name: str, how: str, sources: Iterable[Path], build: Build) -> Path:
        digest = hashlib.sha256(how.encode())
        for path in sorted(sources):
            digest.update(path.name.encode() + path.read_bytes())
        made: Path = root / f"{name}-{digest.hexdigest()[:16]}"
        with FileLock(f"{root / name}.lock"):
            if not made.exists():
                for old in root.glob(f"{name}-*"):
                    shutil.rmtree(old)
                fresh = root / f"{name}-new"  # a build that fails or is killed must not look complete
                fresh.mkdir()
                build(fresh)
                fresh.rename(made)
        return made

    return folder


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher_is_left() -> Iterator[None]:
    """Take away what a test leaves of torchrun's variables. Accelerate sets LOCAL_WORLD_SIZE and keeps it."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List tests to mark slow or to speed up; a busy machine lists too many."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
    long = sorted((r for r in reports if r.duration > LONG and "slow" not in r.keywords), key=lambda r: -r.duration)
    if long:
        terminalreporter.section(f"not marked slow, and took over {LONG} s", sep="-")
        for report in long:
            terminalreporter.write_line(f"{report.duration:.0f}s {report.nodeid}")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable pictures, which take longer than the few steps of a test."""
    plots = pytest.importorskip("bomkern.train.plots")
    monkeypatch.setattr(plots, "contact_sheets", lambda *_: None)
