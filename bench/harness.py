"""Time every op: check it against the reference, warm it up, and time batches of calls with one sync each.

A bench is one peer at one size in one direction on one kind of data, its *regime* (`bench.regimes`). It puts its
figures into ``extra_info``, which `bench.report` reads:

- ``op``, ``case``, ``direction``, ``peer``, ``size``, ``regime``: what was timed; ``impl``: bomkern's implementation.
- ``first_seconds``: seconds of the very first call, including compilation.
- ``work`` of a call in its ``unit`` (bytes, exponentials, flops) and ``rate``, the same per second. ``ceiling`` is the
  highest rate that this machine reached in the same run, and ``share`` is the rate over it.
- ``peak_bytes`` of memory, ``launches`` and ``syncs`` of a call. See `bench.machine`.
- On a GPU, unless backward is timed alone: ``host_us``, the host's time in a call; ``event_us``, the time between two
  events; ``graph_us``, the same for a replayed graph of the calls.

Outside of its usual regime a bench is brief and measures times alone. A peer with a wrong result there is not timed: it
is noted in `WRONG`, which goes into the file of the run.

With ``--keep FILE`` all of it is in FILE as soon as a bench ends (`bench.keep`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.machine import DEVICE
from bench.regimes import HALF, Inputs
from bench.report.worst import TURNS, as_info
from bench.results import USUAL
from bench.rounds import SLOW, least, looked_at, of_a_gpu, planned
from bomkern.dispatch import select

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OURS = "bomkern"  # the best implementation here; others are named, as in "bomkern triton"
OTHERS = [f"{OURS} {impl}" for impl in (("triton", "reference") if DEVICE == "cuda" else ("reference",))]
PEERS = (OURS, *OTHERS, "torch.compile", "eager")
COMPARED = (OURS, "torch.compile", "eager")  # in every regime
L2_TIMES = 2  # calls rotate through copies of the inputs that together are this many times a GPU's cache
ROUNDING = 2.0**-8  # relative rounding error of bfloat16
TINY = 1e-30  # near the end of single precision's range: smaller values count as zero
Size = Mapping[str, int]
Key = tuple[tuple[str, int], ...]  # a size as a hashable key
Function = Callable[..., Any]
WRONG: list[dict[str, Any]] = []  # peers with a wrong result in a regime, and their errors
SLOWEST: dict[tuple[str, Key], str] = {}  # the regime in which `in_turn` found our call slowest


class Wrong(AssertionError):
    """A result differs from the reference's."""


@dataclass(frozen=True, eq=False)
class Case:
    """An op with its inputs, peers and tolerances.

    Attributes:
        op: name of the op in `bomkern.info`. label: distinguishes this case from others of the op.
        make: makes the inputs of a regime and a size on `DEVICE`, leaves with gradients; the same each time.
        ours: called with the inputs and ``impl``. plain: called with the inputs; the code that a user would write.
        loss: maps the result of either to a 0-dim tensor, from which backward begins.
        work: maps size and direction to the work of a call, in ``unit``.
        regimes: regimes beside the usual one. tolerance: of values and of gradients, relative to the largest.
        half: the same for peers in half precision, relative in the Euclidean norm: goals that tie in its few digits
            may give the gradient to another goal.
        least: lower bounds, for values and for B times the gradients, of the size that an error is relative to.
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
    regimes: tuple[str, ...] = ()
    tolerance: tuple[float, float] = (1e-5, 1e-4)
    half: tuple[float, float] = (0.1, 0.2)
    least: tuple[float, float] = (0.0, 0.0)
    more: Mapping[str, Callable[[], Function]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}".strip()

    @property
    def usual(self) -> str:
        return USUAL[self.op]


def tensors_of(result: Any) -> Inputs:
    return (result,) if isinstance(result, Tensor) else tuple(x for x in result if isinstance(x, Tensor))


def traffic(read: int, forward: float = 1.0, backward: float = 2.0) -> Callable[[Size, str], float]:
    """Count the bytes of an op whose forward reads ``read`` [B, D] matrices; backward reads them and writes as many."""

    def work(size: Size, direction: str) -> float:
        forward_bytes = 4.0 * read * math.prod(size.values())
        return forward_bytes * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    return work


@functools.cache
def compiled(function: Function, size: Key, half: bool = False) -> Function:
    """Compile a function for this size and precision alone: for short calls that is faster than dynamic shapes."""
    mode = "max-autotune-no-cudagraphs" if DEVICE == "cuda" else None
    torch._dynamo.reset()  # without it dynamo reaches its limit of recompilations and runs the function uncompiled
    return torch.compile(function, mode=mode, dynamic=False)


def peer(case: Case, name: str, size: Key, regime: str = "") -> Function:
    """Return the function to time; skip the bench where it is not available."""
    if name == "eager":
        return case.plain
    if name == "torch.compile":
        return compiled(case.plain, size, regime == HALF)
    if name in case.more:
        return case.more[name]()
    impl = name.removeprefix(OURS).strip() or None
    best = select.choose(case.op, DEVICE, None).split()[-1]
    if impl and (reason := select.why_not(case.op, impl, DEVICE)):
        pytest.skip(f"{impl} cannot serve here: {reason}")
    if impl == best:
        pytest.skip(f"{impl} is the best implementation here, which {OURS} already times")
    return functools.partial(case.ours, impl=impl)


@functools.lru_cache(maxsize=1)
def inputs(case: Case, size: Key, regime: str = "") -> Inputs:
    """Return the inputs of a regime, by default the usual one."""
    return case.make(regime or case.usual, **dict(size))


@functools.lru_cache(maxsize=1)
def exact(case: Case, size: Key, regime: str = "") -> tuple[Inputs, Inputs]:
    """Return values and gradients of the reference in float64; the gradients are rounded to float32 to save memory."""
    x = tuple(t.detach().double().requires_grad_() for t in inputs(case, size, regime))
    result = case.ours(*x, impl="reference")
    grads = torch.autograd.grad(case.loss(result), x)
    return tuple(t.detach() for t in tensors_of(result)), tuple(g.float() for g in grads)


def check(case: Case, function: Function, size: Key, backward: bool, regime: str = "", name: str = "eager") -> None:
    """Compare a peer's values, and its gradients for ``backward``, with the reference's.

    Raises:
        Wrong: they differ by more than the tolerance.
    """
    x = inputs(case, size, regime)
    values, gradients = exact(case, size, regime)
    result = function(*x)
    norm, (near, steep) = torch.Tensor.norm if rough(name, regime) else _largest, tolerance(case, name, regime)
    for a, b in zip(tensors_of(result), values, strict=True):
        _close("a value", norm(a.detach().double() - b), near, max(norm(b), case.least[0]))
    if backward:
        for a, b in zip(torch.autograd.grad(case.loss(result), x), gradients, strict=True):
            _close("a gradient", norm(a.float() - b), steep, max(norm(b), case.least[1] / dict(size)["B"], TINY))


def rough(name: str, regime: str) -> bool:
    """Return whether a peer computes in half precision; bomkern's implementations never do."""
    return regime == HALF and not name.startswith(OURS)


def tolerance(case: Case, name: str, regime: str) -> tuple[float, float]:
    """Return the tolerances of values and of gradients; gradients of half inputs are rounded to half precision."""
    if rough(name, regime):
        return case.half
    values, gradients = case.tolerance
    return values, gradients + (ROUNDING if regime == HALF else 0.0)


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


def _close(what: str, error: Tensor, most: float, relative_to: Any) -> None:
    if not error <= most * relative_to:  # so written, NaN is an error too
        raise Wrong(f"{what} is off by {float(error / relative_to):.2g}, more than {most:.2g}")


def rotating(x: Inputs) -> list[Inputs]:
    """Return ``x``, and on a GPU enough copies to exceed the cache, so that each call reads memory."""
    if DEVICE == "cpu":
        return [x]
    size = sum(t.numel() * t.element_size() for t in x)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(64, 1 + math.ceil(L2_TIMES * cache / size))
    return [x, *(tuple(t.detach().clone().requires_grad_() for t in x) for _ in range(count - 1))]


def once(case: Case, function: Function, x: Inputs, backward: bool) -> machine.Step:
    """Return a function that makes one call; a forward keeps what its backward needs, as in training."""
    if backward:
        return lambda: torch.autograd.grad(case.loss(function(*x)), x)
    return lambda: function(*x)


def measure(benchmark: Any, case: Case, name: str, size: Size, direction: str, regime: str = "") -> None:
    """Time a peer; the head of this file lists the entries of ``benchmark.extra_info``."""
    key = tuple(size.items())
    brief = regime not in ("", case.usual)
    function = peer(case, name, key, regime)
    x = inputs(case, key, regime)
    info: dict[str, Any] = {"work": case.work(size, direction), "unit": case.unit, "regime": regime or case.usual}
    if name.startswith(OURS):
        info["impl"] = name.removeprefix(OURS).strip() or select.choose(case.op, DEVICE, None).split()[-1]
    try:
        call = once(case, function, x, direction != FORWARD)
        if not brief or name == "torch.compile":  # torch.compile compiles again for halves
            first = machine.seconds(call)
            info |= {} if brief else {"first_seconds": first}
        exact(case, key, regime)
        spent = machine.seconds(lambda: check(case, function, key, direction != FORWARD, regime, name))
        if direction == BOTH and not brief:
            info["peak_bytes"] = machine.peak_bytes(call, 1 if info["first_seconds"] > SLOW else 3)
            # Code compiled for a CPU hides its operators from the count.
            if DEVICE == "cuda" or name not in ("torch.compile", "KeOps"):
                info |= machine.counted(call)
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit in the GPU's memory at {dict(size)}")
    except Wrong as why:
        if not brief or name.startswith(OURS):
            raise
        described = {"op": case.op, "case": case.name, "direction": direction, "peer": name, "size": dict(size)}
        WRONG.append({**described, "regime": regime, "wrong": str(why)})
        pytest.skip(f"{name} is wrong here: {why}")
    about(benchmark, case.op, case.name, direction, name, size)
    if brief:
        benchmark.group += f" in {regime}"
    benchmark.extra_info.update(info)
    if direction == BACKWARD:
        timed_backward(benchmark, lambda: case.loss(function(*x)), x)
    else:
        steps = [once(case, function, y, direction == BOTH) for y in rotating(x)]
        known = spent if brief and spent > SLOW and not name.startswith(OURS) else None
        timed(benchmark, steps, not brief, brief, known)
    if benchmark.stats:  # absent with --benchmark-disable
        rate, ceiling = info["work"] / benchmark.stats.stats.median, machine.ceiling(case.unit)
        benchmark.extra_info.update(rate=rate, ceiling=ceiling, share=ceiling and rate / ceiling)


def in_turn(benchmark: Any, case: Case, size: Size) -> None:
    """Time our call in all regimes in turn, to compare the slowest with the fastest.

    ``spread`` in ``extra_info`` is slowest over fastest in single precision, and ``slowest`` names the regime.
    """
    key = tuple(size.items())
    calls = {
        regime: once(case, peer(case, OURS, key), inputs(case, key, regime), True)
        for regime in (case.usual, *case.regimes)
    }
    about(benchmark, case.op, case.name, TURNS, OURS, size)
    benchmark.extra_info.update(as_info(looked_at(calls)))
    note_slowest(benchmark.extra_info)
    benchmark.pedantic(calls[case.usual], rounds=1)  # a bench without a round is not written to the file


def note_slowest(info: Mapping[str, Any]) -> None:
    """Note the slowest regime that `in_turn` found, in this run or in the one that it continues."""
    if info["direction"] == TURNS and "slowest" in info:
        SLOWEST[info["case"], tuple(info["size"].items())] = info["slowest"]


def slowest(case: Case, size: Size) -> str:
    """Return the regime in which our call was slowest in this run, halves excluded: not every peer takes them."""
    return SLOWEST.get((case.name, tuple(size.items())), case.usual)


def about(benchmark: Any, op: str, case: str, direction: str, name: str, size: Size) -> None:
    """Describe a bench in its group and ``extra_info``; the peers of a group are shown together."""
    benchmark.group = f"{case} {direction} {' '.join(f'{letter}={n}' for letter, n in size.items())}"
    benchmark.extra_info.update(op=op, case=case, direction=direction, peer=name, size=dict(size), device=DEVICE)


def timed(
    benchmark: Any, steps: Sequence[machine.Step], graph: bool = True, brief: bool = False, call: float | None = None
) -> None:
    """Time the steps in turn, in rounds of many calls with one sync; on a GPU also as a ``graph``.

    ``call`` is the duration of one call in seconds, if known.
    """
    calls, rounds = planned(call or least(steps), brief)
    turn = itertools.cycle(steps)
    # The timer waits for a GPU (bench/conftest.py), so a round is a batch of calls with one sync.
    benchmark.pedantic(lambda: next(turn)(), rounds=rounds, iterations=calls, warmup_rounds=0 if calls == 1 else 1)
    if DEVICE == "cuda":
        benchmark.extra_info.update(of_a_gpu(steps, max(calls, len(steps)), graph))


def timed_backward(benchmark: Any, forward: Callable[[], Tensor], x: Inputs) -> None:
    """Time backward alone, one call a round: compiled code frees what forward saved, so a graph serves only once."""

    def graph() -> tuple[tuple[Tensor], dict[str, Any]]:
        return (forward(),), {}

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, x)

    loss = forward()
    _, rounds = planned(4 * machine.seconds(lambda: backward(loss)))
    benchmark.pedantic(backward, setup=graph, rounds=rounds, warmup_rounds=1)


def sizes_and(
    sizes: Sequence[Size],
    *peers: str,
    directions: Sequence[str] = (BOTH, FORWARD, BACKWARD),
    regimes: Sequence[str] = (),
    at: Sequence[int] = (),
) -> Callable[[Any], Any]:
    """Parametrize a test by size, regime, direction and peer, in this order, so that inputs are made once.

    The reference, the fallback where nothing is compiled, is timed in both directions together alone. So is every peer
    in ``regimes`` beside the usual one, which are timed at the batch sizes ``at``.
    """
    pairs = [(d, p) for d in directions for p in peers or PEERS if d == BOTH or not p.endswith("reference")]
    benches, ids = [], []
    for size in sizes:
        everywhere = regimes if size["B"] in at else ()
        for regime in ("", *everywhere):
            for direction, name in [(BOTH, p) for p in COMPARED] if regime else pairs:
                benches.append((size, regime, direction, name))
                where = [f"{letter}{n}" for letter, n in size.items()]
                ids.append("-".join([direction, name, *where, *([regime.replace(" ", "_")] if regime else [])]))
    return pytest.mark.parametrize(("size", "regime", "direction", "name"), benches, ids=ids)


def sizes_at(sizes: Sequence[Size], batches: Sequence[int]) -> Callable[[Any], Any]:
    """Parametrize a test by the sizes of these batches."""
    chosen = [size for size in sizes if size["B"] in batches]
    return pytest.mark.parametrize("size", chosen, ids=[f"B{size['B']}" for size in chosen])
