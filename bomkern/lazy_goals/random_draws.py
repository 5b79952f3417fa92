"""Repeat the random draws of a function for some of its rows: row b gets the numbers that it got among all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.devices import rng_state
from ..common.torch_internals import TorchDispatchMode, pack_hook

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
# Draws whose number of random bits does not depend on values. BY_SIZE take a size, the others a tensor.
BY_SIZE = ("rand", "randn", "randint", "randperm")  # a randperm of the rows mixes them, and is refused
IN_PLACE = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_")
LIKE = ("rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout")
INSTEAD = ": draw before and pass it in"


def _is_draw(func: Any) -> bool:
    """Return whether an operator draws in a way that can be repeated for some rows."""
    return torch.Tag.nondeterministic_seeded in func.tags and func.overloadpacket.__name__ in (
        *BY_SIZE,
        *IN_PLACE,
        *LIKE,
    )


def _may_draw(func: Any) -> bool:
    """Return whether any other operator is tagged as random. Attention is tagged even without dropout."""
    return torch.Tag.nondeterministic_seeded in func.tags and not _is_draw(func)


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _drawn(result: Any) -> Tensor:
    """Return the tensor whose layout decides how many numbers were drawn."""
    return result if isinstance(result, Tensor) else result[0]


class Record(TorchDispatchMode):
    """Record the layout of every draw.

    Attributes:
        draws: the layouts, in order.

    Raises:
        RuntimeError: a draw cannot be repeated for some rows.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Layout] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _may_draw(func):
            return self._refuse_draw(func, args, kwargs)
        result = func(*args, **kwargs)
        if _is_draw(func):
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"a lazy function draws by {_name(func)} from a generator of its own{INSTEAD}")
            drawn = _drawn(result)
            self.draws.append((tuple(drawn.shape), tuple(drawn.stride())))
        return result

    @staticmethod
    def _refuse_draw(func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that may draw; raise if it did."""
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        before = rng_state(device)
        result = func(*args, **kwargs)
        if kwargs.get("generator") is not None or not torch.equal(before, rng_state(device)):
            raise RuntimeError(
                f"a lazy function draws by {_name(func)}, which cannot be repeated for some rows{INSTEAD}"
            )
        return result


class Replay(TorchDispatchMode):
    """Repeat every draw in its recorded layout, and return the picked rows of it.

    Args:
        draws: the layouts that `Record` recorded.
        rows: the number of rows at that time.
        picks: [n] int64, the rows that are evaluated now.

    Raises:
        RuntimeError: a draw was not recorded, or mixes rows.
    """

    def __init__(self, draws: list[Layout], rows: int, picks: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.rows, self.picks = iter(draws), rows, picks
        self.hook = pack_hook()  # the saved-tensors hook outside of the function

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._redraw(func, args, kwargs) if _is_draw(func) else func(*args, **kwargs)

    def _redraw(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        sizes, strides = next(self.draws, ((), ()))
        if name in BY_SIZE:
            has_shape = isinstance(args[-1], (list, tuple))
            now = tuple(args[-1]) if has_shape else (args[-1],)
            if now == sizes:
                return func(*args, **kwargs)
            self._check(name, sizes if has_shape else (), now)
            return func(*args[:-1], list(sizes), **kwargs)[self.picks]
        values: Tensor = args[0]
        if tuple(values.shape) == sizes or (name == "native_dropout" and not args[2]):
            return func(*args, **kwargs)
        self._check(name, sizes, tuple(values.shape))
        all_rows = torch.empty_strided(sizes, strides, dtype=values.dtype, device=values.device).fill_(0.5)
        if name in ("bernoulli", "bernoulli_"):  # their probabilities may be a tensor
            rest = [self._spread(a, sizes) for a in args[1:]]
            if name == "bernoulli":
                all_rows[self.picks] = values
            drawn = func(all_rows, *rest, **kwargs)[self.picks]
        else:
            drawn = func(all_rows, *args[1:], **kwargs)
            if name == "native_dropout":
                mask = drawn[1][self.picks]
                return values * mask / (1 - args[1]), mask
            drawn = drawn[self.picks]
        return values.copy_(drawn) if name in IN_PLACE else drawn

    def _spread(self, value: Any, sizes: tuple[int, ...]) -> Any:
        """Return an argument for the picked rows, expanded to all rows."""
        if not isinstance(value, Tensor) or value.dim() < len(sizes) or value.shape[0] == 1:  # the same for all rows
            return value
        all_rows = value.new_full((self.rows, *value.shape[1:]), 0.5)
        all_rows[self.picks] = value
        return all_rows

    def _check(self, name: str, sizes: tuple[int, ...], now: tuple[int, ...]) -> None:
        """Raise unless a recorded draw for all rows is now a draw for the picked rows."""
        hook = pack_hook()
        if hook is not self.hook and getattr(hook, "__module__", "") == "torch.utils.checkpoint":
            raise RuntimeError(  # it would draw again in backward, where rows are not picked
                f"a lazy function draws by {name} inside torch.utils.checkpoint{INSTEAD}, or checkpoint only what does "
                "not draw"
            )
        if sizes[:1] != (self.rows,) or now != (len(self.picks), *sizes[1:]):
            raise RuntimeError(
                f"a lazy function drew {list(sizes)} by {name} for {self.rows} rows and {list(now)} for "
                f"{len(self.picks)}: it must draw in rows, or the same for any number of rows"
            )
