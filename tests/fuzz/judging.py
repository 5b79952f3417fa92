"""Run a case by its implementation, and compare it with the reference in float64."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.fuzz.cases import FLOATS, Case
from tests.fuzz.ops import Op, Outputs

FACTORS = (1.0371, 0.9612, 1.0093)
HALF = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
WIDE = 1e-7  # fraction of the slack that applies in float64
LEAST = {torch.float16: 6e-8, torch.bfloat16: 1e-30, torch.float32: 1e-30, torch.float64: 1e-300}


class Wrong(AssertionError):
    """An error that a case has found."""


@dataclass(frozen=True)
class Truth:
    """The reference's results in float64, and float32 results that show its error."""

    exact: Outputs
    eager: Outputs | None  # the same inputs in float32; None if the compute dtype is float64
    nearby: list[tuple[Outputs, Outputs]]  # (float32, float64) results for inputs a few percent away


def pulled(value: Tensor, how: str) -> Tensor:
    """Return the incoming gradient of one result: signed weights that are equal in every dtype."""
    steps = torch.arange(value.numel(), device=value.device).reshape(value.shape)
    ramp = (steps * 7 % 25 - 8).to(value.dtype) / 8
    if how == "ones":
        return torch.ones_like(value)
    if how == "expanded":
        return value.new_full((), 1 / max(1, value.numel())).expand(value.shape)
    if how == "few":
        few = torch.arange(value.numel(), device=value.device) % 5 == 0
        return torch.where(few.reshape(value.shape), ramp, 0)
    if how == "strided":
        return torch.stack([ramp, ramp * torch.nan], -1)[..., 0]
    if how == "negated":
        return torch._neg_view(-ramp)
    return ramp


PULLS = ("ramp", "ones", "expanded", "few", "strided", "negated")


def differentiated(case: Case, outputs: Outputs, leaves: list[Tensor]) -> Outputs:
    """Return the detached outputs and the gradients of the leaves that require one."""
    used = [x for x in outputs.values() if x.is_floating_point() and x.requires_grad]
    wanted = [(f"grad {g.name}", x) for g, x in zip(case.given, leaves, strict=True) if x.requires_grad]
    pulls, inputs = [pulled(x, case.pull) for x in used], [x for _, x in wanted]
    if used and wanted:
        grads = torch.autograd.grad(used, inputs, pulls, materialize_grads=True)
    else:
        grads = tuple(torch.zeros_like(x) for x in inputs)
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {name: grad for (name, _), grad in zip(wanted, grads, strict=True)}


def leaves_of(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """Return each tensor as its own leaf, with its strides."""
    leaves = [x.detach() for x in tensors]
    return [
        x.requires_grad_() if g.grad and x.is_floating_point() else x for g, x in zip(case.given, leaves, strict=True)
    ]


def reference(op: Op, case: Case, tensors: list[Tensor], dtype: torch.dtype, narrow: bool) -> Outputs:
    leaves = leaves_of(case, [x.detach().to(dtype).contiguous().clone() for x in tensors])
    return differentiated(case, op.exact(case, leaves, narrow), leaves)


def truth_of(op: Op, case: Case, tensors: list[Tensor]) -> Truth:
    exact = reference(op, case, tensors, torch.float64, False)
    return Truth(exact, None if case.wide else reference(op, case, tensors, torch.float32, True), [])


def with_nearby(op: Op, case: Case, tensors: list[Tensor], truth: Truth) -> Truth:
    nearby = []
    for factor in ((1.0,) if case.wide else ()) + FACTORS:
        near = [(x.double() * factor).float() for x in tensors]
        pair = (reference(op, case, near, torch.float32, True), reference(op, case, near, torch.float64, True))
        # With different bottlenecks in float32 and float64, the gradients belong to different goals.
        if all(torch.equal(pair[0][k], x) for k, x in pair[1].items() if not x.is_floating_point()):
            nearby.append(pair)
    return replace(truth, nearby=nearby)


def moved(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """Move tensors to the case's device, and keep strides and offsets."""
    if case.device == "cpu":
        return tensors
    made = []
    for x in tensors:
        if x.is_neg():
            made.append(torch._neg_view((-x).to(case.device)))
            continue
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        made.append(whole.to(case.device).as_strided(x.shape, x.stride(), x.storage_offset()))
    return made


def bytes_of(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage()).clone() for x in tensors]


def check(op: Op, case: Case) -> bool:
    """Raise `Wrong` if the case finds an error; return whether the op rightly refused the case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns under Triton's interpreter in branches that `where` discards
        tensors = case.tensors()
        refused = op.refuses(case)
        given = moved(case, tensors)
        before = bytes_of(given)
        leaves = leaves_of(case, given)
        try:
            results = op.call(case, leaves, case.impl, False)
        except Exception as error:
            if type(error) in refused:
                check_message(op, case, str(error))
                return True
            raise Wrong(f"raised {type(error).__name__}: {str(error)[:300]}") from error
        if refused:
            raise Wrong(f"was served, where it must raise {' or '.join(sorted({e.__name__ for e in refused}))}")
        try:
            ours = differentiated(case, results, leaves)
        except Exception as error:
            raise Wrong(f"backward raised {type(error).__name__}: {str(error)[:300]}") from error
        if any(not torch.equal(a, b) for a, b in zip(before, bytes_of(given), strict=True)):
            raise Wrong("wrote to its inputs")
        check_again(op, case, given, ours)
        judge(op, case, tensors, ours)
    return False


def check_message(op: Op, case: Case, message: str) -> None:
    names = [re.sub(r"\d+$", "", g.name) for g in case.given] + list(case.options) + ["views", "goals", "dataset_size"]
    if not any(re.search(rf"\b{name}", message) for name in names):
        raise Wrong(f"its error names no argument: {message[:300]}")


def check_again(op: Op, case: Case, given: list[Tensor], ours: Outputs) -> None:
    """Check that a second call gives the same bits; on the CPU, with another number of threads."""
    if case.threads == 1 or case.impl == "reference":
        return
    threads = torch.get_num_threads()
    try:
        if case.device == "cpu":
            torch.set_num_threads(case.threads)
        leaves = leaves_of(case, given)
        again = differentiated(case, op.call(case, leaves, case.impl, False), leaves)
    finally:
        torch.set_num_threads(threads)
    for name, a in ours.items():
        b = again[name]
        if not torch.equal(a.nan_to_num(7.5, 8.5, 9.5), b.nan_to_num(7.5, 8.5, 9.5)) or (a.isnan() != b.isnan()).any():
            raise Wrong(f"{name}: other bits in a second call, with {case.threads} threads")


def judge(op: Op, case: Case, tensors: list[Tensor], ours: Outputs) -> None:
    try:
        truth = truth_of(op, case, tensors)
    except Exception as error:
        raise Wrong(f"the reference raised {type(error).__name__}: {str(error)[:300]}") from error
    try:
        compare(op, case, tensors, ours, truth)
    except Wrong:  # eager may be accurate by chance for these inputs only
        compare(op, case, tensors, ours, with_nearby(op, case, tensors, truth))


def compare(op: Op, case: Case, tensors: list[Tensor], ours: Outputs, truth: Truth) -> None:
    doubles = [x.double() for x in tensors]
    units, slack, sure = op.units(case, doubles, truth.exact), op.slack_of(case, doubles), op.sure(case, doubles)
    if list(ours) != list(truth.exact):
        raise Wrong(f"gives {list(ours)}, where the reference gives {list(truth.exact)}")
    groups = tame_rows(op, case, doubles)
    for name, got in ours.items():
        want, given = truth.exact[name], next((g for g in case.given if f"grad {g.name}" == name), None)
        dtype = FLOATS[given.dtype] if given else op.dtype_of(case, name)
        if want.is_floating_point() and got.dtype != dtype:
            raise Wrong(f"{name}: dtype {got.dtype}, should be {dtype}")
        if got.shape != want.shape:
            raise Wrong(f"{name}: shape {list(got.shape)}, should be {list(want.shape)}")
        rows = given.axes.find("B") if given else 0 if want.dim() == 1 and op.per_sample else -1
        either = given is not None or (not op.infinities and any(x.isinf().any() for x in doubles))
        over = op.overflows(case, doubles, name)
        for group in groups if rows >= 0 and case.sizes["B"] == want.shape[rows] else [None]:
            keep = group if group is None else group.nonzero().flatten()
            one = Comparison(name, case, truth, keep, rows, units.get(name, 0.0), slack, either, over)
            one.check(got, sure if op.indexed(name) else None)


def tame_rows(op: Op, case: Case, doubles: list[Tensor]) -> list[Tensor | None]:
    """Split samples into those far larger than most and the others.

    Next to large samples, small errors in the others would go unnoticed.
    """
    if not op.per_sample:
        return [None]
    batch, largest = case.sizes["B"], None
    for g, x in zip(case.given, doubles, strict=True):
        axis = g.axes.find("B")
        if axis < 0 or not x.numel():
            continue
        size = x.abs().movedim(axis, 0).reshape(batch, -1).amax(1)
        largest = size if largest is None else torch.maximum(largest, size)
    if largest is None:
        return [None]
    wild = ~(largest <= 100 * largest.nan_to_num(torch.inf).median())
    return [None] if wild.all() or not wild.any() else [wild, ~wild]


@dataclass(frozen=True)
class Comparison:
    """Compare one result, or some of its rows, with the truth."""

    name: str
    case: Case
    truth: Truth
    keep: Tensor | None  # rows
    axis: int
    unit: float
    slack: float
    either: bool  # the result may be inf or NaN
    over: bool  # a finite result may become inf or NaN

    def part(self, x: Tensor) -> Tensor:
        x = x.detach().cpu()
        return x if self.keep is None else x.index_select(self.axis, self.keep)

    def check(self, got: Tensor, sure: Tensor | None) -> None:
        ours, exact = self.part(got), self.part(self.truth.exact[self.name])
        if sure is not None and not sure.all():
            if ours.dim() == 0 or ours.shape[max(self.axis, 0)] != len(sure):
                return  # rounding may change the bottlenecks that this result depends on
            ours, exact = ours[sure], exact[sure]
        if not exact.is_floating_point():
            if not torch.equal(ours, exact):
                raise Wrong(f"{self.name}: {some(ours, ours != exact)}, should be {some(exact, ours != exact)}")
            return
        limit, least = torch.finfo(ours.dtype).max, LEAST[ours.dtype]
        rounded, ours = exact.to(ours.dtype).double(), ours.double()
        lost = exact.abs() > 0.99 * limit
        if self.truth.eager is not None:
            eager = self.part(self.truth.eager[self.name]).double()
            eager = eager if sure is None or sure.all() else eager[sure]
            # If float32 overflows, nothing is promised where eager has no number or another infinity.
            lost = lost | (~eager.isfinite() & ~((eager == exact) | (eager.isnan() & exact.isnan())))
        known = exact.isfinite() & ~lost
        size = max(exact[known].abs().max().item() if known.any() else 0.0, self.unit)
        # a gradient of a smaller dtype is a rounded float64 gradient
        wide = self.case.wide and got.dtype == torch.float64
        slack = max(self.slack * (WIDE if wide else 1), HALF.get(got.dtype, 0.0))
        steps = self.case.options.get("steps", 1)  # each step rounds a gradient
        allowed = self.eager_error(size) + steps * (slack * size + least)
        same = (
            lost | (ours == rounded) | (ours.isnan() & exact.isnan()) | (ours.isinf() & (exact.abs() + allowed > limit))
        )
        if self.either:
            same = same | (~ours.isfinite() & ~exact.isfinite())
        if self.over:
            same = same | ~ours.isfinite()
        odd = ~same & ~(ours.isfinite() & exact.isfinite())
        if odd.any():
            raise Wrong(f"{self.name}: {some(ours, odd)}, should be {some(exact, odd)}")
        if same.all():
            return
        error = (ours - exact)[~same].abs().max().item()
        if not error <= allowed:
            worst = ((ours - exact).abs() * ~same).nan_to_num(0.0).reshape(-1).argmax()
            raise Wrong(
                f"{self.name}: error {error:.3g}, allowed {allowed:.3g} of {size:.3g}: "
                f"{ours.reshape(-1)[worst].item():.9g}, should be {exact.reshape(-1)[worst].item():.9g}"
            )

    def eager_error(self, size: float) -> float:
        """Return twice eager's largest error, at these inputs and at nearby ones.

        The error of a single result may be 0 by chance.
        """
        worst = 0.0
        pairs = list(self.truth.nearby)
        if self.truth.eager is not None:
            pairs.append((self.truth.eager, self.truth.exact))
        for eager, near in pairs:
            a, b = (self.part(x[self.name]).double() for x in (eager, near))
            known = a.isfinite() & b.isfinite()
            if known.any():
                scale = size / max(b[known].abs().max().item(), self.unit, 1e-300)
                worst = max(worst, (a - b)[known].abs().max().item() * scale)
        return 2 * worst * (2**-29 if self.case.wide else 1)


def some(x: Tensor, where: Tensor) -> str:
    chosen = x[where].reshape(-1)
    return str(chosen[:3].tolist()) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")
