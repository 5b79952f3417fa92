"""One evaluation of a lazy function, the same evaluation again for some of its rows, and what that costs."""

from __future__ import annotations

import functools
import math
import time
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..common.torch_internals import write_count
from . import random_draws

TRIAL = 8  # rows of the check on first use
WEIGHT = 0.2  # of a step in moving averages
HALF = (torch.float16, torch.bfloat16)
# How far a row may be from itself among others: of the largest value, and of the largest argument.
CLOSE, CLOSE_HALF = 1e-3, 5e-2
LEAST, LEAST_HALF = 1e-6, 1e-2
NEEDS_GRAPH = "does not require grad"


class Facts:
    """What is known of a function.

    Attributes:
        tried: whether its rows have been found independent.
        draws: whether it draws random numbers.
        nested: whether it takes gradients itself, and so cannot run without a graph.
        forward: seconds a row. ratio: backward's time over forward's.
        walked: moving average of the fraction of its rows that got gradient; NaN at first.
        waited: steps in which it was evaluated once, with a graph.
    """

    def __init__(self) -> None:
        self.tried = self.draws = self.nested = False
        self.forward, self.ratio, self.walked = 0.0, 2.0, math.nan
        self.waited = 0

    def saw(self, fraction: float) -> None:
        self.walked = fraction if math.isnan(self.walked) else self.walked + WEIGHT * (fraction - self.walked)

    def took(self, seconds: float) -> None:
        self.forward += (seconds - self.forward) * (WEIGHT if self.forward else 1.0)


_known: weakref.WeakKeyDictionary[Any, dict[Any, Facts]] = weakref.WeakKeyDictionary()


def facts_of(fn: Callable[..., Any]) -> Facts:
    """Of a module or a method of one, an object, or the code of a function, which is the same one in every step."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner, code = getattr(fn, "__self__", None), getattr(fn, "__code__", None)
    key = owner if isinstance(owner, torch.nn.Module) else fn if code is None else code
    try:
        return _known.setdefault(key, {}).setdefault(code, Facts())
    except TypeError:  # not hashable, or not weakly referenced: known only for now
        return Facts()


def identity(fn: Callable[..., Any]) -> Any:
    """The same for the same function; a bound method is another object each time it is looked up."""
    return (id(fn.__self__), id(fn.__func__)) if isinstance(fn, types.MethodType) else id(fn)


def name_of(fn: Callable[..., Any]) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__qualname__", type(fn).__name__)


class Call:
    """``fn`` for all rows of some lazies, one after the other.

    Args:
        fn: the function. sizes: rows of each lazy.

    Attributes:
        facts: what is known of ``fn``.
    """

    def __init__(self, fn: Callable[..., Tensor], sizes: Sequence[int]) -> None:
        self.fn, self.sizes, self.rows, self.facts = fn, list(sizes), sum(sizes), facts_of(fn)
        self._draws: list[random_draws.Layout] = []
        self._before: Tensor | None = None  # the state of the generator, where it was drawn from

    def with_graph(self, args: Sequence[Any]) -> Tensor:
        return self._checked(self.fn(*args))

    def without_graph(self, args: Sequence[Any]) -> Tensor:
        """All rows, and nothing kept; the first time also tried on a few rows."""
        facts, device = self.facts, _device(args)
        before, begun = random_draws.state(device), time.perf_counter()
        record = facts.draws or not facts.tried
        versions = _versions(args)
        out = self._forward(args, random_draws.Record() if record else None)
        if _versions(args) != versions:
            raise ValueError(f"lazy: {name_of(self.fn)} changes its arguments in place: it must leave them as they are")
        if not record and not torch.equal(before, random_draws.state(device)):  # draws, and did not when it was tried
            random_draws.restore(device, before)
            facts.draws = True
            out = self._forward(args, random_draws.Record())
        elif device.type == "cpu" and facts.tried:
            facts.took((time.perf_counter() - begun) / self.rows)
        if self._draws:
            facts.draws, self._before = True, before
        if not facts.tried and self.rows > 1:
            self._try(args, out, device)
        return out

    def again(self, args: Sequence[Any], picks: Tensor) -> Tensor:
        """With a graph and the random numbers of the first time.

        Args:
            args: with the rows ``picks`` [n] alone.
        """
        if self._before is None:
            return self._checked(self.fn(*args), len(picks))
        device = _device(args)
        now = random_draws.state(device)
        random_draws.restore(device, self._before)
        try:
            with random_draws.Replay(self._draws, self.rows, picks):
                return self._checked(self.fn(*args), len(picks))
        finally:
            random_draws.restore(device, now)

    def _forward(self, args: Sequence[Any], record: random_draws.Record | None) -> Tensor:
        around: AbstractContextManager[Any] = record or nullcontext()
        facts, device = self.facts, _device(args)
        before = random_draws.state(device)
        if not facts.nested:
            try:
                with torch.no_grad(), around:
                    out = self._checked(self.fn(*args))
            except RuntimeError as why:
                if NEEDS_GRAPH not in str(why):
                    raise
                facts.nested = True
                random_draws.restore(device, before)
                if record is not None:
                    record.draws.clear()
        if facts.nested:
            with torch.enable_grad(), around:
                out = self._checked(self.fn(*_leaves(args))).detach()
        self._draws = record.draws if record is not None else []
        return out

    def _checked(self, out: object, rows: int | None = None) -> Tensor:
        rows = self.rows if rows is None else rows
        if not isinstance(out, Tensor):
            raise TypeError(f"lazy: {name_of(self.fn)} must return a tensor, got {type(out).__name__}")
        if out.dim() == 0 or out.shape[0] != rows:
            raise ValueError(f"lazy: {name_of(self.fn)} must return a row for each of {rows}, got {list(out.shape)}")
        return out

    def _try(self, args: Sequence[Any], out: Tensor, device: torch.device) -> None:
        """On a few rows: that they are what they were among all, and what forward and backward take."""
        facts = self.facts
        picks = torch.arange(min(TRIAL, self.rows // 2), device=device)
        few = [a[: len(picks)] if is_rows(a) else a for a in args]
        seconds: list[tuple[float, float]] = []
        for _ in range(2):  # the first time is for whatever is set up then
            with torch.enable_grad():
                leaves = _leaves(few)
                begun = _clock(device)
                try:
                    alone = self.again(leaves, picks)
                except Exception as why:
                    raise RuntimeError(f"lazy: {name_of(self.fn)} fails for {len(picks)} of its rows: {why}") from why
                middle = _clock(device)
                wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad] + _parameters(alone)
                untried = bool(wanted) and alone.requires_grad and not _try_backward(alone, wanted)
                # Where it cannot be tried: what it is of most networks.
                seconds.append((middle - begun, 2 * (middle - begun) if untried else _clock(device) - middle))
        # TF32, which a GPU's convolutions use unless told not to, has no more digits than a half.
        half = out.dtype in HALF or torch.is_autocast_enabled(device.type) or device.type == "cuda"
        check_rows(self.fn, alone, out[: len(picks)], few, half)
        facts.tried = True
        forward, backward = (min(part) for part in zip(*seconds, strict=True))
        facts.ratio = backward / max(forward, 1e-9)
        facts.took(forward / len(picks))


def _try_backward(alone: Tensor, wanted: list[Tensor]) -> bool:
    """Run the backward, and keep graphs that the function may have closed over; False where it allows no second one."""
    try:
        torch.autograd.grad(alone, wanted, torch.ones_like(alone), allow_unused=True, retain_graph=True)
    except RuntimeError as why:
        if "donated buffers" not in str(why):  # torch 2.15's compiled functions give theirs away in the first
            raise
        return False
    return True


def check_rows(fn: Callable[..., Any], alone: Tensor, among: Tensor, args: Sequence[Any], half: bool) -> None:
    """Raises ValueError where rows evaluated alone are not what they were among all.

    Args:
        args: of ``fn``: what cancels to nearly nothing is off by a part of them. half: whether halves are among it.
    """
    alone, among = (torch.view_as_real(x) if x.is_complex() else x for x in (alone.detach(), among.detach()))
    alone, among = alone.double(), among.double()
    known = alone.isfinite() & among.isfinite()
    off = _largest(torch.where(known, alone - among, 0))
    size = _largest(torch.where(known, among, 0))
    close, least = (CLOSE_HALF, LEAST_HALF) if half else (CLOSE, LEAST)
    if off <= close * size:
        return
    if off > close * size + least * max(_largest(a.detach().abs().double()) for a in args if is_rows(a)):
        raise ValueError(
            f"lazy: rows of {name_of(fn)} depend on one another (a row alone differs by {off:.3g}, values are up to "
            f"{size:.3g}), as under BatchNorm in training mode: call it plainly, or normalise within a row"
        )


def _largest(x: Tensor) -> float:
    """Its largest finite size."""
    return float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def is_rows(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0


def _device(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if is_rows(a))


def _versions(args: Sequence[Any]) -> list[int]:
    """What counts the writes into each tensor."""
    return [write_count(a) for a in args if is_rows(a) and not a.is_inference()]


def _leaves(args: Sequence[Any]) -> list[Any]:
    return [a.detach().requires_grad_() if is_rows(a) and a.is_floating_point() else a for a in args]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _parameters(out: Tensor) -> list[Tensor]:
    """The leaves of a graph."""
    found, seen, todo = [], set(), [out.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found
