"""What the fuzzer knows of an op: how a case is drawn, called, refused, and how large what was added up was."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from bomkern.dispatch import select
from tests.fuzz.cases import Case, Given

Outputs = dict[str, Tensor]
Drawn = tuple[dict[str, int], list[Given], dict[str, Any]]  # sizes, tensors, options
Errors = tuple[type[Exception], ...]


class Op:
    """One op. Its outputs of a floating dtype that require grad are differentiated; integers and bools are exact."""

    name: str
    needs: ClassVar[dict[str, int]] = {}  # the least each size may be: below it the op must refuse
    spoiled: tuple[tuple[str, Any], ...] = ()  # options that must be refused
    alike: tuple[str, ...] = ()  # options whose values follow from sizes, so that a smaller case may break them
    slack = 1e-6  # of the largest value, in float32
    infinities = False  # its values tell inf from NaN where an input is infinite; others are not finite, whichever
    per_sample = False  # a row of inputs decides its row of outputs, and nothing else

    def serves(self, impl: str, device: str) -> bool:
        return select.why_not(self.name, impl, device) is None

    def draw(self, source: Random, tiny: bool) -> Drawn:
        raise NotImplementedError

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        """What the op gives. ``narrow``: numbers beside the tensors go through float32 before all else."""
        raise NotImplementedError

    def exact(self, case: Case, tensors: list[Tensor], narrow: bool) -> Outputs:
        """The definition, in the dtype of the tensors."""
        return self.call(case, tensors, "reference", narrow)

    def refuses(self, case: Case) -> Errors:
        """The documented errors of a case that must be refused; none where it must be served."""
        errors: list[type[Exception]] = []
        if any(g.dtype == "int64" for g in case.given):
            errors.append(TypeError)
        if any(axis.islower() for g in case.given for axis in g.axes):
            errors.append(ValueError)
        used = {axis.upper() for g in case.given for axis in g.axes}
        if any(case.sizes[name] < least for name, least in self.needs.items() if name in used):
            errors.append(ValueError)
        if any(repr(case.options.get(name, self)) == repr(value) for name, value in self.spoiled):  # 1 is not True
            errors += [ValueError, TypeError]
        return tuple(errors)

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        """Something wrong with it: a size, a dtype, a number of axes, an option."""
        sizes, given, options = drawn
        if not given:
            return drawn
        which = source.randrange(3 + 2 * bool(self.spoiled))
        if which > 2:
            name, value = source.choice(self.spoiled)
            return sizes, given, {**options, name: value}
        k = source.randrange(len(given))
        odd = given[k]
        if which == 0:
            odd = replace(odd, dtype="int64", values="plain", grad=False)
        elif len(given) > 1 and odd.axes:
            axis = source.randrange(len(odd.axes))
            odd = replace(odd, axes=odd.axes[:axis] + odd.axes[axis].lower() + odd.axes[axis + 1 :])
        return sizes, [*given[:k], odd, *given[k + 1 :]], options

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        """By result, the size of what was added up where it may cancel; ``grad NAME`` for gradients. In float64."""
        return {}

    def dtype_of(self, case: Case, name: str) -> torch.dtype:
        """Of a result that is not a gradient."""
        return torch.float64 if case.wide else torch.float32

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        return self.slack

    def sure(self, case: Case, tensors: list[Tensor]) -> Tensor | None:
        """[B] bool: samples whose bottleneck rounding cannot change; None where an op has no bottleneck."""
        return None

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Whether a number on the way to this result may overflow where the result does not: it may be inf or NaN."""
        return False

    def indexed(self, name: str) -> bool:
        """Whether a result depends on which goal the bottleneck is, or on how often."""
        return False

    def smaller(self, case: Case) -> list[Case]:
        """Simpler cases of this op that keep what belongs together."""
        return []
