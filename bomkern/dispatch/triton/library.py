"""How an op and its backward op are made known to PyTorch, and where second derivatives come from."""

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
    """Whether it is of torch's older vmap, which has no rule for ops that take or give lists."""
    return grad is not None and is_legacy_batched(grad)


class Aside(torch.autograd.Function):
    """A node that keeps tensors for second derivatives alone, so that a plain backward lets them change meanwhile."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @classmethod
    def keep(cls, *tensors: Tensor | None) -> Tensor:
        """What `kept` takes; one of the tensors at least requires grad."""
        with torch.enable_grad():
            handle: Tensor = cls.apply(*tensors)
        return handle

    @staticmethod
    def kept(handle: Tensor) -> tuple[Any, ...]:
        """The tensors, in their graph. Raises where one of them has changed in place."""
        node: Any = handle.grad_fn
        return tuple(node.saved_tensors)


def by_reference(inputs: Sequence[Tensor], results_of: Callable[..., Any], grads: Grads, want: Sequence[bool]) -> Grads:
    """The gradients by ``inputs`` of which one is wanted, themselves differentiable; None for the others."""
    # Each input by a node of its own: where one is made of another, the gradient of that one ends here all the same.
    inputs = [x.view_as(x) for x in inputs]
    made = results_of(*inputs)
    results = (made,) if isinstance(made, Tensor) else made
    used = [k for k, value in enumerate(results) if grads[k] is not None and value.requires_grad]
    if not used:
        return [None] * len(inputs)
    values, given = [results[k] for k in used], [grads[k] for k in used]
    by = [x for x, wanted in zip(inputs, want, strict=True) if wanted]
    found = iter(torch.autograd.grad(values, by, given, create_graph=True, allow_unused=True))
    return [next(found) if wanted else None for wanted in want]


def register(
    op: str,
    forward: tuple[str, Callable[..., Any], Callable[..., Any]],
    backward: tuple[str, Callable[..., Any], Callable[..., Any]],
    save: Callable[..., None],
    pull: Callable[[Any, Grads, list[bool]], Grads],
    again: Callable[[Any, Grads, list[bool]], Grads],
) -> torch.library.Library:
    """Define ``op_triton`` and ``op_triton_backward``, each by its signature, its implementation and its fake.

    A fake that is given real tensors allocates the results. It is the schema's own (`fakes`), unless Triton's kernels
    return other tensors. Differentiable inputs are the tensors that come first or, where that is a list, those in the
    first argument.

    Args:
        save: ``(ctx, inputs, output)``, keeps in ctx what the two below need.
        pull: ``(ctx, grads, want)``: from the gradients of the results, None where there is none, those of the
            differentiable inputs; what it gives for an input that wants none is not looked at.
        again: the same by the reference, under ``create_graph=True``: gradients that can be differentiated once more.
            See `by_reference`.
    """

    lists = any(kind in backward[0] for kind in ("Tensor[]", "Tensor?[]"))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.listed = not isinstance(inputs[0], Tensor)
        ctx.count = 1 if ctx.listed else len(list(takewhile(lambda x: isinstance(x, Tensor), inputs)))
        # register_autograd wants [], not None, as the gradient of an empty list.
        ctx.others = tuple([] if isinstance(x, (list, tuple)) and not x else None for x in inputs[ctx.count :])
        save(ctx, inputs, output)

    def pull_back(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        want = list(ctx.needs_input_grad[0] if ctx.listed else ctx.needs_input_grad[: ctx.count])
        made: Grads = [None] * len(want)
        if any(want) and any(g is not None for g in grads):
            if lists and not torch.compiler.is_compiling() and any(map(_batched, grads)):
                raise NotImplementedError(f"{OPS[op].public_name} {NO_BATCH}")
            found = (again if torch.is_grad_enabled() else pull)(ctx, grads, want)
            made = [g if wanted else None for g, wanted in zip(found, want, strict=True)]
        return (made, *ctx.others) if ctx.listed else (*made, *ctx.others)

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
