"""Register an op, its backward op and its second derivatives with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ...common.torch_internals import is_legacy_batched
from ..schemas import OPS
from ..transforms import loop_under_vmap

Grads = Sequence[Tensor | None]
NO_BATCH = "takes no batched gradients (is_grads_batched=True, vectorize=True): use torch.func.jacrev"


def _batched(grad: Tensor | None) -> bool:
    """Return whether a gradient comes from torch's older vmap, which has no rule for ops with lists of tensors."""
    return grad is not None and is_legacy_batched(grad)


class Aside(torch.autograd.Function):
    """A node that keeps tensors for second derivatives alone, so that they may change before a plain backward."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @classmethod
    def keep(cls, *tensors: Tensor | None) -> Tensor:
        """Keep tensors, of which at least one requires grad; return a handle for `kept`."""
        with torch.enable_grad():
            handle: Tensor = cls.apply(*tensors)
        return handle

    @staticmethod
    def kept(handle: Tensor) -> tuple[Any, ...]:
        """Return the tensors with their graph. Raises an error if one of them has changed in place."""
        node: Any = handle.grad_fn
        return tuple(node.saved_tensors)


def by_reference(inputs: Sequence[Tensor], results_of: Callable[..., Any], grads: Grads, want: Sequence[bool]) -> Grads:
    """Return differentiable gradients for those ``inputs`` that want one, and None for the others."""
    # Each input gets its own node, so that gradients stop here even if one input was computed from another.
    inputs = [x.view_as(x) for x in inputs]
    out = results_of(*inputs)
    results = (out,) if isinstance(out, Tensor) else out
    used = [k for k, value in enumerate(results) if grads[k] is not None and value.requires_grad]
    if not used:
        return [None] * len(inputs)
    values, grads = [results[k] for k in used], [grads[k] for k in used]
    by = [x for x, wanted in zip(inputs, want, strict=True) if wanted]
    computed = iter(torch.autograd.grad(values, by, grads, create_graph=True, allow_unused=True))
    return [next(computed) if wanted else None for wanted in want]


def register(
    op: str,
    forward: tuple[str, Callable[..., Any], Callable[..., Any]],
    backward: tuple[str, Callable[..., Any], Callable[..., Any]],
    save: Callable[..., None],
    pull: Callable[[Any, Grads, list[bool]], Grads],
    double_backward: Callable[[Any, Grads, list[bool]], Grads],
) -> torch.library.Library:
    """Define ``op_triton`` and ``op_triton_backward`` with autograd.

    The differentiable inputs are the leading tensor arguments or, if the first argument is a list, the tensors in it.

    Args:
        op: the name of the op.
        forward, backward: signature, implementation and fake of each. With real tensors a fake allocates the results.
            It is the one in `fakes`, unless Triton's kernels return other tensors.
        save: ``(ctx, inputs, output)``, saves in ctx the data for the two functions below.
        pull: ``(ctx, grads, want)``, takes the gradients of the results, or None, and returns those of the
            differentiable inputs. Gradients that are not wanted are ignored.
        double_backward: the same by the reference, under ``create_graph=True``, with gradients that can be
            differentiated again. See `by_reference`.
    """

    lists = any(kind in backward[0] for kind in ("Tensor[]", "Tensor?[]"))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.listed = not isinstance(inputs[0], Tensor)
        ctx.count = 1 if ctx.listed else len(list(takewhile(lambda x: isinstance(x, Tensor), inputs)))
        # register_autograd expects [], not None, as the gradient of an empty list.
        ctx.others = tuple([] if isinstance(x, (list, tuple)) and not x else None for x in inputs[ctx.count :])
        save(ctx, inputs, output)

    def pull_back(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        want = list(ctx.needs_input_grad[0] if ctx.listed else ctx.needs_input_grad[: ctx.count])
        computed: Grads = [None] * len(want)
        if any(want) and any(g is not None for g in grads):
            if lists and not torch.compiler.is_compiling() and any(map(_batched, grads)):
                raise NotImplementedError(f"{OPS[op].public_name} {NO_BATCH}")
            computed = (double_backward if torch.is_grad_enabled() else pull)(ctx, grads, want)
            computed = [g if wanted else None for g, wanted in zip(computed, want, strict=True)]
        return (computed, *ctx.others) if ctx.listed else (*computed, *ctx.others)

    library = torch.library.Library("bomkern", "FRAGMENT")
    for suffix, (signature, run, fake) in (("triton", forward), ("triton_backward", backward)):
        name = f"{op}_{suffix}"
        library.define(name + signature)
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"bomkern::{name}", fake, lib=library)
        loop_under_vmap(name, library)
    torch.library.register_autograd(f"bomkern::{op}_triton", pull_back, setup_context=keep, lib=library)
    return library
