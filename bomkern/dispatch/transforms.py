"""The compiled ops under torch.func.

Under grad, vjp, jacrev or vmap, `through` turns a call into one `torch.autograd.Function`, which PyTorch runs below all
transforms, on plain tensors. Its backward is another such function, which runs the op's own backward; the derivative of
that comes from the reference. vmap calls the op for one slice after another. Forward mode raises an error.
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
    """Call ``serve(*arguments, **options)`` under transforms. ``reference`` is its definition, for derivatives."""
    leaves, spec = tree_flatten((arguments, options))
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = [leaves[place] for place in places]
    if op.loss_alone:  # its constraints and weights may change before backward
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
    places: tuple[int, ...]  # positions of the tensors among all arguments
    spec: Any  # the nesting of the arguments

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
    """Run the op."""

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
        present = [grad for grad in grads if grad is not None]
        computed = iter(_Backward.apply(pull, *ctx.saved_tensors, *present))
        return None, *(next(computed) if want else None for want in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        return _each(info.batch_size, in_dims[1:], tensors, partial(_Forward.apply, call))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        ctx.call.refuse_forward_mode()


@dataclass(frozen=True)
class _Pull:
    """Map an op's tensors and the gradients of its results to the requested gradients of the tensors."""

    call: _Call
    wanted: tuple[bool, ...]  # whether each tensor's gradient is requested
    given: tuple[bool, ...]  # whether each result has a gradient

    def compiled(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients by the op's own backward, after another forward."""
        inputs, grads = self._split(tensors)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(want) for x, want in zip(inputs, self.wanted, strict=True)]
            out = self.call.differentiable(self.call.serve, leaves)
        by = [leaf for leaf in leaves if leaf.requires_grad]
        values = [x for x, given in zip(out, self.given, strict=False) if given]
        return tuple(torch.autograd.grad(values, by, list(grads), materialize_grads=True))

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients by the reference, which transforms can differentiate."""
        inputs, grads = self._split(tensors)
        out, pull = _vjp(lambda *x: self.call.differentiable(self.call.reference, x), inputs)
        computed = pull(tuple(next(grads) if g else torch.zeros_like(x) for x, g in zip(out, self.given, strict=False)))
        return tuple(grad for grad, want in zip(computed, self.wanted, strict=True) if want and grad is not None)

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        """Split tensors into the op's tensors and an iterator over the gradients of its results."""
        count = len(self.wanted)
        return tensors[:count], iter(tensors[count:])


class _Backward(torch.autograd.Function):
    """Run the backward of the op."""

    @staticmethod
    def forward(pull: _Pull, *tensors: Tensor) -> tuple[Tensor, ...]:
        return pull.compiled(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pull, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _, pull = _vjp(ctx.pull.reference, ctx.saved_tensors)
        return None, *pull(tuple(grads))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], pull: _Pull, *tensors: Tensor) -> tuple[Any, Any]:
        return _each(info.batch_size, in_dims[1:], tensors, partial(_Backward.apply, pull))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        ctx.pull.call.refuse_forward_mode()


def _vjp(fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Any, Callable[..., Any]]:
    """Return `torch.func.vjp` of ``fn``, whose inputs may be masks too; a mask has gradient None."""
    places = [k for k, x in enumerate(inputs) if x.is_floating_point()]

    def of_numbers(*numbers: Tensor) -> tuple[Tensor, ...]:
        every = list(inputs)
        for k, x in zip(places, numbers, strict=True):
            every[k] = x
        return fn(*every)

    out, pull, *_ = torch.func.vjp(of_numbers, *[inputs[k] for k in places])

    def pull_back(grads: tuple[Tensor, ...]) -> list[Tensor | None]:
        computed = dict(zip(places, pull(grads), strict=True))
        return [computed.get(k) for k in range(len(inputs))]

    return out, pull_back


def _each(size: int, in_dims: Any, arguments: Any, fn: Callable[..., Any]) -> tuple[Any, Any]:
    """Run vmap as a loop: return the stacked results of ``fn`` for all slices of the arguments, and the batch dims."""
    if size == 0:
        raise ValueError("torch.vmap: bomkern's ops need at least one slice, got none")
    results = [fn(*_slice(arguments, in_dims, index)) for index in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    kind = type(results[0])
    return kind(torch.stack(parts) for parts in zip(*results, strict=True)), kind((0,) * len(results[0]))


def _slice(x: Any, dim: Any, index: int) -> Any:
    """Return the slice of an argument, or of a nest of arguments, at an index of its batch dim."""
    if isinstance(x, (tuple, list)):
        return [_slice(part, d, index) for part, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, index)


def loop_under_vmap(op: str, library: torch.library.Library) -> None:
    """Register a loop as the vmap rule of an op, for a backward op inside jacrev or a call in a compiled graph."""
    name, _, overload = op.partition(".")

    def rule(info: Any, in_dims: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        call = getattr(getattr(torch.ops.bomkern, name), overload or "default")
        return _each(info.batch_size, in_dims, arguments, partial(call, **options))

    torch.library.register_vmap(f"bomkern::{op}", rule, lib=library)


def refuse_under_vmap(op: str, library: torch.library.Library) -> None:
    """Make vmap raise an error for an op that writes the record of a GoalSet step."""

    def rule(*arguments: Any) -> None:
        raise RuntimeError(NO_RECORD)

    torch.library.register_vmap(f"bomkern::{op}", rule, lib=library)


def refuse_vmap_of_record() -> None:
    """Raise an error under vmap, before a step changes any state."""
    if under_vmap():
        raise RuntimeError(NO_RECORD)


for _op in OPS.values():
    for _schema in _op.schemas:
        (loop_under_vmap if _schema.in_place is None else refuse_under_vmap)(_schema.name, library)
