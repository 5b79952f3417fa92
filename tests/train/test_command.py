"""Test the `bomkern` command: its OpenMP settings before the import of torch, and a reader that stops early."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import bomkern_command
from bomkern.cli import READER_GONE


@pytest.mark.parametrize("said", [{}, {"OMP_NUM_THREADS": "2"}])
def test_waiting_threads_are_kept_short(said: dict[str, str]) -> None:
    environment = dict(said)
    bomkern_command.keep_waiting_short(environment)
    assert environment == said | bomkern_command.SHORT_SPIN


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "0"}, {"KMP_BLOCKTIME": "200"}])
def test_what_the_user_said_of_waiting_holds(said: dict[str, str]) -> None:
    environment = dict(said)
    bomkern_command.keep_waiting_short(environment)
    assert environment == said


def test_it_is_set_before_torch_is_loaded() -> None:
    code = (
        "import os, sys, bomkern_command\n"
        "assert 'torch' not in sys.modules\n"
        "class Seen:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); sys.meta_path.remove(self)\n"
        "sys.meta_path.insert(0, Seen())\n"
        "sys.argv = ['bomkern', 'info']\n"
        "bomkern_command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_without_openmp())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == bomkern_command.SHORT_SPIN["GOMP_SPINCOUNT"]


def _without_openmp() -> dict[str, str]:
    names = ("OMP_WAIT_POLICY", *bomkern_command.SHORT_SPIN)
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.mark.parametrize("arguments", [("info",), ("info", "--help")])
def test_a_reader_that_stops_early_ends_the_command_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        command = [sys.executable, "-W", "ignore", "-m", "bomkern", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_the_table_of_runs_on_the_same_cores() -> None:
    from bench.together import table

    shown = table({300_000: [5.0, 6.0, 5.5], 0: [4.0]}, {300_000: [0.5, 0.6, 0.7], 0: [2.0, 2.0, 2.0]})
    assert shown.splitlines()[0].startswith("| GOMP_SPINCOUNT | one alone") and "3 at once" in shown
    assert shown.splitlines()[2:] == ["| 300,000 | 5.50 | 1.80 |", "| 0 | 4.00 | 6.00 |"]
