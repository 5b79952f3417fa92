"""Random draws of a function, made again for some of its rows: row b gets what it got when all rows were there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.torch_internals import TorchDispatchMode, pack_hook

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
# Draws whose number of random bits does not depend on the values they are given.
BY_SIZE = ("rand", "randn", "randint", "randperm")  # the last one mixes rows, if it is of rows
IN_PLACE = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_")
INSTEAD = ": draw before and pass it in"
LIKE = ("rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout")


def state(device: torch.device) -> Tensor:
    """Of the generator that draws on this device; no sync."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore(device: torch.device, saved: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved, device)
    else:
        torch.set_rng_state(saved)


def _is_draw(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags and func.overloadpacket.__name__ in (
        *BY_SIZE,
        *IN_PLACE,
        *LIKE,
    )


def _may_draw(func: Any) -> bool:
    """Whether it is tagged so though we do not know it: attention without dropout draws nothing."""
    return torch.Tag.nondeterministic_seeded in func.tags and not _is_draw(func)


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class Record(TorchDispatchMode):
    """Notes the layout of every draw.

    Attributes:
        draws: in order.

    Raises:
        RuntimeError: a draw that cannot be made again for some rows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Layout] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _may_draw(func):
            return self._unless_it_draws(func, args, kwargs)
        result = func(*args, **kwargs)
        if _is_draw(func):
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"a lazy function draws by {_name(func)} from a generator of its own{INSTEAD}")
            drawn = _first(result)
            self.draws.append((tuple(drawn.shape), tuple(drawn.stride())))
        return result

    @staticmethod
    def _unless_it_draws(func: Any, args: Any, kwargs: Any) -> Any:
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        before = state(device)
        result = func(*args, **kwargs)
        if kwargs.get("generator") is not None or not torch.equal(before, state(device)):
            raise RuntimeError(
                f"a lazy function draws by {_name(func)}, which cannot be repeated for some rows{INSTEAD}"
            )
        return result


class Replay(TorchDispatchMode):
    """Makes every draw with the layout it had, and hands out the rows that are there.

    Args:
        draws: what `Record` noted. rows: how many there were. picks: [n] int64, those that are there now.

    Raises:
        RuntimeError: a draw that was not there, or that mixes rows.
    """

    def __init__(self, draws: list[Layout], rows: int, picks: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.rows, self.picks = iter(draws), rows, picks
        self.hook = pack_hook()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._again(func, args, kwargs) if _is_draw(func) else func(*args, **kwargs)

    def _again(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        sizes, strides = next(self.draws, ((), ()))
        if name in BY_SIZE:
            lists = isinstance(args[-1], (list, tuple))
            now = tuple(args[-1]) if lists else (args[-1],)
            if now == sizes:
                return func(*args, **kwargs)
            self._check(name, sizes if lists else (), now)
            return func(*args[:-1], list(sizes), **kwargs)[self.picks]
        given: Tensor = args[0]
        if tuple(given.shape) == sizes or (name == "native_dropout" and not args[2]):
            return func(*args, **kwargs)
        self._check(name, sizes, tuple(given.shape))
        whole = torch.empty_strided(sizes, strides, dtype=given.dtype, device=given.device).fill_(0.5)
        if name in ("bernoulli", "bernoulli_"):  # whose probabilities may be a tensor
            rest = [self._spread(a, sizes) for a in args[1:]]
            if name == "bernoulli":
                whole[self.picks] = given
            drawn = func(whole, *rest, **kwargs)[self.picks]
        else:
            drawn = func(whole, *args[1:], **kwargs)
            if name == "native_dropout":
                mask = drawn[1][self.picks]
                return given * mask / (1 - args[1]), mask
            drawn = drawn[self.picks]
        return given.copy_(drawn) if name in IN_PLACE else drawn

    def _spread(self, value: Any, sizes: tuple[int, ...]) -> Any:
        if not isinstance(value, Tensor) or value.dim() < len(sizes) or value.shape[0] == 1:  # alike for all rows
            return value
        whole = value.new_full((self.rows, *value.shape[1:]), 0.5)
        whole[self.picks] = value
        return whole

    def _check(self, name: str, sizes: tuple[int, ...], now: tuple[int, ...]) -> None:
        hook = pack_hook()
        if hook is not self.hook and getattr(hook, "__module__", "") == "torch.utils.checkpoint":
            raise RuntimeError(  # which would draw in backward, where nobody hands out rows
                f"a lazy function draws by {name} inside torch.utils.checkpoint{INSTEAD}, or checkpoint only what does "
                "not draw"
            )
        if sizes[:1] != (self.rows,) or now != (len(self.picks), *sizes[1:]):
            raise RuntimeError(
                f"a lazy function drew {list(sizes)} by {name} for {self.rows} rows and {list(now)} for "
                f"{len(self.picks)}: it must draw in rows, or the same for any number of rows"
            )
