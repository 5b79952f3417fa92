"""How every op is timed: checked against the reference, warmed up, in batches of calls with one sync.

A bench is one peer at one size in one direction on one kind of data, its *regime* (`bench.regimes`). What it did is in
its ``extra_info``, which `bench.report` reads:

- ``op``, ``case``, ``direction``, ``peer``, ``size``, ``regime``: what was timed; ``impl``: what served bomkern's.
- ``first_seconds``: the first call of all, with whatever was compiled for it.
- ``work`` of a call in its ``unit`` (bytes, exponentials, flops), ``rate`` in a second, ``ceiling``, the most of it
  that this machine does in a second by a measurement of the same run, and ``share`` of that.
- ``peak_bytes`` of memory, ``launches`` and ``syncs`` of a call. See `bench.machine`.
- on a GPU, unless backward is alone, ``host_us``, what a call holds the host; ``event_us`` between two events;
  ``graph_us`` the same when a graph of the calls is replayed.

Outside of its usual regime a bench is brief and takes times alone. A peer whose result is wrong there is not timed, but
noted in `WRONG`, which goes into the file of the run.

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
OURS = "bomkern"  # the best implementation here; others by name, "bomkern triton"
OTHERS = [f"{OURS} {impl}" for impl in (("triton", "reference") if DEVICE == "cuda" else ("reference",))]
PEERS = (OURS, *OTHERS, "torch.compile", "eager")
COMPARED = (OURS, "torch.compile", "eager")  # in every regime
L2_TIMES = 2  # inputs are changed from call to call until they are so many times the size of a GPU's cache
ROUNDING = 2.0**-8  # of a bfloat16, relative
TINY = 1e-30  # where single precision comes to an end, and zero is as good
Size = Mapping[str, int]
Key = tuple[tuple[str, int], ...]  # of a size
Function = Callable[..., Any]
WRONG: list[dict[str, Any]] = []  # peers that gave a wrong result in a regime, and by how much
SLOWEST: dict[tuple[str, Key], str] = {}  # the regime in which `in_turn` found our call slowest


class Wrong(AssertionError):
    """A result is not that of the reference."""


@dataclass(frozen=True, eq=False)
class Case:
    """An op as it is benched.

    Attributes:
        op: as `bomkern.info` names it. label: what tells this case from others of the op.
        make: inputs of a regime and a size that require gradients, on `DEVICE`; the same each time.
        ours: called with the inputs and ``impl``. plain: with the inputs: what a user would write.
        loss: 0-dim, of what either returns; backward begins from it.
        work: of a call, by size and direction, in ``unit``.
        regimes: beside the usual one. tolerance: of values and of gradients, relative to the largest.
        half: the same of peers that compute in half precision, relative in the Euclidean norm: where goals tie to its
            few digits, another goal gets the gradient.
        least: of values and, B times, of gradients: what an error is relative to where none of them is larger.
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
    """Bytes by count: forward reads ``read`` matrices of B x D, backward reads them again and writes as many."""

    def work(size: Size, direction: str) -> float:
        one = 4.0 * read * math.prod(size.values())
        return one * {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]

    return work


@functools.cache
def compiled(function: Function, size: Key, half: bool = False) -> Function:
    """For this size and precision alone, which is faster than one for all where a call is short."""
    mode = "max-autotune-no-cudagraphs" if DEVICE == "cuda" else None
    torch._dynamo.reset()  # or the limit of recompilations of one function is met, and it is left uncompiled
    return torch.compile(function, mode=mode, dynamic=False)


def peer(case: Case, name: str, size: Key, regime: str = "") -> Function:
    """What is timed; the bench is skipped where it cannot be had."""
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
        pytest.skip(f"{impl} is the best here, which {OURS} is")
    return functools.partial(case.ours, impl=impl)


@functools.lru_cache(maxsize=1)
def inputs(case: Case, size: Key, regime: str = "") -> Inputs:
    """Those of a regime, the usual one where none is named."""
    return case.make(regime or case.usual, **dict(size))


@functools.lru_cache(maxsize=1)
def exact(case: Case, size: Key, regime: str = "") -> tuple[Inputs, Inputs]:
    """Values and gradients by the reference in float64; the gradients rounded, to take less room."""
    x = tuple(t.detach().double().requires_grad_() for t in inputs(case, size, regime))
    result = case.ours(*x, impl="reference")
    grads = torch.autograd.grad(case.loss(result), x)
    return tuple(t.detach() for t in tensors_of(result)), tuple(g.float() for g in grads)


def check(case: Case, function: Function, size: Key, backward: bool, regime: str = "", name: str = "eager") -> None:
    """A peer that is wrong is not timed.

    Raises:
        Wrong: it is.
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
    """Whether a peer computes in half precision, which no implementation of ours does."""
    return regime == HALF and not name.startswith(OURS)


def tolerance(case: Case, name: str, regime: str) -> tuple[float, float]:
    """Of values and of gradients; those of halves are halves, and rounded to that."""
    if rough(name, regime):
        return case.half
    values, gradients = case.tolerance
    return values, gradients + (ROUNDING if regime == HALF else 0.0)


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


def _close(what: str, error: Tensor, most: float, relative_to: Any) -> None:
    if not error <= most * relative_to:  # nor where it is NaN
        raise Wrong(f"{what} is off by {float(error / relative_to):.2g}, more than {most:.2g}")


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


def measure(benchmark: Any, case: Case, name: str, size: Size, direction: str, regime: str = "") -> None:
    """Time a peer; see the head of this file for what ends up in ``benchmark.extra_info``."""
    key = tuple(size.items())
    brief = regime not in ("", case.usual)
    function = peer(case, name, key, regime)
    x = inputs(case, key, regime)
    info: dict[str, Any] = {"work": case.work(size, direction), "unit": case.unit, "regime": regime or case.usual}
    if name.startswith(OURS):
        info["impl"] = name.removeprefix(OURS).strip() or select.choose(case.op, DEVICE, None).split()[-1]
    try:
        call = once(case, function, x, direction != FORWARD)
        if not brief or name == "torch.compile":  # which compiles anew for halves
            first = machine.seconds(call)
            info |= {} if brief else {"first_seconds": first}
        exact(case, key, regime)
        spent = machine.seconds(lambda: check(case, function, key, direction != FORWARD, regime, name))
        if direction == BOTH and not brief:
            info["peak_bytes"] = machine.peak_bytes(call, 1 if info["first_seconds"] > SLOW else 3)
            # What is compiled for a CPU hides its operators from those who count.
            if DEVICE == "cuda" or name not in ("torch.compile", "KeOps"):
                info |= machine.counted(call)
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit in the GPU's memory at {dict(size)}")
    except Wrong as why:
        if not brief or name.startswith(OURS):
            raise
        told = {"op": case.op, "case": case.name, "direction": direction, "peer": name, "size": dict(size)}
        WRONG.append({**told, "regime": regime, "wrong": str(why)})
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
    if benchmark.stats:  # none with --benchmark-disable
        rate, ceiling = info["work"] / benchmark.stats.stats.median, machine.ceiling(case.unit)
        benchmark.extra_info.update(rate=rate, ceiling=ceiling, share=ceiling and rate / ceiling)


def in_turn(benchmark: Any, case: Case, size: Size) -> None:
    """Time our call in every regime, one after the other in turn, for what the slowest takes over the fastest.

    ``spread`` in ``extra_info`` is that for single precision, and ``slowest`` is the regime.
    """
    key = tuple(size.items())
    found = {
        regime: once(case, peer(case, OURS, key), inputs(case, key, regime), True)
        for regime in (case.usual, *case.regimes)
    }
    about(benchmark, case.op, case.name, TURNS, OURS, size)
    benchmark.extra_info.update(as_info(looked_at(found)))
    note_slowest(benchmark.extra_info)
    benchmark.pedantic(found[case.usual], rounds=1)  # or it would not be in the file


def note_slowest(info: Mapping[str, Any]) -> None:
    """Note what `in_turn` found, or had found in the run that this one goes on from."""
    if info["direction"] == TURNS and "slowest" in info:
        SLOWEST[info["case"], tuple(info["size"].items())] = info["slowest"]


def slowest(case: Case, size: Size) -> str:
    """The regime in which this run found our call slowest; halves aside, which not every peer takes."""
    return SLOWEST.get((case.name, tuple(size.items())), case.usual)


def about(benchmark: Any, op: str, case: str, direction: str, name: str, size: Size) -> None:
    """Say what a bench times; peers of one group stand side by side."""
    benchmark.group = f"{case} {direction} {' '.join(f'{letter}={n}' for letter, n in size.items())}"
    benchmark.extra_info.update(op=op, case=case, direction=direction, peer=name, size=dict(size), device=DEVICE)


def timed(
    benchmark: Any, steps: Sequence[machine.Step], graph: bool = True, brief: bool = False, call: float | None = None
) -> None:
    """Time calls, one step after the other in turn, in rounds of many with one sync; on a GPU also as a ``graph``.

    ``call`` is how many seconds one takes, if that is known.
    """
    calls, rounds = planned(call or least(steps), brief)
    turn = itertools.cycle(steps)
    # The timer waits for a GPU (bench/conftest.py), so a round is a batch of calls with one sync.
    benchmark.pedantic(lambda: next(turn)(), rounds=rounds, iterations=calls, warmup_rounds=0 if calls == 1 else 1)
    if DEVICE == "cuda":
        benchmark.extra_info.update(of_a_gpu(steps, max(calls, len(steps)), graph))


def timed_backward(benchmark: Any, forward: Callable[[], Tensor], x: Inputs) -> None:
    """Time backward alone, one a round: what is compiled lets go of what forward kept, and can only do it once."""

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
    """Parametrizes a test by peer, within direction, within regime, within size: what those need is made once.

    The reference, which is for where nothing was compiled, is timed in both directions together alone, and so is
    everything in the ``regimes`` beside the usual one, which are for the batch sizes ``at``.
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
    """Parametrizes a test by the sizes of these batches."""
    chosen = [size for size in sizes if size["B"] in batches]
    return pytest.mark.parametrize("size", chosen, ids=[f"B{size['B']}" for size in chosen])
