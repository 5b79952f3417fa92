"""How every op is timed: checked against the reference, warmed up, in batches of calls with one sync.

A bench is one peer at one size in one direction. What it did is in its ``extra_info``, which `bench.report` reads:

- ``op``, ``case``, ``direction``, ``peer``, ``size``: what was timed; ``impl``: what served bomkern's.
- ``first_seconds``: the first call of all, with whatever was compiled for it.
- ``work`` of a call in its ``unit`` (bytes, exponentials, flops), ``rate`` in a second, ``ceiling``, the most of it
  that this machine does in a second by a measurement of the same run, and ``share`` of that.
- ``peak_bytes`` of memory, ``launches`` and ``syncs`` of a call. See `bench.machine`.
- on a GPU, unless backward is alone, ``host_us``, what a call holds the host; ``event_us`` between two events;
  ``graph_us`` the same when a graph of the calls is replayed.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.machine import DEVICE
from bomkern import _impl

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OURS = "bomkern"  # the best implementation here; others by name, "bomkern triton"
OTHERS = [f"{OURS} {impl}" for impl in (("triton", "reference") if DEVICE == "cuda" else ("reference",))]
PEERS = (OURS, *OTHERS, "torch.compile", "eager")
BUDGET = 0.3 if DEVICE == "cuda" else 0.5  # seconds that the rounds of a bench take together, if three fit
ROUND = 4e-3  # seconds that a round's calls take together, at least
SLOW = 1.0  # seconds of a call, from which on it is not repeated much
L2_TIMES = 2  # inputs are changed from call to call until they are so many times the size of a GPU's cache
Inputs = tuple[Tensor, ...]
Size = Mapping[str, int]
Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Case:
    """An op as it is benched.

    Attributes:
        op: as `bomkern.info` names it. label: what tells this case from others of the op.
        make: inputs of a size that require gradients, on `DEVICE`; the same each time.
        ours: called with the inputs and ``impl``. plain: with the inputs: what a user would write.
        loss: 0-dim, of what either returns; backward begins from it.
        work: of a call, by size and direction, in ``unit``.
        tolerance: of values and of gradients, relative to the largest.
        more: further peers.
    """

    op: str
    make: Callable[..., Inputs]
    ours: Function
    plain: Function
    loss: Callable[[Any], Tensor]
    work: Callable[[Size, str], float]
    unit: str = "bytes"
    label: str = ""
    tolerance: tuple[float, float] = (1e-5, 1e-4)
    more: Mapping[str, Callable[[], Function]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()


def tensors_of(result: Any) -> Inputs:
    return (result,) if isinstance(result, Tensor) else tuple(x for x in result if isinstance(x, Tensor))


def traffic(read: int, forward: float = 1.0, backward: float = 2.0) -> Callable[[Size, str], float]:
    """Bytes by count: forward reads ``read`` matrices of B x D, backward reads them again and writes as many."""

    def work(size: Size, direction: str) -> float:
        one = 4.0 * read * math.prod(size.values())
        return one * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    return work


@functools.cache
def compiled(function: Function, size: tuple[tuple[str, int], ...]) -> Function:
    """For this size alone, which is faster than one for all sizes where a call is short."""
    mode = "max-autotune-no-cudagraphs" if DEVICE == "cuda" else None
    torch._dynamo.reset()  # or the limit of recompilations of one function is met, and it is left uncompiled
    return torch.compile(function, mode=mode, dynamic=False)


def peer(case: Case, name: str, size: tuple[tuple[str, int], ...]) -> Function:
    """What is timed; the bench is skipped where it cannot be had."""
    if name == "eager":
        return case.plain
    if name == "torch.compile":
        return compiled(case.plain, size)
    if name in case.more:
        return case.more[name]()
    impl = name.removeprefix(OURS).strip() or None
    best = _impl.choose(case.op, DEVICE, None).split()[-1]
    if impl and (reason := _impl.why_not(case.op, impl, DEVICE)):
        pytest.skip(f"{impl} cannot serve here: {reason}")
    if impl == best:
        pytest.skip(f"{impl} is the best here, which {OURS} is")
    return functools.partial(case.ours, impl=impl)


@functools.lru_cache(maxsize=1)
def inputs(case: Case, size: tuple[tuple[str, int], ...]) -> Inputs:
    return case.make(**dict(size))


@functools.lru_cache(maxsize=1)
def exact(case: Case, size: tuple[tuple[str, int], ...]) -> tuple[Inputs, Inputs]:
    """Values and gradients by the reference in float64; the gradients rounded, to take less room."""
    x = tuple(t.detach().double().requires_grad_() for t in inputs(case, size))
    result = case.ours(*x, impl="reference")
    grads = torch.autograd.grad(case.loss(result), x)
    return tuple(t.detach() for t in tensors_of(result)), tuple(g.float() for g in grads)


def check(case: Case, function: Function, size: tuple[tuple[str, int], ...], backward: bool) -> None:
    """A peer that is wrong is not timed."""
    x = inputs(case, size)
    values, gradients = exact(case, size)
    result = function(*x)
    for a, b in zip(tensors_of(result), values, strict=True):
        assert (a.double() - b).abs().max() <= case.tolerance[0] * b.abs().max()
    if backward:
        for a, b in zip(torch.autograd.grad(case.loss(result), x), gradients, strict=True):
            assert (a - b).abs().max() <= case.tolerance[1] * b.abs().max()


def rotating(x: Inputs) -> list[Inputs]:
    """``x``, and on a GPU as many copies of it as do not fit into the cache, so that each call reads memory."""
    if DEVICE == "cpu":
        return [x]
    size = sum(t.numel() * t.element_size() for t in x)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, 1 + math.ceil(L2_TIMES * cache / size))
    return [x, *(tuple(t.detach().clone().requires_grad_() for t in x) for _ in range(count - 1))]


def once(case: Case, function: Function, x: Inputs, backward: bool) -> machine.Step:
    """One call; a forward as training has it, which keeps what its backward needs."""
    if backward:
        return lambda: torch.autograd.grad(case.loss(function(*x)), x)
    return lambda: function(*x)


def planned(call: float) -> tuple[int, int]:
    """Calls of a round and rounds, for a call of so many seconds."""
    calls = min(500, max(1, math.ceil(ROUND / call)))
    return calls, min(30, max(2 if call > SLOW else 3, int(BUDGET / (call * calls))))


def measure(benchmark: Any, case: Case, name: str, size: Size, direction: str) -> None:
    """Time a peer; see the head of this file for what ends up in ``benchmark.extra_info``."""
    key = tuple(size.items())
    function = peer(case, name, key)
    x = inputs(case, key)
    info: dict[str, Any] = {"work": case.work(size, direction), "unit": case.unit}
    if name.startswith(OURS):
        info["impl"] = name.removeprefix(OURS).strip() or _impl.choose(case.op, DEVICE, None).split()[-1]
    try:
        begun = time.perf_counter()
        call = once(case, function, x, direction != FORWARD)
        machine.seconds(call)
        info["first_seconds"] = time.perf_counter() - begun
        check(case, function, key, direction != FORWARD)
        if direction == BOTH:
            info["peak_bytes"] = machine.peak_bytes(call, 1 if info["first_seconds"] > SLOW else 3)
            # What is compiled for a CPU hides its operators from those who count.
            if DEVICE == "cuda" or name not in ("torch.compile", "KeOps"):
                info |= machine.counted(call)
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit in the GPU's memory at {dict(size)}")
    about(benchmark, case.op, case.name, direction, name, size)
    benchmark.extra_info.update(info)
    if direction == BACKWARD:
        timed_backward(benchmark, lambda: case.loss(function(*x)), x)
    else:
        timed(benchmark, [once(case, function, y, direction == BOTH) for y in rotating(x)])
    if benchmark.stats:  # none with --benchmark-disable
        rate, ceiling = info["work"] / benchmark.stats.stats.median, machine.ceiling(case.unit)
        benchmark.extra_info.update(rate=rate, ceiling=ceiling, share=ceiling and rate / ceiling)


def about(benchmark: Any, op: str, case: str, direction: str, name: str, size: Size) -> None:
    """Say what a bench times; peers of one group stand side by side."""
    benchmark.group = f"{case} {direction} {' '.join(f'{letter}={n}' for letter, n in size.items())}"
    benchmark.extra_info.update(op=op, case=case, direction=direction, peer=name, size=dict(size), device=DEVICE)


def timed(benchmark: Any, steps: Sequence[machine.Step], graph: bool = True) -> None:
    """Time calls, one step after the other in turn, in rounds of many with one sync; on a GPU also as a ``graph``."""
    calls, rounds = planned(least(steps))
    turn = itertools.cycle(steps)
    # The timer waits for a GPU (bench/conftest.py), so a round is a batch of calls with one sync.
    benchmark.pedantic(lambda: next(turn)(), rounds=rounds, iterations=calls, warmup_rounds=0 if calls == 1 else 1)
    if DEVICE == "cuda":
        benchmark.extra_info.update(_of_a_gpu(steps, max(calls, len(steps)), graph))


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


def timed_backward(benchmark: Any, forward: Callable[[], Tensor], x: Inputs) -> None:
    """Time backward alone, one a round: what is compiled lets go of what forward kept, and can only do it once."""

    def graph() -> tuple[tuple[Tensor], dict[str, Any]]:
        return (forward(),), {}

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, x)

    loss = forward()
    _, rounds = planned(4 * machine.seconds(lambda: backward(loss)))
    benchmark.pedantic(backward, setup=graph, rounds=rounds, warmup_rounds=1)


def _of_a_gpu(steps: Sequence[machine.Step], calls: int, graph: bool = True, rounds: int = 10) -> dict[str, Any]:
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
        found["no_graph_because"] = str(why).splitlines()[0]
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


def sizes_and(
    sizes: Sequence[Size], *peers: str, directions: Sequence[str] = (BOTH, FORWARD, BACKWARD)
) -> Callable[[Any], Any]:
    """Parametrizes a test by peer, within direction, within size: what a size needs is made once.

    The reference, which is for where nothing was compiled, is timed in both directions together alone.
    """
    pairs = [(d, p) for d in directions for p in peers or PEERS if d == BOTH or not p.endswith("reference")]

    def mark(test: Any) -> Any:
        ids = ["-".join(f"{letter}{n}" for letter, n in size.items()) for size in sizes]
        test = pytest.mark.parametrize("size", list(sizes), ids=ids)(test)
        return pytest.mark.parametrize(("direction", "name"), pairs, ids=["-".join(pair) for pair in pairs])(test)

    return mark
