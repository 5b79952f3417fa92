"""Fuzz the module GoalSet over a few steps, and the op that stores a step's record and averages."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from bomkern import Constraint, GoalSet, Group
from bomkern.dispatch import select
from bomkern.dispatch.select import keeper
from tests.fuzz.cases import Case, laid_out, tensor, values_of
from tests.fuzz.goals import GoalSetOp, made
from tests.fuzz.ops import Drawn, Errors, Op, Outputs


class Module(GoalSetOp):
    """Fuzz ``steps`` training steps, with groups and spill.

    The raw values move on by one sample each step.
    """

    name = "GoalSet"

    def serves(self, impl: str, device: str) -> bool:
        return select.why_not("goal_set", impl, device) is None

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes, given, options = super().draw(source, tiny)
        while "K" in sizes or len(given) in (0, 65):
            sizes, given, options = super().draw(source, tiny)
        options.pop("multipliers", None)
        options["temperature"] = max(0.0, options["temperature"])
        if source.random() < 0.4:
            options.pop("masked", None)  # the goals' means, which set their order, would be over other samples
            options |= {"temperature": 0.0, "spill": source.choice([0.5, 1 / 3, 0.9])}
        return sizes, given, {**options, "steps": source.choice([1, 1, 2, 3])}

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        return drawn

    def goals(self, case: Case) -> dict[str, Constraint | Group]:
        members: dict[int, list[Constraint]] = {}
        for group, one in zip(case.options["groups"], made(case.options["constraints"]), strict=True):
            members.setdefault(group, []).append(one)
        return {
            f"g{g}": of[0] if len(of) == 1 else Group(**{f"m{k}": one for k, one in enumerate(of)})
            for g, of in members.items()
        }

    def named(self, case: Case, columns: list[Tensor]) -> dict[str, Any]:
        """Return the columns by goal, and by member where a goal has several."""
        named: dict[str, list[Tensor]] = {}
        for group, x in zip(case.options["groups"], columns, strict=True):
            named.setdefault(f"g{group}", []).append(x)
        return {g: of[0] if len(of) == 1 else {f"m{k}": x for k, x in enumerate(of)} for g, of in named.items()}

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options = case.options
        device = tensors[0].device
        rule = {name: options[name] for name in ("reduction", "temperature", "spill") if name in options}
        goals = GoalSet(self.goals(case), impl=impl, **rule).to(device)
        if case.wide and not narrow:
            goals.double()
        found: Outputs = {}
        present = self.present(case)
        for step in range(options.get("steps", 1)):
            rolled = [x.roll(step) if step and x.dim() else x for x in tensors]
            masks = None if present is None else self.named(case, list(present.to(device).roll(step, 1)))
            out = goals(self.named(case, rolled), mask=masks)
            found |= {f"loss {step}": out.loss, f"bottleneck {step}": out.bottleneck, f"record {step}": out.record}
        return found

    def indexed(self, name: str) -> bool:
        return name.startswith(("bottleneck", "record", "grad "))

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Return whether one step's part of a float16 gradient may overflow."""
        half = any(g.dtype == "float16" for g in case.given if f"grad {g.name}" == name)
        return half and case.options.get("steps", 1) > 1

    def sure(self, case: Case, tensors: list[Tensor]) -> Tensor | None:
        sure = super().sure(case, tensors)
        if sure is not None:  # each step's samples are the first step's samples, rolled
            sure = torch.stack([sure.roll(step) for step in range(case.options.get("steps", 1))]).all(0)
        if sure is None or not case.options.get("spill") or case.options.get("steps", 1) == 1:
            return sure
        # From the second step on, weights follow the order of the goals' mean deficits. Mean deficits may be equal.
        mean = self.grouped(case, self.deficits(case, tensors)).mean(0)
        apart = (mean[:, None] - mean).abs() + torch.eye(len(mean), dtype=mean.dtype) * 1e300
        close = apart <= 1e-4 * (1 + mean.abs().nan_to_num(0, 0, 0).max())
        return sure & ~(close.any() | ~mean.isfinite().all() | (case.options.get("reduction") == "min"))

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        plain = super().units(case, tensors, outputs)
        record = max(size for name, size in plain.items() if not name.startswith("grad "))
        found = {name: size for name, size in plain.items() if name.startswith("grad ")}
        for step in range(case.options.get("steps", 1)):
            found |= {f"loss {step}": plain["loss"], f"record {step}": record}
        return found


class Keep(Op):
    """Fuzz goal_set_keep, which writes a record, the goals' averages and their weights, without gradients."""

    name = "goal_set_keep"
    needs: ClassVar = {}

    def serves(self, impl: str, device: str) -> bool:
        return impl in ("reference", device) and select.why_not("goal_set", impl, device) is None

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes = {"N": source.choice([1, 2, 7, 31, 64, 450]), "G": source.choice([1, 2, 3, 8, 9, 63, 64])}
        flat = source.random() < 0.9
        given = [tensor(source, "record", "N", "code"), tensor(source, "deficit", "G", "code")]
        dtype = source.choice(["float32", "float32", "float64"])
        layouts = ["plain", "offset", "negated"]
        given = [
            replace(g, dtype=dtype, layout=source.choice(layouts) if flat else g.layout, grad=False) for g in given
        ]
        options = {
            "kept": source.choice(["float32", "float32", "float64"]),
            "rows": source.choice([1, 2, 3, 128]),
            "place": source.choice([0, 1, 127, 2**31 + 1]),
            "rate": source.choice([0.0, 0.02, 0.25, 1.0]),
            "relative": source.random() < 0.4,
            "follow": source.choice([1.0, 1.0, 0.25, 0.01]),
        }
        return sizes, given if source.random() < 0.8 else given[:1], options

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        return drawn

    def refuses(self, case: Case) -> Errors:
        flat = all(laid_out(values_of(g, case.sizes), g.layout).is_contiguous() for g in case.given)
        return () if flat or case.impl == "reference" else (ValueError,)

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options, device = case.options, tensors[0].device
        dtype = getattr(torch, options.get("kept", "float32"))
        goals = case.sizes["G"] if len(tensors) > 1 else 0
        ring = torch.zeros(options.get("rows", 3), case.sizes["N"], dtype=dtype, device=device)
        place = torch.tensor([options.get("place", 0)], device=device)
        spill = [torch.linspace(k, 1, goals, dtype=dtype, device=device) for k in range(4)] if goals else []
        by_order = 0.5 ** torch.arange(goals, dtype=dtype, device=device) if goals else None
        serve, deficit = keeper(device.type, impl), tensors[1] if goals else None
        for _ in range(2):
            more = options.get("relative", False), options.get("follow", 1.0)
            serve(tensors[0], ring, place, deficit, by_order, options.get("rate", 0.25), spill, *more)
        return {"ring": ring, "place": place, **{f"spill {k}": x for k, x in enumerate(spill)}}

    def indexed(self, name: str) -> bool:
        return name in ("spill 1", "spill 3")

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        return {"spill 0": 1.0, "spill 2": 1.0}  # averages begin at 0 and may return to 0

    def sure(self, case: Case, tensors: list[Tensor]) -> Tensor | None:
        """Return all False if rounding decides which average is larger."""
        if len(tensors) < 2:
            return None
        average, rate = torch.linspace(0, 1, len(tensors[1]), dtype=torch.float64), case.options.get("rate", 0.25)
        close = False
        for _ in range(2):
            average = average + rate * (tensors[1] - average).nan_to_num(0.0, 0.0, 0.0)
            apart = (average[:, None] - average).abs() + torch.eye(len(average), dtype=average.dtype) * 1e300
            close |= bool((apart <= 1e-5 * (1 + average.abs().max())).any())
        return torch.full_like(average, not close, dtype=torch.bool)

    def dtype_of(self, case: Case, name: str) -> torch.dtype:
        return torch.int64 if name == "place" else getattr(torch, case.options.get("kept", "float32"))


OPS: tuple[Op, ...] = (Module(), Keep())
