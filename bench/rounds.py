"""How often a call is repeated, and the ways to time it beside pytest-benchmark's."""

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

BUDGET = 0.3 if DEVICE == "cuda" else 0.5  # seconds that the rounds of a bench take together, if three fit
BRIEF = 0.1 if DEVICE == "cuda" else 0.15  # the same outside of the usual regime
ROUND = 4e-3  # seconds that a round's calls take together, at least
SLOW = 1.0  # seconds of a call, from which on it is not repeated much
LOOKING, LOOKS = 1.5, (10, 40)  # seconds that `looked_at` takes, and rounds at least and at most


def planned(call: float, brief: bool = False) -> tuple[int, int]:
    """Calls of a round and rounds, for a call of so many seconds."""
    calls = min(500, max(1, math.ceil(ROUND / call)))
    fewest = (2 if call > SLOW else 3) - (brief and call > BRIEF)
    return calls, min(30, max(fewest, int((BRIEF if brief else BUDGET) / (call * calls))))


def repeat(steps: Sequence[machine.Step], calls: int) -> None:
    """So many calls, one step after the other in turn, each result dropped at once."""
    for step in itertools.islice(itertools.cycle(steps), calls):
        step()


def least(steps: Sequence[machine.Step]) -> float:
    """Seconds of a call, the best of three unless it is slow."""
    best = math.inf
    for step in itertools.islice(itertools.cycle(steps), 3):
        best = min(best, machine.seconds(step))
        if best > SLOW:
            break
    return best


def looked_at(steps: Mapping[str, machine.Step]) -> dict[str, float]:
    """Seconds of a call of each, the best of some rounds that go from one to the next: a busy neighbour meets all."""
    spent = {name: least([step]) for name, step in steps.items()}
    calls = {name: planned(call)[0] for name, call in spent.items()}
    once = sum((calls[name] + 1) * call for name, call in spent.items())
    best = dict.fromkeys(steps, math.inf)
    for _ in range(min(LOOKS[1], max(LOOKS[0], int(LOOKING / once)))):
        for name, step in steps.items():
            step()  # the one after another's calls is slower
            best[name] = min(best[name], machine.seconds(functools.partial(repeat, [step], calls[name])) / calls[name])
    return best


def of_a_gpu(steps: Sequence[machine.Step], calls: int, graph: bool = True, rounds: int = 10) -> dict[str, Any]:
    """Microseconds of a call: of the host, between events, and between events when a graph of the calls is replayed."""
    batch = functools.partial(repeat, steps, calls)

    def median(times: Iterable[float]) -> float:
        return 1e6 * statistics.median(times) / calls

    hosts, events = zip(*(_host_and_device(batch) for _ in range(rounds)), strict=True)
    found: dict[str, Any] = {"host_us": median(hosts), "event_us": median(events), "graph_us": None}
    if not graph:
        return found
    try:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            batch()
        captured.replay()
        found["graph_us"] = median(_host_and_device(captured.replay)[1] for _ in range(rounds))
    except RuntimeError as why:  # what reads a value on the host cannot be captured
        found["no_graph_because"] = (str(why).splitlines() or [type(why).__name__])[0]
        with contextlib.suppress(RuntimeError):  # the driver may tell of the capture once more
            machine.synchronize()
    return found


def _host_and_device(step: machine.Step) -> tuple[float, float]:
    """Seconds until the host was done with a step, and between two events around it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    machine.synchronize()
    begun = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - begun
    end.synchronize()
    return host, start.elapsed_time(end) / 1e3
