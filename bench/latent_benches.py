"""What the benches of the five statistics share: codes, peers, checks, and how a call is timed.

Every result is checked against the reference in float64 before it is timed. Bytes are those of the inputs that forward
reads, and of the inputs that backward reads and the gradients that it writes, each once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bomkern import _impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(512, 128), (4096, 128), (65536, 128)]
if DEVICE == "cuda":
    SIZES.append((1_048_576, 128))
LARGEST = SIZES[-1]
PEERS = ("bomkern", "torch.compile", "eager")
DIRECTIONS = {True: "forward+backward", False: "forward"}
Inputs = tuple[Tensor, ...]
Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Case:
    """An op as its bench has it: inputs, what a user would write, and the loss that backward begins from."""

    op: str
    make: Callable[[int, int], Inputs]
    peers: dict[str, Function]  # "bomkern" and "eager", each called with the inputs; "torch.compile" is eager's
    loss: Callable[[Any], Tensor]
    label: str = ""


@functools.lru_cache(maxsize=1)
def codes(batch: int, dims: int) -> Inputs:
    """z, mu and logvar of a trained code: idle dimensions and busy ones."""
    source = torch.Generator().manual_seed(0)
    mu, logvar, noise = torch.randn(3, batch, dims, generator=source).unbind()
    mu, logvar = mu * torch.logspace(-1.5, 0.3, dims), 0.5 * logvar - 1
    z = mu + noise * torch.exp(logvar / 2)
    return tuple(x.to(DEVICE).requires_grad_() for x in (z, mu, logvar))


@functools.cache
def compiled(function: Function) -> Function:
    """On a CPU one for all sizes: to compile for each takes longer than the rest of the bench."""
    if DEVICE == "cuda":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return torch.compile(function, dynamic=True)


def tensors_of(result: Any) -> Inputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@functools.lru_cache(maxsize=1)
def exact(case: Case, batch: int, dims: int) -> tuple[Inputs, Inputs]:
    """Values and gradients by the reference in float64; the gradients rounded, to take less room."""
    x = tuple(t.detach().double().requires_grad_() for t in case.make(batch, dims))
    result = case.peers["bomkern"](*x, impl="reference")
    grads = torch.autograd.grad(case.loss(result), x)
    return tuple(t.detach() for t in tensors_of(result)), tuple(g.float() for g in grads)


def check(case: Case, function: Function, batch: int, dims: int, backward: bool) -> None:
    """Values within 1e-4 of their largest; gradients within 1e-3, where variances of 1e-3 stand beside those of 4."""
    x = case.make(batch, dims)
    values, gradients = exact(case, batch, dims)
    result = function(*x)
    for a, b in zip(tensors_of(result), values, strict=True):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()
    if backward:
        for a, b in zip(torch.autograd.grad(case.loss(result), x), gradients, strict=True):
            assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def measure(
    benchmark: Any,
    case: Case,
    name: str,
    size: tuple[int, int],
    backward: bool,
    beside: Callable[[], object] | None = None,
    label: str = "",
) -> None:
    """Times a peer, for the table of peers; or beside something else, as ``label`` says, that runs before each round.

    So a busy neighbour or a changed clock meets both.
    """
    batch, dims = size
    function = compiled(case.peers["eager"]) if name == "torch.compile" else case.peers[name]
    x = case.make(batch, dims)
    elements = batch * dims
    # Enough calls a round to outlast the clock; one where something is measured beside each.
    calls = 1 if beside else max(1, (5 if DEVICE == "cuda" else 1) * 2**21 // (elements * len(x)))

    def once() -> None:
        if backward:
            torch.autograd.grad(case.loss(function(*x)), x)
        else:
            with torch.no_grad():
                function(*x)

    def step() -> None:
        for _ in range(calls):
            once()
        synchronize()

    moved = sum(t.numel() * t.element_size() for t in x) * (3 if backward else 1)
    info: dict[str, Any] = {"device": DEVICE, "calls": calls, "bytes_moved": moved}
    info["impl"] = _impl.choose(case.op, DEVICE, None).split()[-1]  # of bomkern's
    if not beside:
        info["peer"] = name
    try:
        check(case, function, batch, dims, backward)
        if DEVICE == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            once()
            info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} does not fit in the GPU's memory at B={batch}, D={dims}")
    benchmark.group = f"{case.op}{case.label} {DIRECTIONS[backward]} B={batch} D={dims}{label}"
    benchmark.extra_info.update(info)
    rounds = (15 if name.startswith("bomkern") else 5) if elements < 2**22 else (9 if name.startswith("bomkern") else 3)
    benchmark.pedantic(step, setup=beside, rounds=rounds, warmup_rounds=1)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["gb_per_s"] = moved * calls / benchmark.stats.stats.median / 1e9


def share_of_a_copy(benchmark: Any, capsys: Any, case: Case, backward: bool) -> None:
    """bomkern at the largest size beside ``y.copy_(x)`` of as many bytes as its inputs have, and beside ``x.clone()``.

    The copy is into memory that exists. Backward returns gradients in fresh memory, as a clone does.
    """
    x = torch.cat([t.detach().reshape(-1) for t in case.make(*LARGEST)])
    y = torch.zeros_like(x)
    times: list[tuple[float, float]] = []

    def beside() -> None:
        times.append((seconds(lambda: y.copy_(x)), seconds(lambda: x.clone())))

    measure(benchmark, case, "bomkern", LARGEST, backward, beside, " beside a copy")
    if not benchmark.stats:
        return
    # The least of each: what disturbs a loop only ever makes it slower.
    moved = 2 * x.numel() * x.element_size()
    copy, clone = (moved / min(t) / 1e9 for t in zip(*times, strict=True))
    ours = benchmark.extra_info["bytes_moved"] / benchmark.stats.stats.min / 1e9
    benchmark.extra_info.update(copy_gb_per_s=copy, share_of_copy=ours / copy, share_of_clone=ours / clone)
    with capsys.disabled():
        beside_it = f"{ours / copy:.0%} of copy_'s {copy:.1f}, {ours / clone:.1f}x clone's"
        print(f"\n{benchmark.group}: {ours:.1f} GB/s, {beside_it}")


def sizes_and(*peers: str, directions: Sequence[bool] = (True, False)) -> Callable[[Any], Any]:
    """Parametrizes a test by peer, within direction, within size: what a size needs is made once."""

    def mark(test: Any) -> Any:
        test = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}-{s[1]}")(test)
        test = pytest.mark.parametrize("backward", directions, ids=DIRECTIONS.get)(test)
        return pytest.mark.parametrize("name", peers or PEERS)(test)

    return mark
