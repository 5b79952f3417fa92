"""Plan how often a call is repeated, and time calls in ways that pytest-benchmark lacks."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from bench import machine
from bench.machine import DEVICE

BUDGET = 0.3 if DEVICE == "cuda" else 0.5  # seconds for all rounds of a bench, if three fit
BRIEF = 0.1 if DEVICE == "cuda" else 0.15  # the same outside of the usual regime
ROUND = 4e-3  # least seconds for the calls of a round
SLOW = 1.0  # calls of more seconds are repeated only a few times
LOOKING, LOOKS = 1.5, (10, 40)  # seconds that `looked_at` takes, and its least and most rounds


def planned(call: float, brief: bool = False) -> tuple[int, int]:
    """Return calls per round and rounds, for a call of this many seconds."""
    calls = min(500, max(1, math.ceil(ROUND / call)))
    fewest = (2 if call > SLOW else 3) - (brief and call > BRIEF)
    return calls, min(30, max(fewest, int((BRIEF if brief else BUDGET) / (call * calls))))


def repeat(steps: Sequence[machine.Step], calls: int) -> None:
    """Make ``calls`` calls of the steps in turn, and drop each result at once."""
    for step in itertools.islice(itertools.cycle(steps), calls):
        step()


def least(steps: Sequence[machine.Step]) -> float:
    """Return the seconds of a call, the best of three unless it is slow."""
    best = math.inf
    for step in itertools.islice(itertools.cycle(steps), 3):
        best = min(best, machine.seconds(step))
        if best > SLOW:
            break
    return best


def looked_at(steps: Mapping[str, machine.Step]) -> dict[str, float]:
    """Return the seconds of a call of each step, best of several rounds. Steps alternate, so load affects all alike."""
    spent = {name: least([step]) for name, step in steps.items()}
    calls = {name: planned(call)[0] for name, call in spent.items()}
    once = sum((calls[name] + 1) * call for name, call in spent.items())
    best = dict.fromkeys(steps, math.inf)
    for _ in range(min(LOOKS[1], max(LOOKS[0], int(LOOKING / once)))):
        for name, step in steps.items():
            step()  # the first call after another step's is slower
            best[name] = min(best[name], machine.seconds(functools.partial(repeat, [step], calls[name])) / calls[name])
    return best


def of_a_gpu(steps: Sequence[machine.Step], calls: int, graph: bool = True, rounds: int = 10) -> dict[str, Any]:
    """Return microseconds of a call: on the host, between events, and between events of a replayed graph."""
    batch = functools.partial(repeat, steps, calls)

    def median(times: Iterable[float]) -> float:
        return 1e6 * statistics.median(times) / calls

    hosts, events = zip(*(_host_and_device(batch) for _ in range(rounds)), strict=True)
    times: dict[str, Any] = {"host_us": median(hosts), "event_us": median(events), "graph_us": None}
    if not graph:
        return times
    try:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            batch()
        captured.replay()
        times["graph_us"] = median(_host_and_device(captured.replay)[1] for _ in range(rounds))
    except RuntimeError as why:  # a call that reads a value on the host cannot be captured
        times["no_graph_because"] = (str(why).splitlines() or [type(why).__name__])[0]
        with contextlib.suppress(RuntimeError):  # the driver may report the failed capture once more
            machine.synchronize()
    return times


def _host_and_device(step: machine.Step) -> tuple[float, float]:
    """Return the host's seconds in a step, and the seconds between two events around it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    machine.synchronize()
    begun = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - begun
    end.synchronize()
    return host, start.elapsed_time(end) / 1e3
