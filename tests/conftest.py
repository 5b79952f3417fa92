"""What every op's tests share: the implementations to run, and how close is close enough."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # that torch brings
from hypothesis import settings
from torch import Tensor

from bomkern.dispatch import select
from tests.support.interpreter import patch_once_a_launch

ROOT = Path(__file__).resolve().parent.parent
torch.manual_seed(0)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # processes that share the cores would else each start a thread on every one
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiling processes to each of them
settings.register_profile("bomkern", deadline=None)  # a busy machine is no failure
settings.load_profile("bomkern")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    patch_once_a_launch()


PAIRS = (
    ("reference", "cpu"),
    ("cpu", "cpu"),
    ("triton", "cpu"),
    ("cuda", "cuda"),
    ("triton", "cuda"),
    ("reference", "cuda"),
)


def why_skipped(op: str, impl: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU here"
    return select.why_not(op, impl, device)


def servers(op: str) -> list[object]:
    """The (impl, device) pairs that can serve here, for parametrize. tests/dispatch/test_info.py reports the others."""
    return [pytest.param(pair, id="-".join(pair)) for pair in PAIRS if why_skipped(op, *pair) is None]


def grad_of(x: Tensor) -> Tensor:
    """The gradient of a leaf; zeros where it is undefined, as that of a goal without a share is."""
    return torch.zeros_like(x) if x.grad is None else x.grad


def assert_as_good_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, slack: float = 1e-6, unit: float = 0.0) -> None:
    """Our largest error against float64 is at most twice eager float32's, or ``slack`` of the largest value.

    ``unit``: the size of what was added up, where the result may cancel to nothing and has no size of its own.
    """
    ours, eager, exact = (t.detach().double().cpu() for t in (ours, eager, exact))
    assert ours.shape == exact.shape
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities and NaN have no distance
    assert torch.isfinite(ours)[~same].all(), f"got {ours[~same]}, want {exact[~same]}"
    if same.all():
        return
    error, allowed = (ours - exact)[~same].abs().max(), 2 * (eager - exact)[~same].nan_to_num().abs().max()
    size = max(exact[~same].abs().max().item(), unit)
    assert error <= allowed + slack * size, f"error {error:.3g}, allowed {allowed:.3g} + {slack} of {size:.3g}"


def outside_xdist() -> dict[str, str]:
    """The environment of a pytest that is no worker of this one: in a worker nothing is benched."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


LONG = 15  # seconds of a test that is not marked slow
Build = Callable[[Path], None]


@pytest.fixture(scope="session")
def built_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, Iterable[Path], Build], Path]:
    """``built_once(name, how, sources, build)``: the folder that ``build`` filled, by the first process that needs it.

    It is kept in pytest's cache, and built anew where a source or ``how``, the words of the command, has changed.
    """
    cache = getattr(request.config, "cache", None)  # not there with -p no:cacheprovider
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
                fresh = root / f"{name}-new"  # a build that fails or is killed leaves nothing that looks whole
                fresh.mkdir()
                build(fresh)
                fresh.rename(made)
        return made

    return folder


def run_again(files: str, selection: str, **environment: str) -> None:
    """Runs a selection of the tests of a file, or more, in a process of its own, with more in its environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split(), "-k", selection]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def check_no_spills(module: str, least: int) -> None:
    """A test module, run as a script that compiles kernels, prints at least so many lines and spills no register."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) >= least
    for line in lines:
        assert re.search(r"stack 0 local 0$", line), f"spills registers: {line}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names what should be marked slow, or be made faster; on a busy machine that may be too many."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
    long = sorted((r for r in reports if r.duration > LONG and "slow" not in r.keywords), key=lambda r: -r.duration)
    if long:
        terminalreporter.section(f"not marked slow, and took over {LONG} s", sep="-")
        for report in long:
            terminalreporter.write_line(f"{report.duration:.0f}s {report.nodeid}")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without pictures, which take longer than the few steps of a test."""
    plots = pytest.importorskip("bomkern.train.plots")
    monkeypatch.setattr(plots, "contact_sheets", lambda *_: None)
