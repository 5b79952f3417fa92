"""What runs around an op: transforms of torch.func, dispatch modes, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .registry import Internal, bind, need

# Transforms of torch.func.

interpreter_stack: Callable[[], list[Any] | None] = bind(
    "torch._C._functorch.get_interpreter_stack",
    since="2.0",
    serves="refusing torch.vmap of a GoalSet in training mode",
)
_transforms_are_active: Callable[[], bool] = bind(
    "torch._C._are_functorch_transforms_active",
    since="2.0",
    serves="every op under torch.func",
    without="asks the stack of interpreters, which torch.compile cannot trace",
    fallback=lambda: bool(interpreter_stack()),
)
need(
    "torch.autograd.forward_ad._current_level",
    serves="refusing forward mode by name",
    without="the compiled ops refuse it themselves; errors of Triton's ops do not name the op",
)
_VMAP: Any = bind(
    "torch._C._functorch.TransformType.Vmap",
    since="2.0",
    serves="refusing torch.vmap of a GoalSet in training mode",
    without="refuses every transform of one",
    fallback=None,
)
is_legacy_batched: Callable[[Tensor], bool] = bind(
    "torch._C._functorch.is_legacy_batchedtensor",
    serves="refusing is_grads_batched=True for Triton's ops by name",
    without="torch's own error says less",
    fallback=lambda x: False,
)


class _NoForwardMode:
    """Stand-in for `forward_ad` in a torch without its ``_current_level``."""

    _current_level = -1


_forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else _NoForwardMode


def under_transform() -> bool:
    """Return whether a transform of torch.func, or forward mode, is active."""
    return _transforms_are_active() or _forward_mode._current_level >= 0


def under_vmap() -> bool:
    """Return whether a torch.vmap is among the active transforms."""
    return any(_VMAP is None or transform.key() == _VMAP for transform in interpreter_stack() or ())


# Dispatch modes: Python code that sees every op, such as the tracers of torch.export.

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = bind(
        "torch.utils._python_dispatch.TorchDispatchMode", since="2.0", serves="lazy goals that draw random numbers"
    )

dispatch_modes: Callable[[], int] = bind(  # how many are active
    "torch._C._len_torch_dispatch_stack",
    since="2.0",
    serves="keeping the table of min_goal_loss's constraints",
    without="makes the table anew in each call, which is slower",
    fallback=lambda: 1,
)
inside_dispatch_mode: Callable[[], bool] = bind(
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode",
    since="2.5",
    serves="compiled calls inside a FakeTensorMode",
    without="raises torch's error there",
    fallback=lambda: False,
)
_mode_of: Callable[[Any], Any] = bind(
    "torch._C._get_dispatch_mode",
    since="2.1",
    serves="sharing tables of numbers on a device",
    without="makes each table anew, which is slower",
    fallback=lambda key: key,
)
_TRACERS = tuple(
    bind(
        f"torch._C._TorchDispatchModeKey.{key}",
        since="2.1",
        serves="sharing tables of numbers on a device",
        without="makes each table anew, which is slower",
        fallback=None,
    )
    for key in ("FAKE", "PROXY", "FUNCTIONAL")
)
_no_modes: Any = bind(
    "torch.utils._python_dispatch._disable_current_modes", since="2.0", serves="tables of numbers on a device"
)
_no_transforms: Any = bind("torch._C._DisableFuncTorch", since="2.0", serves="tables of numbers on a device")


def traced_by_python() -> bool:
    """Return whether a tracer that runs Python (make_fx, torch.export, a FakeTensorMode) is active."""
    return any(key is None or _mode_of(key) is not None for key in _TRACERS)


@contextmanager
def outside_modes() -> Iterator[None]:
    """Suspend all dispatch modes and transforms, so that plain tensors can be made inside."""
    with _no_modes(), _no_transforms():
        yield


# torch.compile.

need(
    "torch.compiler.assume_constant_result._dynamo_marked_constant",
    since="2.0",
    serves="an import of bomkern that does not import torch._dynamo",
    instead="torch.compiler.assume_constant_result, which imports it",
    without="compiled graphs trace the choice of an implementation, and may fail to compile",
    owner=lambda: torch.compiler.assume_constant_result(lambda: None),
)


def mark_constant(fn: Any) -> None:
    """Mark ``fn`` as `torch.compiler.assume_constant_result` does, without its import of torch._dynamo."""
    fn._dynamo_marked_constant = True


def _call_if_there(name: Internal, *arguments: Any) -> None:
    try:
        call = name.find()
    except AttributeError:
        return
    call(*arguments)


_mark_static_address = need(
    "torch._dynamo.mark_static_address",
    since="2.1",
    serves="tables of numbers in CUDA graphs that torch.compile makes",
    without="each such graph copies the table",
)


def mark_static_address(x: Tensor) -> None:
    """Let the CUDA graph of a compiled graph read x in place, instead of a copy. Imports torch._dynamo."""
    _call_if_there(_mark_static_address, x)


_maybe_mark_dynamic = need(
    "torch._dynamo.maybe_mark_dynamic",
    since="2.1",
    serves="compiled functions of rows",
    without="the first change of the number of rows compiles them again",
)


def mark_rows_dynamic(x: Tensor) -> None:
    """Let torch.compile treat the first size of an argument as a symbol from its first call on."""
    _call_if_there(_maybe_mark_dynamic, x, 0)
