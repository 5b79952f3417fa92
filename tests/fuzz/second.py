"""A case's second derivative, held against the reference's in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from tests.fuzz.cases import Case
from tests.fuzz.judging import Wrong, leaves_of, moved, pulled
from tests.fuzz.ops import Op, Outputs

# Values of which a second derivative neither overflows nor is rounding alone.
SMOOTH = {"plain", "negative", "wide", "whole", "ties", "rows again", "units of their own", "large", "outliers", "far"}
ELEMENTS, TERMS = 600, 20_000  # of a tensor, and of the temporaries of a pairwise op: the reference keeps its graph
NOTHING = 1e-20  # a gradient below is what an exponential left of one
LEAST = 1e-18  # of numbers whose gradients are about 1: what a second derivative of 0 may be
NEAR = 1e-13  # relative: what an input is moved by, to see how much rounding may change


def twice(op: Op, case: Case) -> Case:
    """The case in float64 and to be differentiated twice, or as it is where it cannot be."""
    if op.refuses(case) or not any(g.grad for g in case.given):
        return case
    largest = max(torch.Size(g.shape(case.sizes)).numel() for g in case.given)
    if largest > ELEMENTS or largest * max(case.sizes.values()) > TERMS:
        return case
    given = [replace(g, dtype="float64", values=g.values if g.values in SMOOTH else "plain") for g in case.given]
    return replace(case, given=tuple(given), twice=True)


def normed(x: Tensor, unit: float) -> Tensor:
    """In units of its largest number, a constant, or of what was added up where that cancels."""
    return x / x.detach().abs().amax().clamp_min(max(unit, NOTHING)) if x.numel() else x


def derivatives(case: Case, outputs: Outputs, leaves: list[Tensor], units: dict[str, float]) -> Outputs:
    """The gradients of a sum of squares of the gradients, of a sum of the outputs and their squares."""
    wanted = {g.name: x for g, x in zip(case.given, leaves, strict=True) if x.requires_grad}
    parts = [normed(x, units.get(name, 0.0)) for name, x in outputs.items() if x.requires_grad]
    if not parts or not wanted:
        return {}
    value = torch.stack([(pulled(x, "ramp") * (x + x.square() / 2)).sum() for x in parts]).sum()
    by = list(wanted.values())
    first = torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)
    grads = [normed(g, units.get(f"grad {name}", 0.0)) for name, g in zip(wanted, first, strict=True)]
    bent = torch.stack([(g.square() * (1.5 + pulled(g, "ramp"))).sum() for g in grads]).sum()
    if not bent.requires_grad:  # a loss of nothing that has a gradient
        return {name: torch.zeros_like(x) for name, x in wanted.items()}
    second = torch.autograd.grad(bent, by, materialize_grads=True)
    return dict(zip(wanted, second, strict=True))


def check_twice(op: Op, case: Case) -> None:
    """Raises `Wrong` where a second derivative, asked for by the inputs alone, is not the reference's."""
    tensors = case.tensors()
    sure = op.sure(case, tensors)
    if any(g.dtype != "float64" for g in case.given) or (sure is not None and not sure.all()):
        return  # or of a bottleneck that rounding may change
    source = torch.Generator().manual_seed(1)
    near = [x * (1 + NEAR * torch.randn(x.shape, generator=source, dtype=x.dtype)) for x in tensors]
    units: dict[str, float] = {}
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (tensors, near):
            leaves = leaves_of(case, [x.contiguous().clone() for x in given])
            outputs = op.exact(case, leaves, False)
            if not all(x.isfinite().all() for x in outputs.values() if x.is_floating_point()):
                return
            units = units or op.units(case, tensors, {name: x.detach() for name, x in outputs.items()})
            found.append(derivatives(case, outputs, leaves, units))
        leaves = leaves_of(case, moved(case, tensors))
        try:
            ours = derivatives(case, op.call(case, leaves, case.impl, False), leaves, units)
        except Exception as error:
            raise Wrong(f"second derivative: {type(error).__name__}: {str(error)[:300]}") from error
    slack = max(1e-9, 1e-5 * op.slack_of(case, tensors))
    for name, want in found[0].items():
        compare(name, ours[name].cpu(), want, found[1][name], slack)


def compare(name: str, got: Tensor, want: Tensor, near: Tensor, slack: float) -> None:
    known = want.isfinite() & near.isfinite()
    if got.shape != want.shape or not got[known].isfinite().all():
        raise Wrong(f"second derivative of {name}: {got[known].tolist()[:4]}, should be {want[known].tolist()[:4]}")
    if not known.any():
        return
    error, size = (got - want)[known].abs(), torch.maximum(got.abs(), want.abs())[known].max().item()
    allowed = slack * size + 30 * (near - want)[known].abs().max().item() + LEAST
    if not (error <= allowed).all():
        k = int(error.argmax())
        raise Wrong(
            f"second derivative of {name}: error {error[k]:.3g}, allowed {allowed:.3g} of {size:.3g}: "
            f"{got[known][k].item():.9g}, should be {want[known][k].item():.9g}"
        )
