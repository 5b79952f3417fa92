"""Test the benches on a machine with torch, pytest and pytest-benchmark alone: no numpy, no matplotlib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, outside_xdist

ABSENT = (
    *(
        "matplotlib",
        "pykeops",
        "torchjd",
        "tqdm",
        "numpy",
        "lightning_fabric",
        "pytorch_lightning",
        "skimage",
        "sklearn",
    ),
    *("PIL", "tensorboard", "torchmetrics", "mkdocs"),
)
BARE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); "


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process where importing an absent package fails."""
    command = [sys.executable, "-W", "ignore", "-c", BARE + code]
    return subprocess.run(command, cwd=ROOT, env=outside_xdist(), capture_output=True, text=True)


def pytest_with(*arguments: str) -> subprocess.CompletedProcess[str]:
    return bare(f"import pytest; sys.exit(pytest.main({['-p', 'no:cacheprovider', *arguments]}))")


def test_every_file_of_benches_is_collected_or_says_what_it_needs() -> None:
    done = pytest_with("bench", "--collect-only", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    paths = sorted((ROOT / "bench" / "ops").glob("bench_*.py"))
    assert paths
    for path in paths:
        assert f"bench/ops/{path.name}" in done.stdout, path
    assert "the trainer needs " in done.stdout and "pip install 'bomkern[train]'" in done.stdout


def test_a_file_that_is_skipped_is_no_failure() -> None:
    done = pytest_with("bench/ops/bench_step.py", "--benchmark-only")
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_benches_are_timed_kept_and_reported(tmp_path: Path) -> None:
    chosen = "B512 and forward and step_0 or B512 and test_regimes_in_turn"  # includes codes of a real run
    kept = tmp_path / "bench.jsonl"
    done = pytest_with("bench/ops/bench_gaussian_kl.py", "--benchmark-only", "-k", chosen, f"--keep={kept}", "-rs")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    done = bare(
        f"from bench.report import write; sys.exit(write.main([{str(kept)!r}, '--results', {str(tmp_path)!r}]))"
    )
    assert done.returncode == 0 and "no pictures" in done.stderr, done.stdout + done.stderr
    assert "gaussian_kl" in (tmp_path / "README.md").read_text()


def test_what_trains_says_what_it_needs() -> None:
    done = bare("from bench.route import command; sys.exit(command.main([]))")
    assert done.returncode == 2 and "bench.route trains, which needs " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "module", ["bench.kernels --device cpu --only active_units,reference", "bench.predictions --check"]
)
def test_a_command_runs(module: str) -> None:
    name, *arguments = module.split()
    done = bare(f"import {name} as command; sys.exit(command.main({arguments}))")
    assert done.returncode == 0, done.stdout + done.stderr
