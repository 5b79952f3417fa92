"""The compiled ops under torch.func.

Under grad, vjp, jacrev or vmap a call is one `torch.autograd.Function`, which PyTorch runs below all transforms, on
plain tensors: `through`. Its backward is another, and runs the op's own backward; the derivative of that is the
reference's. vmap calls the op for one slice after another. Forward mode is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.torch_internals import tree_flatten, tree_unflatten, under_vmap
from .registry import Op
from .schemas import OPS, library

NO_RECORD = "a GoalSet in training mode keeps a record of its step, which torch.vmap has several of: call eval() first"


def through(
    op: Op, serve: Callable[..., Any], reference: Callable[..., Any], /, *arguments: Any, **options: Any
) -> Any:
    """Return ``serve(*arguments, **options)`` in a form that transforms understand; ``reference`` takes the same."""
    leaves, spec = tree_flatten((arguments, options))
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = [leaves[place] for place in places]
    if op.loss_alone:  # its constraints and weights may have changed when backward comes
        goals = len(arguments[0])
        tensors[goals:] = [setting.clone() for setting in tensors[goals:]]
    others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return _Forward.apply(_Call(op, serve, reference, others, places, spec), *tensors)


@dataclass(frozen=True)
class _Call:
    """A call without its tensors."""

    op: Op
    serve: Callable[..., Any]
    reference: Callable[..., Any]
    others: tuple[Any, ...]
    places: tuple[int, ...]  # of the tensors among all arguments
    spec: Any  # how the arguments are nested

    def run(self, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.others)
        for place, x in zip(self.places, tensors, strict=True):
            leaves[place] = x
        arguments, options = tree_unflatten(leaves, self.spec)
        return fn(*arguments, **options)

    def differentiable(self, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the differentiable results."""
        out = self.run(fn, tensors)
        out = (out,) if isinstance(out, Tensor) else tuple(out)
        return out[:1] if self.op.loss_alone else out

    def refuse_forward_mode(self) -> None:
        name = self.op.public_name
        raise NotImplementedError(f"{name} has no forward-mode derivative: use backward(), or impl='reference'")


class _Forward(torch.autograd.Function):
    """The op."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:
        return call.run(call.serve, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if ctx.call.op.loss_alone:
            ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        pull = _Pull(ctx.call, wanted, tuple(grad is not None for grad in grads))
        if not any(wanted) or not any(pull.given):
            return (None,) * (1 + len(wanted))
        given = [grad for grad in grads if grad is not None]
        made = iter(_Backward.apply(pull, *ctx.saved_tensors, *given))
        return None, *(next(made) if want else None for want in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        return _each(info.batch_size, in_dims[1:], tensors, partial(_Forward.apply, call))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        ctx.call.refuse_forward_mode()


@dataclass(frozen=True)
class _Pull:
    """From an op's tensors and the gradients of its results to the gradients of the tensors wanted."""

    call: _Call
    wanted: tuple[bool, ...]  # of the tensors
    given: tuple[bool, ...]  # of the results

    def compiled(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """By the op's own backward, from another forward."""
        inputs, grads = self._apart(tensors)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, self.wanted, strict=True)]
            out = self.call.differentiable(self.call.serve, leaves)
        by = [leaf for leaf in leaves if leaf.requires_grad]
        values = [x for x, given in zip(out, self.given, strict=False) if given]
        return tuple(torch.autograd.grad(values, by, list(grads), materialize_grads=True))

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same, for transforms to differentiate."""
        inputs, grads = self._apart(tensors)
        out, pull, *_ = torch.func.vjp(lambda *x: self.call.differentiable(self.call.reference, x), *inputs)
        made = pull(tuple(next(grads) if g else torch.zeros_like(x) for x, g in zip(out, self.given, strict=False)))
        return tuple(grad for grad, want in zip(made, self.wanted, strict=True) if want)

    def _apart(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        count = len(self.wanted)
        return tensors[:count], iter(tensors[count:])


class _Backward(torch.autograd.Function):
    """The op's gradient."""

    @staticmethod
    def forward(pull: _Pull, *tensors: Tensor) -> tuple[Tensor, ...]:
        return pull.compiled(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pull, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, again, *_ = torch.func.vjp(ctx.pull.reference, *ctx.saved_tensors)
        return None, *again(tuple(grads))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], pull: _Pull, *tensors: Tensor) -> tuple[Any, Any]:
        return _each(info.batch_size, in_dims[1:], tensors, partial(_Backward.apply, pull))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        ctx.pull.call.refuse_forward_mode()


def _each(size: int, in_dims: Any, arguments: Any, fn: Callable[..., Any]) -> tuple[Any, Any]:
    """vmap by a loop: what ``fn`` returns for each slice of the arguments, stacked, and 0 for each batch dim."""
    if size == 0:
        raise ValueError("torch.vmap: bomkern's ops need at least one slice, got none")
    made = [fn(*_slice(arguments, in_dims, place)) for place in range(size)]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    return type(made[0])(torch.stack(parts) for parts in zip(*made, strict=True)), type(made[0])((0,) * len(made[0]))


def _slice(x: Any, dim: Any, place: int) -> Any:
    if isinstance(x, (tuple, list)):
        return [_slice(part, d, place) for part, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, place)


def loop_under_vmap(op: str, library: torch.library.Library) -> None:
    """Register the loop that vmap runs for an op itself: a backward op inside jacrev, or a call in a compiled graph."""
    name, _, overload = op.partition(".")

    def rule(info: Any, in_dims: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        call = getattr(getattr(torch.ops.bomkern, name), overload or "default")
        return _each(info.batch_size, in_dims, arguments, partial(call, **options))

    torch.library.register_vmap(f"bomkern::{op}", rule, lib=library)


def refuse_under_vmap(op: str, library: torch.library.Library) -> None:
    """Make vmap refuse an op that writes what a step of a GoalSet leaves behind."""

    def rule(*arguments: Any) -> None:
        raise RuntimeError(NO_RECORD)

    torch.library.register_vmap(f"bomkern::{op}", rule, lib=library)


def refuse_vmap_of_record() -> None:
    """Raise under vmap, before anything of a step is kept."""
    if under_vmap():
        raise RuntimeError(NO_RECORD)


for _op in OPS.values():
    for _schema in _op.schemas:
        (loop_under_vmap if _schema.in_place is None else refuse_under_vmap)(_schema.name, library)
