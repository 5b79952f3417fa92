"""Time the whole nine-goal step of the trainer against plain PyTorch, a weighted sum, and Jacobian descent (TorchJD).

The step includes networks, discriminator and updates, at 64 px. Each variant is checked before it is timed. The
gradients of the hard minimum are compared with each other. Those of the default rule, with a budget so large that each
goal takes all rows, are compared with those of exact spill. Of the other rules the losses are compared.
"""

from __future__ import annotations

import functools
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.harness import about, timed
from bench.machine import DEVICE
from bench.report.page import PARTS

try:
    from bench import step
    from bomkern.train.data import DataError
except ModuleNotFoundError as why:  # a requirement of the trainer
    pytest.skip(f"the trainer needs {why.name}: pip install 'bomkern[train]'", allow_module_level=True)

BATCHES = (64, 512, 2048)
# Rounds, and steps timed in parts, for each batch; the first of several steps in parts is a warm-up.
REPEATS = {64: (7, 3), 512: (3, 2), 2048: (1, 1)} if DEVICE == "cpu" else dict.fromkeys(BATCHES, (0, 6))
WALKS_MANY = ("UPGrad", "MGDA")  # these need a backward for each goal: timed at the smallest batch alone
HARD = ("bomkern lazy", "bomkern routed", "bomkern", "plain", step.BLOCKS)
LEFT_OUT = {
    64: (step.BLOCKS,),
    512: (step.BLOCKS, step.DEAREST, *step.RULES),
    2048: (step.SPILL, *step.BUDGETED, *step.RULES),
}
CASES = [(batch, variant) for batch in BATCHES for variant in step.VARIANTS if variant not in LEFT_OUT[batch]]
SAMPLE, TERM = 24e6, 40.0  # bytes of a sample in the networks, and of an element of B x B x D in eager statistics


@functools.lru_cache(maxsize=1)
def expected(batch: int) -> tuple[list[Tensor | None], Tensor]:
    """Return the gradients of the hard minimum, and the mean deficits, from bomkern with every graph walked."""
    run = step.Run("bomkern", batch, step.started())
    with torch.no_grad():
        values = run.statistics(*run.passes())
    return run.gradients(), run.deficits(dict(zip(step.goal.GOALS, values, strict=True)))


@functools.lru_cache(maxsize=1)
def all_rows(batch: int) -> list[Tensor | None]:
    """Return the gradients of the spill step in which each goal takes all rows."""
    return step.Run(step.SPILL, batch, step.started()).gradients()


def check(run: step.Run) -> None:
    batch = run.config.batch_size
    want, deficits = expected(batch)
    budget = run.goals.row_budget
    if run.variant in (*HARD, step.SPILL) or budget is not None:
        if budget is None:
            grads = run.gradients()
        else:
            rows, budget.budget = budget.budget, 1e9
            grads = run.gradients()
            budget.budget = rows
        want = want if run.variant in HARD else all_rows(batch)
        off = sum(float((_or_zeros(a, b) - b).norm()) ** 2 for a, b in zip(grads, want, strict=True) if b is not None)
        assert off**0.5 <= 1e-3 * sum(float(b.norm()) ** 2 for b in want if b is not None) ** 0.5
    else:
        with torch.no_grad():
            values = run.statistics(*run.passes())
        actual = run.deficits(dict(zip(step.goal.GOALS, values, strict=True)))
        assert torch.allclose(actual, deficits, rtol=1e-3, atol=1e-4)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def room(batch: int, name: str) -> None:
    """Skip a variant that does not fit into memory: on a CPU the system would kill the process."""
    if DEVICE == "cuda" or not (info := Path("/proc/meminfo")).exists():
        return
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1])  # type: ignore[index]
    eager = not name.startswith("bomkern") and name != step.BLOCKS
    need = SAMPLE * batch + eager * TERM * batch**2 * 64
    if need > free:
        pytest.skip(f"{name} at B = {batch:,} needs some {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


@pytest.fixture
def trial(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tell whether this is a trial (`--trial`), which hardly warms up, takes small images and runs no compiler."""
    wanted = bool(request.config.getoption("--trial"))
    if wanted:
        monkeypatch.setattr(step, "WARM", 2)
        monkeypatch.setattr(step, "SIZE", 32)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return wanted


@pytest.mark.parametrize(("batch", "name"), CASES, ids=[f"B{b}-{v.replace(' ', '-')}" for b, v in CASES])
def test_step(benchmark: Any, trial: bool, batch: int, name: str) -> None:
    if name in WALKS_MANY:
        pytest.importorskip("torchjd", reason="TorchJD is not installed; pip install 'bomkern[bench]'")
    room(batch, name)
    try:
        step.data()
    except DataError as why:
        pytest.skip(str(why))
    try:
        run = step.Run(name, batch, step.started())
        check(run)
        measure(benchmark, run, trial)
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} at B = {batch:,} does not fit into the GPU's memory")


def measure(benchmark: Any, run: step.Run, trial: bool) -> None:
    batch, info = run.config.batch_size, benchmark.extra_info
    about(benchmark, "step", "nine-goal step", "whole", run.variant, {"B": batch})
    rounds, cuts = (1, 1) if trial else REPEATS[batch]
    if run.variant not in (*WALKS_MANY, "bomkern lazy", *step.BUDGETED):  # these cannot be cut around their loss
        parts: list[dict[str, float]] = []
        for _ in range(cuts):
            run.in_parts(clock := step.Clock())
            parts.append(clock.seconds)
        info["parts"] = {p: statistics.median(x[p] for x in parts[1:] or parts) for p in PARTS}
    if run.variant == step.COMPILED:
        info["first_seconds"] = run.first_seconds
    elif batch == BATCHES[0]:
        info.update(machine.counted(run.whole))
    if DEVICE == "cuda":
        info["peak_bytes"] = machine.peak_bytes(run.whole)
        timed(benchmark, [run.whole], graph=False)  # the optimisers are not capturable
    else:
        # Memory is read outside of the timed step.
        info["peak_bytes"] = machine.peak_bytes(lambda: benchmark.pedantic(run.whole, rounds=rounds), 1)
