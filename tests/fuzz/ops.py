"""Base class of an op in the fuzzer: how to draw, call and check a case."""

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
    """One op of the fuzzer.

    Outputs of a floating dtype that require grad are differentiated. Integers and bools must be exact.
    """

    name: str
    needs: ClassVar[dict[str, int]] = {}  # the least value of each size; the op must refuse less
    spoiled: tuple[tuple[str, Any], ...] = ()  # options that must be refused
    alike: tuple[str, ...] = ()  # options that depend on sizes, so that a smaller case may break them
    slack = 1e-6  # fraction of the largest value, in float32
    infinities = False  # values distinguish inf from NaN for infinite inputs; other ops may give either
    per_sample = False  # each row of outputs depends on its own row of inputs only

    def serves(self, impl: str, device: str) -> bool:
        return select.why_not(self.name, impl, device) is None

    def draw(self, source: Random, tiny: bool) -> Drawn:
        raise NotImplementedError

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        """Call the op; ``narrow`` rounds numeric options to float32 first."""
        raise NotImplementedError

    def exact(self, case: Case, tensors: list[Tensor], narrow: bool) -> Outputs:
        """Evaluate the definition in the dtype of the tensors."""
        return self.call(case, tensors, "reference", narrow)

    def refuses(self, case: Case) -> Errors:
        """Return the documented errors if the case must be refused, and () if it must be served."""
        errors: list[type[Exception]] = []
        if any(g.dtype == "int64" for g in case.given):
            errors.append(TypeError)
        if any(axis.islower() for g in case.given for axis in g.axes):
            errors.append(ValueError)
        used = {axis.upper() for g in case.given for axis in g.axes}
        if any(case.sizes[name] < least for name, least in self.needs.items() if name in used):
            errors.append(ValueError)
        # repr distinguishes 1 from True
        if any(repr(case.options.get(name, self)) == repr(value) for name, value in self.spoiled):
            errors += [ValueError, TypeError]
        return tuple(errors)

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        """Make one thing wrong: a size, a dtype, a number of axes, or an option."""
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
        """Return the magnitude of the summed terms for each result that may cancel.

        The key is ``grad NAME`` for a gradient. Magnitudes are computed in float64.
        """
        return {}

    def dtype_of(self, case: Case, name: str) -> torch.dtype:
        """Return the dtype of a result that is not a gradient."""
        return torch.float64 if case.wide else torch.float32

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        return self.slack

    def sure(self, case: Case, tensors: list[Tensor]) -> Tensor | None:
        """Return the samples whose bottleneck rounding cannot change, [B] bool, or None without bottlenecks."""
        return None

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Return whether an intermediate may overflow where the result does not.

        The result may then be inf or NaN.
        """
        return False

    def indexed(self, name: str) -> bool:
        """Return whether a result depends on the bottleneck's identity or frequency."""
        return False

    def smaller(self, case: Case) -> list[Case]:
        """Return simpler cases of this op with consistent options."""
        return []
