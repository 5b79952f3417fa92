"""All private names of torch that bomkern uses. For a new torch read this file, and csrc/torch_internals.h for C++.

A name is private if it has a leading underscore, or if torch calls it internal or experimental. No other file of
bomkern/ or kernels/ uses such a name (tests/dispatch/test_torch_internals.py). `NEEDED` lists them all, and `missing`
returns those that the installed torch lacks. A missing name never stops the import. A feature that needs it takes
another path or, if there is none, raises `NotImplementedError`.

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
        since: the oldest torch known to have it; "<=2.11" if releases before the oldest supported one were not checked.
        serves: the feature of bomkern that needs it.
        instead: the public name that would replace it, or "none".
        without: what happens in a torch that lacks it.
        owner: returns the object with the last part of ``name``, if the path before it does not lead there.
    """

    name: str
    since: str
    serves: str
    instead: str
    without: str
    owner: Callable[[], Any] | None = None

    def find(self) -> Any:
        """Return the object of that name. Raises AttributeError if this torch lacks it."""
        path = self.name.split(".")
        if self.owner is not None:
            return getattr(self.owner(), path[-1])
        value: Any = torch
        for depth, part in enumerate(path[1:], 2):
            try:
                value = getattr(value, part)
            except AttributeError:
                try:
                    value = importlib.import_module(".".join(path[:depth]))
                except ImportError:
                    raise AttributeError(f"torch {torch.__version__} has no {self.name}") from None
        return value


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
    """Add a name to `NEEDED` that is looked up only when it is used."""
    NEEDED.append(Internal(name, since, serves, instead, without, owner))
    return NEEDED[-1]


def _bind(name: str, *, fallback: Any = _RAISE, **facts: Any) -> Any:
    """Add a name to `NEEDED` and return its object, else ``fallback``, or a class that raises when called."""
    needed = _need(name, **facts)
    try:
        return needed.find()
    except AttributeError:
        return _raiser(needed) if fallback is _RAISE else fallback


def _raiser(needed: Internal) -> type:
    """Return a stand-in for a missing function or class: calling it, or a subclass, raises NotImplementedError."""

    class Missing:
        def __new__(cls, *args: object, **options: object) -> Any:
            raise NotImplementedError(
                f"torch {torch.__version__} has no {needed.name}, which bomkern needs for {needed.serves}: install an "
                "older torch or a newer bomkern"
            )

    return Missing


def missing() -> list[Internal]:
    """Return the entries of `NEEDED` that this torch lacks."""
    lacking = []
    for needed in NEEDED:
        try:
            needed.find()
        except AttributeError:
            lacking.append(needed)
    return lacking


def describe(lacking: list[Internal]) -> list[str]:
    """Return one line for each missing name."""
    return [
        f"torch {torch.__version__} has no {name.name} ({name.serves}): {name.without}; public instead: {name.instead}"
        for name in lacking
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
    without="the compiled ops refuse it themselves; errors of Triton's ops do not name the op",
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
    """Return whether a tracer that runs Python (make_fx, torch.export, a FakeTensorMode) is active."""
    return any(key is None or _mode_of(key) is not None for key in _TRACERS)


@contextmanager
def outside_modes() -> Iterator[None]:
    """Suspend all dispatch modes and transforms, so that plain tensors can be made inside."""
    with _no_modes(), _no_transforms():
        yield


_need(
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


_mark_static_address = _need(
    "torch._dynamo.mark_static_address",
    since="2.1",
    serves="tables of numbers in CUDA graphs that torch.compile makes",
    without="each such graph copies the table",
)


def mark_static_address(x: Tensor) -> None:
    """Let the CUDA graph of a compiled graph read x in place, instead of a copy. Imports torch._dynamo."""
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
    "torch.nn.Module._load_from_state_dict",
    serves="loading a GoalSet's state by the names of its goals",
    instead="torch.nn.Module.register_load_state_dict_pre_hook",
    without="loads by position",
)
_need(
    "torch.nn.Module._apply",
    since="1.0",
    serves="constraints that stay float32 in a model of halves",
    without="half() rounds them",
)


def pack_hook() -> Any:
    """Return the hook that packs the tensors that autograd saves, or None."""
    hooks = _saved_tensors_hooks(True)
    return hooks and hooks[0]


def write_count(x: Tensor) -> int:
    """Return how often x has been written to."""
    return x._version


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the buffers by name; reading an attribute of a module costs as much as a small op."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """Return the submodules by name."""
    return module._modules


class FullPrecisionBuffers(nn.Module):
    """A module whose buffers keep their precision under ``half()`` and ``bfloat16()`` of a model that contains it.

    Buffers that leave the meta device, by ``to_empty`` of a model, get their first values: see `reset_parameters`.
    """

    def reset_parameters(self) -> None:
        """Give all buffers, which may hold anything, the values that they had when the module was made."""
        raise NotImplementedError

    def before_loading(self, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
        """Change a state, whose names have a prefix, before it is loaded. Return whether it can be loaded."""
        return True

    def after_loading(self) -> None:
        """Finish what a loaded state has begun, before the states of submodules are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if self.before_loading(state_dict, prefix, arguments[-1]):
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            self.after_loading()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecisionBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if old.is_floating_point() and new.dtype not in (torch.float32, torch.float64):
                setattr(self, name, old.to(new.device))
        if any(b.is_meta for b in before.values()) and not any(b.is_meta for b in self.buffers(recurse=False)):
            self.reset_parameters()
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
    "torch._amp_foreach_non_finite_check_and_unscale_",  # called by torch.amp.GradScaler: one launch for many tensors
    since="1.8",
    serves="StepGuard",
    instead="torch.isfinite, several launches for each tensor",
    without="uses torch.isfinite, which is slower",
    fallback=None,
)


_need(
    "torch.amp.GradScaler._per_optimizer_states",
    since="1.6",
    serves="StepGuard(scaler=)",
    without="gradients that were unscaled for one optimizer of several are unscaled twice",
    owner=lambda: torch.amp.GradScaler("cpu"),
)


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of Accelerate and Fabric, which keep it as ``optimizer``."""
    for _ in range(8):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            break
        optimizer = inner
    return optimizer


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step_unless` can step the optimizer without waiting for the device."""
    return bool(getattr(innermost(optimizer), "_step_supports_amp_scaling", False))


def step_unless(found_inf: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer unless ``found_inf``, 0-dim float32 on its device, is 1, as torch.amp.GradScaler does."""
    inner = innermost(optimizer)  # a wrapper calls its step, which looks for the attribute in itself
    inner.found_inf = found_inf
    try:
        optimizer.step()
    finally:
        del inner.found_inf


class SteppedByScaler:
    """A class whose ``step`` torch.amp.GradScaler calls without waiting, after it has set two attributes.

    They are ``found_inf``, and ``grad_scale`` if the gradients are still scaled.
    """

    _step_supports_amp_scaling = True


def inside_scaler(stepped: SteppedByScaler) -> bool:
    """Return whether a GradScaler is calling ``step``."""
    return "found_inf" in stepped.__dict__


def from_scaler(stepped: SteppedByScaler) -> tuple[Tensor | None, Tensor | None]:
    """Return (found_inf, grad_scale); None for what was not given."""
    found_inf, scale = (stepped.__dict__.get(name) for name in ("found_inf", "grad_scale"))
    return found_inf if isinstance(found_inf, Tensor) else None, scale


def forget_scaler(stepped: SteppedByScaler) -> None:
    """Remove the attributes, as a GradScaler does after a step that raised no error."""
    for name in ("found_inf", "grad_scale"):
        stepped.__dict__.pop(name, None)


def already_unscaled(scaler: torch.amp.GradScaler, optimizer: object) -> bool:
    """Return whether ``scaler.unscale_`` or ``step`` was called for an optimizer since the last ``update``."""
    states: dict[int, dict[str, Any]] = getattr(scaler, "_per_optimizer_states", {})
    return id(optimizer) in states and bool(states[id(optimizer)].get("found_inf_per_device"))


def flag_non_finite(grads: list[Tensor], found_inf: Tensor, factor: Tensor, scaled: bool = False) -> None:
    """Set ``found_inf``, 0-dim float32, to 1 if any gradient, all of one dtype, has a value that is not finite.

    Args:
        factor: 0-dim float32 on the same device, by which the gradients are multiplied in place.
        scaled: whether the factor may differ from 1.
    """
    if _unscale is not None and grads[0].device.type in ("cpu", "cuda"):  # other devices may lack it
        _unscale(grads, found_inf, factor)  # times 1 changes no bit
        return
    for grad in grads:
        torch.maximum(found_inf, (~grad.isfinite().all()).to(found_inf), out=found_inf)
        if scaled:
            grad.mul_(factor)


# Processors.

cpu_has_amx_fp16: Callable[[], bool] = _bind(
    "torch.cpu._is_amx_fp16_supported",
    serves="products that keep float32's digits on a CPU",
    without="assumes that every CPU has it, and multiplies in float64",
    fallback=lambda: True,
)
