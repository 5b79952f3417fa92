"""`Call`: evaluate a lazy function for the rows of several lazies without a graph, and for some rows with one."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..common.devices import rng_state, set_rng_state, synchronize, widest_float
from ..common.torch_internals import write_count
from . import random_draws
from .cost import statistics_of

TRIAL_ROWS = 8  # rows of the check on first use
HALF = (torch.float16, torch.bfloat16)
# Tolerances of a row alone against the same row among all: parts of the largest value, and of the largest argument.
OF_VALUE, OF_VALUE_HALF = 1e-3, 5e-2
OF_ARGUMENT, OF_ARGUMENT_HALF = 1e-6, 1e-2
NEEDS_GRAPH = "does not require grad"


class Call:
    """The evaluation of ``fn`` for the concatenated rows of some lazies.

    `with_graph` draws the random numbers of `without_graph` again. If `without_graph` was not called before, it draws
    new ones.

    Args:
        fn: the function.
        sizes: the rows of each lazy.

    Attributes:
        rows: the sum of the sizes.
        statistics: the measured properties of ``fn``.
    """

    def __init__(self, fn: Callable[..., Tensor], sizes: Sequence[int]) -> None:
        self.fn, self.sizes, self.rows, self.statistics = fn, list(sizes), sum(sizes), statistics_of(fn)
        self._draws: list[random_draws.Layout] = []
        self._generator_state: Tensor | None = None  # before the draws, if there are any

    def without_graph(self, args: Sequence[Any]) -> Tensor:
        """Evaluate all rows without a graph; on first use, check on a few rows that rows are independent."""
        statistics, device = self.statistics, _device(args)
        state, begin = rng_state(device), time.perf_counter()
        recording = statistics.draws or not statistics.checked
        counts = _write_counts(args)
        out = self._forward(args, random_draws.Record() if recording else None)
        if _write_counts(args) != counts:
            raise ValueError(f"lazy: {name_of(self.fn)} changes its arguments in place: it must leave them as they are")
        if not recording and not torch.equal(state, rng_state(device)):  # it first drew after its check
            set_rng_state(device, state)
            statistics.draws = True
            out = self._forward(args, random_draws.Record())
        elif device.type == "cpu" and statistics.checked:
            statistics.add_forward((time.perf_counter() - begin) / self.rows)
        if self._draws:
            statistics.draws, self._generator_state = True, state
        if not statistics.checked and self.rows > 1:
            self._check_first_use(args, out, device)
        return out

    def with_graph(self, args: Sequence[Any], picks: Tensor) -> Tensor:
        """Evaluate some rows with a graph, with the random numbers that they had in `without_graph`.

        Args:
            args: the arguments, with the picked rows alone.
            picks: [n] int64, the rows' places in the call.
        """
        if self._generator_state is None:
            return self._check_result(self.fn(*args), len(picks))
        device = _device(args)
        picks = picks.to(device, non_blocking=True)
        state = rng_state(device)
        set_rng_state(device, self._generator_state)
        try:
            with random_draws.Replay(self._draws, self.rows, picks):
                return self._check_result(self.fn(*args), len(picks))
        finally:
            set_rng_state(device, state)

    def _forward(self, args: Sequence[Any], record: random_draws.Record | None) -> Tensor:
        """Evaluate all rows, and keep the layouts of their draws."""
        recording: AbstractContextManager[Any] = record or nullcontext()
        statistics, device = self.statistics, _device(args)
        state = rng_state(device)
        if not statistics.needs_graph:
            try:
                with torch.no_grad(), recording:
                    out = self._check_result(self.fn(*args), self.rows)
            except RuntimeError as error:
                if NEEDS_GRAPH not in str(error):
                    raise
                statistics.needs_graph = True
                set_rng_state(device, state)
                if record is not None:
                    record.draws.clear()
        if statistics.needs_graph:
            with torch.enable_grad(), recording:
                out = self._check_result(self.fn(*_leaves(args)), self.rows).detach()
        self._draws = record.draws if record is not None else []
        return out

    def _check_result(self, out: object, rows: int) -> Tensor:
        if not isinstance(out, Tensor):
            raise TypeError(f"lazy: {name_of(self.fn)} must return a tensor, got {type(out).__name__}")
        if out.dim() == 0 or out.shape[0] != rows:
            raise ValueError(f"lazy: {name_of(self.fn)} must return a row for each of {rows}, got {list(out.shape)}")
        return out

    def _check_first_use(self, args: Sequence[Any], out: Tensor, device: torch.device) -> None:
        """Check that a few rows alone have the values that they had among all; time their forward and backward."""
        statistics = self.statistics
        picks = torch.arange(min(TRIAL_ROWS, self.rows // 2), device=device)
        few = [a[: len(picks)] if is_rows(a) else a for a in args]
        seconds: list[tuple[float, float]] = []
        for _ in range(2):  # the first pass includes one-time setup
            with torch.enable_grad():
                leaves = _leaves(few)
                begin = _clock(device)
                try:
                    alone = self.with_graph(leaves, picks)
                except Exception as error:
                    raise RuntimeError(
                        f"lazy: {name_of(self.fn)} fails for {len(picks)} of its rows: {error}"
                    ) from error
                middle = _clock(device)
                inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad] + _graph_leaves(alone)
                unmeasured = bool(inputs) and alone.requires_grad and not _can_run_backward(alone, inputs)
                # A backward that cannot be measured counts as two forwards, as in most networks.
                seconds.append((middle - begin, 2 * (middle - begin) if unmeasured else _clock(device) - middle))
        # TF32, which convolutions on a GPU use by default, has no more digits than a half. Others may do likewise.
        half = out.dtype in HALF or torch.is_autocast_enabled(device.type) or device.type != "cpu"
        check_rows(self.fn, alone, out[: len(picks)], few, half)
        statistics.checked = True
        forward, backward = (min(part) for part in zip(*seconds, strict=True))
        statistics.backward_ratio = backward / max(forward, 1e-9)
        statistics.add_forward(forward / len(picks))


def check_rows(fn: Callable[..., Any], alone: Tensor, among: Tensor, args: Sequence[Any], half: bool) -> None:
    """Raise ValueError where rows evaluated alone differ from the same rows evaluated among all.

    Args:
        fn: the function, for the message.
        alone, among: the rows' values, in one shape.
        args: the arguments of ``fn``. Values that cancel to nearly 0 may be off by a part of the arguments' size.
        half: whether half precision is involved.
    """
    alone, among = (torch.view_as_real(x) if x.is_complex() else x for x in (alone.detach(), among.detach()))
    wide = widest_float(alone.device)
    alone, among = alone.to(wide), among.to(wide)
    finite = alone.isfinite() & among.isfinite()
    difference = _largest(torch.where(finite, alone - among, 0))
    size = _largest(torch.where(finite, among, 0))
    of_value, of_argument = (OF_VALUE_HALF, OF_ARGUMENT_HALF) if half else (OF_VALUE, OF_ARGUMENT)
    if difference <= of_value * size:
        return
    argument = max(_largest(a.detach().abs().to(wide)) for a in args if is_rows(a))
    if difference > of_value * size + of_argument * argument:
        raise ValueError(
            f"lazy: rows of {name_of(fn)} depend on one another (a row alone differs by {difference:.3g}, values are "
            f"up to {size:.3g}), as under BatchNorm in training mode: call it plainly, or normalise within a row"
        )


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function for messages."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__)


def is_rows(value: object) -> TypeGuard[Tensor]:
    """Return whether an argument is a tensor with rows."""
    return isinstance(value, Tensor) and value.dim() > 0


def _largest(x: Tensor) -> float:
    """Return the largest finite absolute value."""
    return float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def _device(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if is_rows(a))


def _write_counts(args: Sequence[Any]) -> list[int]:
    """Return the number of writes into each tensor so far."""
    return [write_count(a) for a in args if is_rows(a) and not a.is_inference()]


def _leaves(args: Sequence[Any]) -> list[Any]:
    """Return the arguments, floating-point rows as leaves that require a gradient."""
    return [a.detach().requires_grad_() if is_rows(a) and a.is_floating_point() else a for a in args]


def _clock(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _can_run_backward(out: Tensor, inputs: list[Tensor]) -> bool:
    """Run a backward that keeps the graph, which a closure may share; return False where the graph cannot be kept."""
    try:
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if "donated buffers" not in str(error):  # compiled functions of torch 2.15 free buffers in their first backward
            raise
        return False
    return True


def _graph_leaves(out: Tensor) -> list[Tensor]:
    """Return the leaves of the graph of ``out``."""
    leaves, seen, todo = [], set(), [out.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves
