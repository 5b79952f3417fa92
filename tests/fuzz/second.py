"""Compare a case's second derivative with the reference's in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from tests.fuzz.cases import Case
from tests.fuzz.judging import Wrong, leaves_of, moved, pulled
from tests.fuzz.ops import Op, Outputs

# Kinds of values for which a second derivative neither overflows nor is pure rounding.
SMOOTH = {"plain", "negative", "wide", "whole", "ties", "rows again", "units of their own", "large", "outliers", "far"}
ELEMENTS, TERMS = 600, 20_000  # bounds for a tensor and for a pairwise op's temporaries: the reference keeps its graph
NOTHING = 1e-20  # a smaller gradient is the residue of an exponential
LEAST = 1e-18  # a second derivative up to this size may be 0, for gradients of about 1
NEAR = 1e-13  # relative change of an input, which shows the effect of rounding


def twice(op: Op, case: Case) -> Case:
    """Return the case in float64 with second derivatives, or unchanged if it has none."""
    if op.refuses(case) or not any(g.grad for g in case.given):
        return case
    largest = max(torch.Size(g.shape(case.sizes)).numel() for g in case.given)
    if largest > ELEMENTS or largest * max(case.sizes.values()) > TERMS:
        return case
    given = [replace(g, dtype="float64", values=g.values if g.values in SMOOTH else "plain") for g in case.given]
    return replace(case, given=tuple(given), twice=True)


def normed(x: Tensor, unit: float) -> Tensor:
    """Divide by the largest magnitude as a constant, or by the terms' magnitude if they cancel."""
    return x / x.detach().abs().amax().clamp_min(max(unit, NOTHING)) if x.numel() else x


def derivatives(case: Case, outputs: Outputs, leaves: list[Tensor], units: dict[str, float]) -> Outputs:
    """Differentiate a sum of the outputs and their squares, then a sum of the gradients' squares."""
    wanted = {g.name: x for g, x in zip(case.given, leaves, strict=True) if x.requires_grad}
    parts = [normed(x, units.get(name, 0.0)) for name, x in outputs.items() if x.requires_grad]
    if not parts or not wanted:
        return {}
    value = torch.stack([(pulled(x, "ramp") * (x + x.square() / 2)).sum() for x in parts]).sum()
    by = list(wanted.values())
    first = torch.autograd.grad(value, by, create_graph=True, materialize_grads=True)
    grads = [normed(g, units.get(f"grad {name}", 0.0)) for name, g in zip(wanted, first, strict=True)]
    bent = torch.stack([(g.square() * (1.5 + pulled(g, "ramp"))).sum() for g in grads]).sum()
    if not bent.requires_grad:  # no output has a second derivative
        return {name: torch.zeros_like(x) for name, x in wanted.items()}
    second = torch.autograd.grad(bent, by, materialize_grads=True)
    return dict(zip(wanted, second, strict=True))


def check_twice(op: Op, case: Case) -> None:
    """Raise `Wrong` if a second derivative by the inputs alone differs from the reference's."""
    tensors = case.tensors()
    sure = op.sure(case, tensors)
    if any(g.dtype != "float64" for g in case.given) or (sure is not None and not sure.all()):
        return  # or rounding may change a bottleneck
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
