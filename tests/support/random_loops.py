"""Random training loops of a `GoalSet`, each step of which is compared with `plain_rule`."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bomkern import (
    Anchored,
    Box,
    Calibrated,
    GoalSet,
    Group,
    Lower,
    Minimize,
    MinimizeHard,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
)

from .plain_rule import BARRIER, HARD, LINEAR, Column, PlainRule, TiedError

CURVES = {MinimizeHard: HARD, Box: BARRIER}
CLOSE = {torch.float32: 2e-4, torch.float64: 2e-5}  # policies and weights are float32 for goals of any dtype


class Loop:
    """One loop: a GoalSet and its model, whose choices follow from a seed, so that all ranks make the same.

    Args:
        seed: of all choices and values.
        compiled: whether the GoalSet's calls are compiled.
        group: the ranks that share the batch.

    Attributes:
        did: what happened in the loop, by name.
    """

    def __init__(self, seed: int, compiled: bool = False, group: dist.ProcessGroup | None = None) -> None:
        self.chance, self.seed, self.compiled, self.group = random.Random(seed), seed, compiled, group
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.values = torch.Generator().manual_seed(seed)
        self.did: dict[str, int] = {}
        chance = self.chance
        self.dtype = chance.choice([torch.float32, torch.float64])
        self.kinds: dict[str, Any] = {}  # by column
        goals: dict[str, Any] = {}
        for k in range(chance.randint(2, 4)):
            if chance.random() < 0.25:
                names = [f"g{k}.m{j}" for j in range(2)]
                goals[f"g{k}"] = names
            else:
                names = [f"g{k}"]
                goals[f"g{k}"] = None
            self.kinds |= {name: self._kind() for name in names}
        self.members = {name: names for name, names in goals.items() if names}
        self.order = list(goals)
        self.of_batch = {name for name in self.kinds if chance.random() < 0.2}  # 0-dim
        rule = chance.choice(["hard", "smooth", "spill"])
        self.options: dict[str, Any] = {"reduction": chance.choice(["mean", "mean", "sum", "min", "none"])}
        if rule == "spill":
            if self.options["reduction"] == "min":
                self.options["reduction"] = "mean"
            self.options["spill"] = Spill(0.5, halflife=2.0)
        elif rule == "smooth":
            self.options["temperature"] = chance.choice([0.1, 1.0])
        if chance.random() < 0.3:
            self.options["guard"] = ShareGuard(0.2137, 0.4219, rate=0.05, halflife=2.0)
        self.options["impl"] = chance.choice([None, "reference"])
        self.optional = set() if compiled or chance.random() < 0.4 else {n for n in self.kinds if chance.random() < 0.6}
        self.goals = self._made()
        self.call: Callable[..., Any] = torch.compile(self.goals, backend="aot_eager") if compiled else self.goals
        self.model = self._modelled()

    def _kind(self) -> Any:
        chance = self.chance
        some = chance.uniform
        return chance.choice(
            [
                lambda: Minimize(some(0.5, 2), some(-1, 1)),
                lambda: Upper(some(-1, 1), some(0.5, 2)),
                lambda: Lower(some(-1, 1), some(0.5, 2)),
                lambda: MinimizeHard(some(0.5, 2)),
                lambda: Box(-1.0, some(0.5, 2)),
                lambda: Anchored(some(-1, 0), some(0.5, 2)),
                lambda: Anchored(some(0.5, 2), some(-1, 0)),
                lambda: Calibrated(chance.randint(1, 4), chance.choice(["max", 0.7]), some(0.8, 1.2)),
                lambda: Tracking(halflife=some(1, 4), quantile=some(0.2, 1.0)),
            ]
        )()

    def _made(self) -> GoalSet:
        given = {
            name: Group(**{n.partition(".")[2]: self.kinds[n] for n in self.members[name]})
            if name in self.members
            else self.kinds[name]
            for name in self.order
        }
        made = GoalSet(given, optional=sorted(self.optional), process_group=self.group, **self.options)
        return made.double() if self.dtype is torch.float64 else made

    def _columns(self) -> list[str]:
        return [column for name in self.order for column in self.members.get(name, [name])]

    def _modelled(self) -> PlainRule:
        columns = []
        for name in self._columns():
            kind = self.kinds[name]
            constraint = getattr(kind, "constraint", kind)
            policy: tuple[str, Any] | None = None
            if isinstance(kind, Calibrated):
                policy = "calibrated", (kind.until, kind.level, kind.margin)
            if isinstance(kind, Tracking):
                policy = "tracking", (kind.weight, kind.level)
            ramp = [float(torch.tensor(x)) for x in constraint.ramp]
            columns.append(Column(name, name.partition(".")[0], ramp, CURVES.get(type(constraint), LINEAR), policy))
        spill, guard = self.options.get("spill"), self.options.get("guard")
        return PlainRule(
            columns,
            self.options["reduction"],
            self.options.get("temperature", 0.0),
            spill and (spill.ratio, spill.rate),
            guard and (guard.low, guard.high, guard.rate, guard.weight),
        )

    # One step.

    def step(self) -> None:
        """Make a step of the loop and of its model, and compare them."""
        chance = self.chance
        if chance.random() < 0.15:
            self._resume()
        if chance.random() < 0.15:
            self._look()
        micros = 1 if chance.random() < 0.6 else chance.randint(2, 4)
        closure = 3 if chance.random() < 0.1 else 1
        spoiled = chance.randrange(micros) if chance.random() < 0.1 else -1
        self.model.begin()
        with self.goals.one_step() if closure > 1 else nullcontext():
            for evaluation in range(closure):
                for m in range(micros):
                    out = self._micro(m, micros, spoiled == m, evaluation)
            if closure > 1:
                self._note("closure")
        ok = bool(out.finite) if closure == 1 else self.model.finite_so_far()
        if spoiled >= 0:
            self._note("not finite")
        if chance.random() < 0.15 or not ok:
            ok = False
            self.goals.accept(torch.tensor(False))
            self._note("rejected")
        record = self.model.end(ok)
        self._compare_state(record)

    def _micro(self, m: int, micros: int, spoil: bool, evaluation: int) -> Any:
        batch = self.chance.randint(1, 5)
        parts = [self._part(batch, spoil and rank == 0) for rank in range(self.world)]
        expected = self.model.micro(parts) if evaluation == 0 else self.model.again(parts)
        mine = parts[self.rank]
        leaves = {n: v.detach().clone().requires_grad_() for n, (v, _) in mine.items() if v is not None}
        raw = self._nested({n: leaves.get(n) for n in mine})
        masks = {n: mask for n, (_, mask) in mine.items() if mask is not None}
        arguments: tuple[Any, ...] = (raw, masks) if masks else (raw,)
        several = micros > 1 or self.chance.random() < 0.1
        if several:
            self._note("accumulated", m == micros - 1)
        with self.goals.accumulate(last=m == micros - 1) if several else nullcontext():
            out = self.call(*arguments)
        loss, bottleneck, scale = expected.loss, expected.bottleneck, 1.0
        own = slice(self.rank * batch, (self.rank + 1) * batch)
        if len(bottleneck) == self.world * batch:
            bottleneck = bottleneck[own]
        else:  # all goals are of the whole batch
            bottleneck = bottleneck[self.rank : self.rank + 1]
            own = slice(self.rank, self.rank + 1)
        if self.options["reduction"] == "none":
            loss = loss[own]
        else:
            scale = float(self.world)
        where = f"seed {self.seed}, micro-batch {m}"
        self._close(out.loss.detach(), loss, f"loss, {where}")
        assert out.bottleneck.tolist() == bottleneck.tolist(), f"bottleneck, {where}"
        wanted = list(leaves.values())
        total = out.loss.sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True) if wanted else ()
        for name, grad in zip(leaves, found, strict=True):
            self._close(grad, expected.gradients[self.rank][name] * scale, f"gradient of {name}, {where}")
        return out

    def _part(self, batch: int, spoil: bool) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Return the values and masks of a part of the batch, [B] or 0-dim, representable in float32."""
        chance = self.chance
        part: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for name in self._columns():
            shape = () if name in self.of_batch else (batch,)
            value = (torch.randn(shape, generator=self.values) + 0.5).to(self.dtype)
            if isinstance(self.kinds[name], (Calibrated, Tracking)):
                value = value.abs() + 0.1
            mask = None
            if spoil:
                value = torch.where(torch.rand(shape, generator=self.values) < 0.5, torch.nan, value)
            if name in self.optional and chance.random() < 0.4:
                self._note("masked")
                mask = torch.rand(shape, generator=self.values) < 0.6
                value = torch.where(mask, value, torch.nan)
            part[name] = (value, mask)
            if name in self.optional and chance.random() < 0.15:
                self._note("absent")
                part[name] = (None, None)
        of_samples = [name for name in part if name not in self.of_batch]
        if self.world > 1 and of_samples and all(part[name][0] is None for name in of_samples):
            # A rank has B samples in every step; without any value it could not know how many.
            part[of_samples[0]] = torch.full((batch,), torch.nan, dtype=self.dtype), torch.zeros(batch) > 0
        return part

    def _nested(self, raw: dict[str, Any]) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name in self.order:
            named = self.chance.random() < 0.5  # on each rank, so that all make the same choices
            if name in self.members:
                nested[name] = {n.partition(".")[2]: raw[n] for n in self.members[name]}
            elif raw[name] is not None or named:
                nested[name] = raw[name]
        return nested

    # What happens between steps.

    def _resume(self) -> None:
        """Load the state into a new GoalSet, whose goals stand in another order."""
        self._note("resumed")
        state = self.goals.state_dict()
        old = self._columns(), list(self.order)
        self.chance.shuffle(self.order)
        self.goals = self._made()
        self.goals.load_state_dict(state)
        self.call = torch.compile(self.goals, backend="aot_eager") if self.compiled else self.goals
        model = self.model
        model.reorder([old[0].index(n) for n in self._columns()], [old[1].index(n) for n in self.order])

    def _look(self) -> None:
        """Call the GoalSet as validation does: nothing is learnt."""
        self._note("validated")
        part = [self._part(3, False) for _ in range(self.world)][self.rank]
        masks = {n: mask for n, (_, mask) in part.items() if mask is not None}
        raw = self._nested({n: v for n, (v, _) in part.items()})
        arguments: tuple[Any, ...] = (raw, masks) if masks else (raw,)
        if self.chance.random() < 0.5:
            self.goals.eval()
            self.goals(*arguments)
            self.goals.train()
        else:
            with torch.no_grad():
                self.goals(*arguments)

    # Comparisons.

    def _compare_state(self, record: dict[str, Any]) -> None:
        goals, model, where = self.goals, self.model, f"seed {self.seed}, step {self.model.steps}"
        assert goals.steps == model.steps, where
        assert float(goals.history["finite"][-1]) == record["finite"], where
        if record["finite"]:
            for part in ("share", "level", "deficit", "raw", "highest", "loss"):
                expected = torch.as_tensor(record[part], dtype=torch.float64)
                self._close(goals.history[part][-1], expected, f"{part}, {where}")
        self._close(goals.params[:, :3], torch.tensor([c.ramp[:3] for c in model.columns]), f"params, {where}")
        self._close(goals.log_nudge, torch.tensor([c.nudge for c in model.columns]), f"nudges, {where}")
        learning = [k for k, c in enumerate(model.columns) if c.policy]
        states = torch.tensor([c.state for c in model.columns])
        self._close(goals.policy_state[learning], states[learning], f"policies, {where}")
        if model.spill:
            self._close(goals.average, torch.tensor(model.average), f"averages, {where}")
            self._close(goals.multipliers, torch.tensor(model.multipliers), f"multipliers, {where}")
        if model.guard:
            self._close(goals.guard_share, torch.tensor(model.guarded), f"guard, {where}")

    def _close(self, ours: Tensor, expected: Tensor, what: str) -> None:
        near = CLOSE[self.dtype]
        torch.testing.assert_close(
            ours.double(), expected.double(), rtol=near, atol=near, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )

    def _note(self, name: str, count: bool = True) -> None:
        self.did[name] = self.did.get(name, 0) + count


def run(seeds: range, compiled: bool = False, group: Any = None, steps: int = 8) -> dict[str, int]:
    """Run a loop for each seed, and return how often each kind of event happened."""
    did: dict[str, int] = {}
    for seed in seeds:
        loop = Loop(seed, compiled, group)
        try:
            for _ in range(steps):
                loop.step()
        except TiedError:
            loop.did["tied"] = 1
        for name, count in loop.did.items():
            did[name] = did.get(name, 0) + count
    return did
