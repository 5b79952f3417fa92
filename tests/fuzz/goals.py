"""Fuzz the bottleneck rule: min_goal_loss, goal_set, goal_set_keep and GoalSet."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

import bomkern
from bomkern import ConstraintTable, reference
from bomkern.common.reductions import REDUCTIONS
from bomkern.constraints import Constraint
from bomkern.dispatch import select
from bomkern.reference import record_parts
from tests.fuzz.cases import Case, Given, alike, size, tensor
from tests.fuzz.ops import Drawn, Errors, Op, Outputs
from tests.support.constraints import arguments, kinds

KINDS = kinds()
LEVEL = 1e-8  # scores are at most 1, so a score of 1e-16 may round to 0


def level_unit(deficits: Tensor) -> float:
    """Return the scale of the error in the mean ``min(exp(-deficit), 1)``: ``|deficit|`` times that exponential."""
    size = torch.exp(-deficits.clamp(min=0)) * deficits.clamp(min=0)
    return max(LEVEL, torch.where(size.isfinite(), size, 0).max().item() if size.numel() else 0.0)


def constraint(source: Random) -> list[Any]:
    """Draw a constraint as data: its name and its numbers."""
    scale, at = source.choice([1e-3, 0.1, 0.3, 0.5, 1.0, 7.0, 1e3]), source.choice([0.0, 0.0, 0.1, 0.5, -1.3, 1e4])
    name = source.choice(list(KINDS))
    tail = source.choice([0.05, 0.3, 0.01, 0.9])
    return [name, *arguments(KINDS[name], scale, at, tail).values()]


def made(given: list[list[Any]]) -> list[Constraint]:
    return [KINDS[name](*numbers) for name, *numbers in given]


def table(case: Case, tensors: list[Tensor], narrow: bool) -> ConstraintTable:
    """Return the constraints in the tensors' dtype, with their numbers rounded to the case's dtype."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    own = torch.float64 if case.wide and not narrow else torch.float32
    found = ConstraintTable(made(case.options["constraints"]), tensors[0].device, own)
    found.params = found.params.to(torch.float64 if wide else torch.float32)
    return found


class Goals(Op):
    """Base of the fuzzers of K goals: one [B, K] tensor, one [K] tensor, or K tensors, [B] or 0-dim each."""

    needs: ClassVar = {"B": 1}
    alike = ("constraints", "groups", "multipliers", "materialize")
    per_sample = True
    infinities = True

    def draw_goals(self, source: Random, tiny: bool, role: str) -> tuple[dict[str, int], list[Given], int]:
        few, many = [1, 2, 3, 4], [5, 6, 7, 8, 9, 9, 16, 17, 33, 63, 64]
        count = source.choice(few if tiny or source.random() < 0.4 else many)
        count = source.choice([0, 65]) if source.random() < 0.01 else count
        most = 9 if tiny else 20_000 if source.random() < 0.01 else 2050
        batch = most if most == 20_000 else size(source, min(most, max(9, 200_000 // max(1, count) ** 2)))
        if source.random() < 0.3:
            return {"B": batch, "K": count}, [tensor(source, "goals", "BK", role)], count
        given = [tensor(source, f"goals{k}", "B" if source.random() < 0.9 else "", role) for k in range(count)]
        return {"B": batch}, alike(source, given), count

    def count(self, case: Case) -> int:
        return case.sizes["K"] if "K" in case.sizes else len(case.given)

    def batch(self, case: Case) -> int:
        return case.sizes["B"] if any("B" in g.axes for g in case.given) else 1

    def refuses(self, case: Case) -> Errors:
        errors = super().refuses(case)
        return errors if 1 <= self.count(case) <= 64 else (*errors, ValueError)

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        sizes, given, options = super().spoil(source, drawn)
        if sum(g.axes in ("B", "b") for g in given) < 2:  # one goal of another size is not an error by itself
            given = [replace(g, axes=g.axes.upper()) for g in given]
        return sizes, given, options

    def deficits(self, case: Case, tensors: list[Tensor]) -> Tensor:
        """Return the deficits, [B, K] in float64."""
        x = tensors[0] if "K" in case.sizes else torch.stack([t.expand(self.batch(case)) for t in tensors], 1)
        if case.options.get("constraints") is None:
            return reference.deficit(x.reshape(-1, self.count(case)), None, None)
        found = table(case, tensors, False)
        return reference.deficit(x.reshape(-1, self.count(case)), found.params, torch.tensor(found.curves))

    def margin(self, case: Case, tensors: list[Tensor]) -> Tensor:
        """Return a bound for the rounding error of each deficit, [B, K].

        In float32 it is the rounding of the raw value and of the constraint's centre.
        """
        eps = 1e-14 if case.wide else 1e-6
        return eps * (1 + self.deficits(case, tensors).abs())

    def near_ties(self, deficits: Tensor, margin: Tensor) -> Tensor:
        """Return along the last axis whether a smaller deficit is within rounding of the largest."""
        d = torch.where(deficits.isnan(), torch.inf, deficits)
        worst = d.amax(-1, keepdim=True)
        near = (d < worst) & (d >= worst - 2 * margin) & worst.isfinite()
        return near.any(-1)

    def sure(self, case: Case, tensors: list[Tensor]) -> Tensor | None:
        deficits = self.grouped(case, self.deficits(case, tensors))
        margin = self.grouped(case, self.margin(case, tensors))
        deficits = self.judged(case, deficits)
        # Scores of one sample are compared directly, those of several samples by their logarithms.
        near = self.near_ties(deficits, margin * 0 if case.options.get("constraints") is None else margin)
        if not case.wide:  # deficits exceed float32's largest number
            near = near | (
                self.deficits(case, [x.float() for x in tensors]).isinf() & ~self.deficits(case, tensors).isinf()
            ).any(1)
        if case.options.get("reduction") == "min":
            per_sample = deficits.nan_to_num(torch.inf, torch.inf).amax(1)
            near = near | near.any() | self.near_ties(per_sample, margin.amax(1))
            if case.options.get("temperature", 0.0) > 0:  # other goals count too, so a tie may not go to the first
                near = near | ((per_sample >= per_sample.max() - 2 * margin.amax(1)).sum() > 1)
        return ~near

    def grouped(self, case: Case, deficits: Tensor) -> Tensor:
        return deficits

    def judged(self, case: Case, deficits: Tensor) -> Tensor:
        """Return the goals' deficits [B, G] with -inf where a goal is absent."""
        return deficits

    def batch_level(self, case: Case, tensors: list[Tensor]) -> dict[str, float]:
        """Return the largest term of each batch-level goal's gradient, a sum over samples of either sign."""
        leaves = [t.detach().requires_grad_() for t in tensors]
        every = self.deficits(case, leaves)
        slopes = torch.autograd.grad(torch.where(every.isfinite(), every, 0).sum(), leaves, materialize_grads=True)
        most = 2 / self.batch(case) / (self.batch(case) if case.options.get("reduction", "mean") == "mean" else 1)
        named = zip(case.given, slopes, strict=True)
        return {f"grad {g.name}": most * s.abs().nan_to_num(0, 0, 0).item() for g, s in named if g.axes == ""}

    def smaller(self, case: Case) -> list[Case]:
        """Return the cases with one goal removed."""
        found, count = [], self.count(case)
        for k in range(count if count > 1 else 0):
            options = dict(case.options)
            for name in ("constraints",):
                if isinstance(options.get(name), list):
                    options[name] = options[name][:k] + options[name][k + 1 :]
            options.pop("materialize", None)
            sizes, given = dict(case.sizes), case.given
            if "K" in sizes:
                sizes["K"] -= 1
            else:
                given = given[:k] + given[k + 1 :]
            fewer = self.without(replace(case, sizes=sizes, given=given, options=options), k)
            if fewer is not None:
                found.append(fewer)
        for k, g in enumerate(case.given):
            if g.axes == "B":
                found.append(replace(case, given=(*case.given[:k], replace(g, axes=""), *case.given[k + 1 :])))
        return found

    def without(self, case: Case, k: int) -> Case | None:
        return case


class MinGoal(Goals):
    name = "min_goal"
    spoiled = (("reduction", "max"), ("reduction", 1), ("route", "sometimes"), ("materialize", [99]))

    def draw(self, source: Random, tiny: bool) -> Drawn:
        scored = source.random() < 0.25
        sizes, given, count = self.draw_goals(source, tiny, "score" if scored else "raw")
        if "K" in sizes and source.random() < 0.1:
            given = [replace(given[0], axes="K")]
        options: dict[str, Any] = {"reduction": source.choice(list(REDUCTIONS)), "return_stats": source.random() < 0.7}
        if not scored:
            options["constraints"] = [constraint(source) for _ in range(count)]
            if source.random() < 0.15:
                options["constraints"] = [constraint(source)] * count
            options["how"] = source.choice(["list", "table", "tuple"])
        if source.random() < 0.4:
            options["route"] = source.choice(["always", "never", "auto"])
            if count and "K" not in sizes:
                options["materialize"] = [k for k in range(count) if source.random() < 0.3]
        return sizes, given, options

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options = dict(case.options)
        constraints, how = options.pop("constraints", None), options.pop("how", "table")
        if constraints is not None and tensors:
            own = all(x.dtype == g.dtype for x, g in zip(tensors, case.given, strict=True))
            if how == "table" or not own or not constraints:
                constraints = table(case, tensors, narrow) if 0 < len(constraints) <= 64 else made(constraints)
            else:
                constraints = {"list": list, "tuple": tuple}[how](made(constraints))
        goals: Any = tensors[0] if "K" in case.sizes else tensors
        with_stats = options.get("return_stats", False)
        found = bomkern.min_goal_loss(goals, constraints, **options, impl=impl)
        loss, stats = found if with_stats else (found, None)
        return {"loss": loss, **({} if stats is None else stats._asdict())}

    def indexed(self, name: str) -> bool:
        return name in ("bottleneck", "share", "finite") or name.startswith("grad ")

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Return whether the slope 1 / score overflows before it is multiplied by the incoming gradient."""
        if case.options.get("constraints") is not None or not name.startswith("grad "):
            return False
        least = 1 / torch.finfo(torch.float64 if case.wide else torch.float32).max
        return any(((x > 0) & (x <= least)).any().item() for x in tensors)

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        every = self.deficits(case, tensors).amax(1)
        every = every[every.isfinite()].abs()
        found = {"level": level_unit(self.deficits(case, tensors)), **self.batch_level(case, tensors)}
        if not len(every):
            return found
        reduction = case.options.get("reduction", "mean")
        size = every.sum() if reduction == "sum" else every.mean()
        return found | ({"loss": size.item()} if reduction in ("mean", "sum") else {})


class GoalSetOp(Goals):
    name = "goal_set"

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes, given, count = self.draw_goals(source, tiny, "raw")
        owner, groups = 0, []
        chance = source.choice([1.0, 1.0, 0.5, 0.0])
        for k in range(count):
            owner += k > 0 and source.random() < chance
            groups.append(int(owner))
        options: dict[str, Any] = {
            "constraints": [constraint(source) for _ in range(count)],
            "groups": groups,
            "reduction": source.choice(list(REDUCTIONS)),
            "temperature": source.choice([0.0, 0.0, 1e-30, 1e-3, 0.05, 0.3, 3.0, 100.0, -1.0]),
        }
        if source.random() < 0.35:
            options["multipliers"] = [source.choice([0.0, 0.25, 0.5, 1.0, 3.0]) for _ in range(owner + 1)]
        if source.random() < 0.35:
            options["masked"] = source.randrange(1000)
        return sizes, given, options

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        sizes, given, options = drawn
        if source.random() < 0.5 and len(options["groups"]) > 1:
            wrong = [options["groups"][:-1], [2 * g for g in options["groups"]], options["groups"][::-1]]
            wrong = [w for w in wrong if not self.fits(w, len(options["groups"]))]
            if wrong:
                return sizes, given, {**options, "groups": source.choice(wrong)}
        return super().spoil(source, drawn)

    def fits(self, groups: list[int], count: int) -> bool:
        steps = [b - a for a, b in zip([0, *groups], groups, strict=False)]
        return len(groups) == count and all(step in (0, 1) for step in steps) and groups[:1] in ([0], [])

    def refuses(self, case: Case) -> Errors:
        errors = super().refuses(case)
        return errors if self.fits(case.options["groups"], self.count(case)) else (*errors, ValueError)

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options, device = case.options, tensors[0].device if tensors else torch.device("cpu")
        serve = select.resolve("goal_set", device.type, impl)
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        own = torch.float64 if case.wide and not narrow else torch.float32
        number = lambda x: torch.tensor(x, dtype=own, device=device).to(dtype)  # noqa: E731
        params, curves = (
            number([c.ramp for c in made(options["constraints"])]),
            [c.curve for c in made(options["constraints"])],
        )
        groups, multipliers = options["groups"], options.get("multipliers")
        present = self.present(case)
        masks = {}
        if present is not None:
            masks = {"present": present.to(device), "counts": reference.counts_of(present, groups, dtype).to(device)}
        loss, bottleneck, record = serve(
            tensors,
            params,
            curves,
            groups,
            number(options.get("temperature", 0.0)),
            REDUCTIONS[options.get("reduction", "mean")],
            None if multipliers is None else number(multipliers),
            **masks,
        )
        parts = record_parts(record, groups[-1] + 1, self.count(case))
        return {"loss": loss, "bottleneck": bottleneck, **{f"record {name}": x for name, x in parts.items()}}

    def indexed(self, name: str) -> bool:
        return name in ("bottleneck", "record share", "record finite") or name.startswith("grad ")

    def present(self, case: Case) -> Tensor | None:
        """Return the mask [K, B], drawn from the case's number; samples without any goal are among them."""
        seed, count = case.options.get("masked"), self.count(case)
        if seed is None or not 1 <= count <= 64 or not self.fits(case.options["groups"], count):
            return None
        generator = torch.Generator().manual_seed(seed)
        likely = torch.rand(count, 1, generator=generator)
        present = torch.rand(count, self.batch(case), generator=generator) < likely + 0.2
        present[:, torch.rand(self.batch(case), generator=generator) < 0.1] = False
        return present

    def grouped(self, case: Case, deficits: Tensor) -> Tensor:
        member, present = reference.groups_of(case.options["groups"], deficits), self.present(case)
        if present is not None:
            inside = present.t()[:, :, None] & (member > 0)
            member = inside / inside.sum(1, keepdim=True).clamp(min=1).to(deficits.dtype)
        return reference.mean_of_members(deficits, member)

    def judged(self, case: Case, deficits: Tensor) -> Tensor:
        present = self.present(case)
        if present is None:
            return deficits
        member = reference.groups_of(case.options["groups"], deficits)
        return torch.where((present.t()[:, :, None] & (member > 0)).any(1), deficits, -torch.inf)

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        # The relative error of a weight is the error of the goals' difference over mu.
        mu = case.options.get("temperature", 0.0)
        if case.options.get("multipliers") is not None or not mu > 0:
            return self.slack
        deficits = self.grouped(case, self.deficits(case, tensors))
        size = deficits[deficits.isfinite()].abs().max().item() if deficits.isfinite().any() else 0.0
        return self.slack * (1 + size / mu)

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        every = self.deficits(case, tensors)
        every = torch.where(every.isfinite(), every, 0).abs()
        weights = case.options.get("multipliers")
        size = self.grouped(case, every)
        total = (size * size.new_tensor(weights)).sum(1) if weights is not None else size.amax(1)
        most = total.sum() if case.options.get("reduction") == "sum" else total.max()
        x = [torch.where(t.isfinite(), t, 0).abs().max().item() for t in tensors if t.numel()]
        found = {"loss": most.item(), "record loss": most.item(), "record deficit": size.max().item()}
        grads = [outputs[f"grad {g.name}"].abs() for g in case.given if f"grad {g.name}" in outputs]
        largest = max((g.max().item() for g in grads if g.numel()), default=0.0)
        found |= {name: max(largest, own) for name, own in self.batch_level(case, tensors).items()}
        level = level_unit(self.grouped(case, self.deficits(case, tensors)))
        return found | {"record level": level, "record share": 1.0, "record raw": max(x, default=0.0)}

    def without(self, case: Case, k: int) -> Case | None:
        groups = case.options["groups"]
        fewer = groups[:k] + groups[k + 1 :]
        places = sorted(set(fewer))
        options = {**case.options, "groups": [places.index(g) for g in fewer]}
        if options.get("multipliers") is not None:
            options["multipliers"] = [options["multipliers"][g] for g in places]
        return replace(case, options=options)


OPS: tuple[Op, ...] = (MinGoal(), GoalSetOp())
