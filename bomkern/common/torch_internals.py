"""All private names of torch that bomkern uses. For a new torch read this file, and csrc/torch_internals.h for C++.

Private is a name with a leading underscore, and what torch calls internal or experimental. No other file of bomkern/
or kernels/ reaches such a name (tests/dispatch/test_torch_internals.py). `NEEDED` lists them all, and `missing` returns
those that the installed torch lacks. A missing name stops neither the import nor what does not need it. What
needs it takes another path or, where there is none, raises `NotImplementedError`.

This file imports torch alone, so that tools/next_torch.py can run it before bomkern is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class Internal(NamedTuple):
    """A private name of torch.

    Attributes:
        name: its path from ``torch``.
        since: the oldest torch that is known to have it; "<=2.11" where nobody looked before the oldest supported one.
        serves: what of bomkern needs it.
        instead: the public name that would replace it, "none" where there is none.
        without: what happens in a torch that lacks it.
        owner: what has the last part of ``name``, where that is not what the path before it says.
    """

    name: str
    since: str
    serves: str
    instead: str
    without: str
    owner: Callable[[], Any] | None = None

    def find(self) -> Any:
        """The object of that name. Raises AttributeError where this torch has none."""
        path = self.name.split(".")
        if self.owner is not None:
            return getattr(self.owner(), path[-1])
        found: Any = torch
        for depth, part in enumerate(path[1:], 2):
            try:
                found = getattr(found, part)
            except AttributeError:
                try:
                    found = importlib.import_module(".".join(path[:depth]))
                except ImportError:
                    raise AttributeError(f"torch {torch.__version__} has no {self.name}") from None
        return found


NEEDED: list[Internal] = []
_RAISE = object()


def _need(
    name: str,
    *,
    since: str = "<=2.11",
    serves: str,
    instead: str = "none",
    without: str = "raises NotImplementedError",
    owner: Callable[[], Any] | None = None,
) -> Internal:
    """Add a name to `NEEDED`, for what is looked up only when it is used."""
    NEEDED.append(Internal(name, since, serves, instead, without, owner))
    return NEEDED[-1]


def _bind(name: str, *, fallback: Any = _RAISE, **facts: Any) -> Any:
    """Add a name to `NEEDED` and return what it is. Without it: ``fallback``, or a class that raises when called."""
    needed = _need(name, **facts)
    try:
        return needed.find()
    except AttributeError:
        return _raiser(needed) if fallback is _RAISE else fallback


def _raiser(needed: Internal) -> type:
    """A class to stand for a missing function or class: a call, of a subclass too, raises NotImplementedError."""

    class Missing:
        def __new__(cls, *args: object, **options: object) -> Any:
            raise NotImplementedError(
                f"torch {torch.__version__} has no {needed.name}, which bomkern needs for {needed.serves}: install an "
                "older torch or a newer bomkern"
            )

    return Missing


def missing() -> list[Internal]:
    """The names of `NEEDED` that this torch lacks; of these the attributes tell what needs them, and what happens."""
    lacking = []
    for needed in NEEDED:
        try:
            needed.find()
        except AttributeError:
            lacking.append(needed)
    return lacking


def describe(lacking: list[Internal]) -> list[str]:
    """A line for each missing name."""
    return [
        f"torch {torch.__version__} has no {one.name} ({one.serves}): {one.without}; public instead: {one.instead}"
        for one in lacking
    ]


# Transforms of torch.func.

interpreter_stack: Callable[[], list[Any] | None] = _bind(
    "torch._C._functorch.get_interpreter_stack",
    since="2.0",
    serves="refusing torch.vmap of a GoalSet in training mode",
)
_transforms_are_active: Callable[[], bool] = _bind(
    "torch._C._are_functorch_transforms_active",
    since="2.0",
    serves="every op under torch.func",
    without="asks the stack of interpreters, which torch.compile cannot trace",
    fallback=lambda: bool(interpreter_stack()),
)
_need(
    "torch.autograd.forward_ad._current_level",
    serves="refusing forward mode by name",
    without="the compiled ops refuse it themselves; Triton's do not say whose op it was",
)
_VMAP: Any = _bind(
    "torch._C._functorch.TransformType.Vmap",
    since="2.0",
    serves="refusing torch.vmap of a GoalSet in training mode",
    without="refuses every transform of one",
    fallback=None,
)
is_legacy_batched: Callable[[Tensor], bool] = _bind(
    "torch._C._functorch.is_legacy_batchedtensor",
    serves="refusing is_grads_batched=True for Triton's ops by name",
    without="torch's own error says less",
    fallback=lambda x: False,
)


class _NoForwardMode:
    """Stands for `forward_ad` where it does not tell its level."""

    _current_level = -1


_forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else _NoForwardMode


def under_transform() -> bool:
    """Whether a transform of torch.func, or forward mode, is active now."""
    return _transforms_are_active() or _forward_mode._current_level >= 0


def under_vmap() -> bool:
    """Whether a torch.vmap is among the transforms that are active now."""
    return any(_VMAP is None or one.key() == _VMAP for one in interpreter_stack() or ())


# Dispatch modes: Python code that sees every op, such as the tracers of torch.export.

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = _bind(
        "torch.utils._python_dispatch.TorchDispatchMode", since="2.0", serves="lazy goals that draw random numbers"
    )

dispatch_modes: Callable[[], int] = _bind(  # how many are active
    "torch._C._len_torch_dispatch_stack",
    since="2.0",
    serves="keeping the table of min_goal_loss's constraints",
    without="makes the table anew in each call, which is slower",
    fallback=lambda: 1,
)
inside_dispatch_mode: Callable[[], bool] = _bind(
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode",
    since="2.5",
    serves="compiled calls inside a FakeTensorMode",
    without="raises torch's error there",
    fallback=lambda: False,
)
_mode_of: Callable[[Any], Any] = _bind(
    "torch._C._get_dispatch_mode",
    since="2.1",
    serves="sharing tables of numbers on a device",
    without="makes each table anew, which is slower",
    fallback=lambda key: key,
)
_TRACERS = tuple(
    _bind(
        f"torch._C._TorchDispatchModeKey.{key}",
        since="2.1",
        serves="sharing tables of numbers on a device",
        without="makes each table anew, which is slower",
        fallback=None,
    )
    for key in ("FAKE", "PROXY", "FUNCTIONAL")
)
_no_modes: Any = _bind(
    "torch.utils._python_dispatch._disable_current_modes", since="2.0", serves="tables of numbers on a device"
)
_no_transforms: Any = _bind("torch._C._DisableFuncTorch", since="2.0", serves="tables of numbers on a device")


def traced_by_python() -> bool:
    """Whether a tracer that runs Python (make_fx, torch.export, a FakeTensorMode) is active."""
    return any(key is None or _mode_of(key) is not None for key in _TRACERS)


@contextmanager
def outside_modes() -> Iterator[None]:
    """Make plain tensors inside of this, whichever dispatch modes and transforms the caller is inside of."""
    with _no_modes(), _no_transforms():
        yield


_mark_static_address = _need(
    "torch._dynamo.mark_static_address",
    since="2.1",
    serves="tables of numbers in CUDA graphs that torch.compile makes",
    without="each such graph copies the table",
)


def mark_static_address(x: Tensor) -> None:
    """Let the CUDA graph of a compiled graph read x where it is, instead of a copy. Imports torch._dynamo."""
    try:
        mark = _mark_static_address.find()
    except AttributeError:
        return
    mark(x)


# Tensors, modules and autograd.

tree_flatten: Callable[[Any], tuple[list[Any], Any]] = _bind(
    "torch.utils._pytree.tree_flatten", since="1.8", serves="every op under torch.func"
)
tree_unflatten: Callable[[Any, Any], Any] = _bind(
    "torch.utils._pytree.tree_unflatten", since="1.8", serves="every op under torch.func"
)
_saved_tensors_hooks: Callable[[bool], Any] = _bind(
    "torch._C._autograd._top_saved_tensors_default_hooks", serves="lazy goals that draw random numbers"
)
_need("torch.Tensor._version", since="1.0", serves="refusing a lazy function that writes into its arguments")
sparse_values: Callable[[Tensor], Tensor] = _bind(
    "torch.Tensor._values",
    since="1.0",
    serves="StepGuard with sparse gradients",
    instead="torch.Tensor.coalesce().values()",
    without="coalesces them first, which is slower",
    fallback=lambda x: x.coalesce().values(),
)
for _name in ("_buffers", "_modules"):
    _need(
        f"torch.nn.Module.{_name}",
        since="1.0",
        serves="GoalSet and its history",
        instead="attributes of the module, which cost as much as a small op",
        without="raises AttributeError",
        owner=nn.Module,
    )
_need(
    "torch.nn.Module._apply",
    since="1.0",
    serves="constraints that stay float32 in a model of halves",
    without="half() rounds them",
)


def pack_hook() -> Any:
    """The function that packs the tensors that autograd saves, or None."""
    hooks = _saved_tensors_hooks(True)
    return hooks and hooks[0]


def write_count(x: Tensor) -> int:
    """How often x has been written to."""
    return x._version


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The buffers by name; each attribute of a module costs as much as a small op."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """The submodules by name."""
    return module._modules


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers keep their precision under ``half()`` and ``bfloat16()`` of a model that contains it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecisionBuffers:
        before = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype not in (torch.float32, torch.float64):
                setattr(self, name, old.to(new.device))
        return self


# Optimizers.

_need(
    "torch.optim.SGD(fused=True)._step_supports_amp_scaling",  # and the attribute found_inf, which it promises to read
    since="1.13",
    serves="StepGuard with fused optimizers",
    without="each step waits for the device",
    owner=lambda: torch.optim.SGD([torch.zeros(1)], fused=True),
)
_unscale: Any = _bind(
    "torch._amp_foreach_non_finite_check_and_unscale_",  # what torch.amp.GradScaler calls: one launch for many tensors
    since="1.8",
    serves="StepGuard",
    instead="torch.isfinite, several launches for each tensor",
    without="uses torch.isfinite, which is slower",
    fallback=None,
)


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step_unless` can step it without waiting for the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_unless(found: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer unless ``found``, 0-dim float32 on its device, is 1, as torch.amp.GradScaler steps it."""
    optimizer.found_inf = found  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def flag_non_finite(grads: list[Tensor], found: Tensor, one: Tensor) -> None:
    """Set ``found``, 0-dim float32, to 1 where a number in the gradients, all of one dtype, is not finite.

    Args:
        one: 1.0, 0-dim float32 on the same device.
    """
    if _unscale is not None:
        _unscale(grads, found, one)  # times 1, which changes no bit
        return
    for grad in grads:
        torch.maximum(found, (~grad.isfinite().all()).to(found), out=found)


# Processors.

cpu_has_amx_fp16: Callable[[], bool] = _bind(
    "torch.cpu._is_amx_fp16_supported",
    serves="products that keep float32's digits on a CPU",
    without="takes every CPU to have it, and multiplies in float64",
    fallback=lambda: True,
)
