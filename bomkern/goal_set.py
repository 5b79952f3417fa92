"""`GoalSet`: the bottleneck rule for named goals, with what it needs to be safe, as one module."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _impl
from ._lazies import Lazy
from ._raw import Raw, RawValues
from ._route import bits, check_route, routes, rows_too
from ._settle import Settled
from ._table import table
from .constraints import MAX_GOALS, Constraint, ConstraintTable
from .history import Full, GoalOutput, History, Layout, Monitor
from .min_goal import REDUCTIONS
from .policies import MOST_NUDGE, SMALLEST, STATE, Anchored, Group, Policy, ShareGuard, Spill, policy_of

log = logging.getLogger("bomkern")


class GoalSet(Full):
    """Named goals, each with a constraint or a scale policy, trained by the bottleneck rule in one fused call.

    Per sample, with ``D_g`` the deficit of goal g (of a `Group`, the mean of its members'), the loss is ``max_g D_g``,
    or with a temperature ``mu > 0`` the smooth Tchebycheff scalarisation ``mu log sum_g exp(D_g / mu)`` (Lin et al.
    2024, "Smooth Tchebycheff scalarization for multi-objective optimization"), which gives a share of every sample to
    every goal, most to the worst. With ``spill`` goals are weighed by rank, see `Spill`: the worst gets most, and none
    can hold everything.

    Args:
        goals: constraints, policies or `Group` by name, in a mapping or as keywords; 1 to 64 columns in all.
        reduction: "mean" over samples, "sum", "none", or "min": the one worst sample of the batch.
        temperature: mu >= 0, in units of deficit.
        spill: a `Spill`, its ratio as a number, or 0 for none; then there is no temperature.
        guard: a `ShareGuard`, or None.
        route, materialize: whether backward passes by the graphs of goals without a share in the batch, and the names
            of goals that get zeros all the same; see `min_goal_loss`. With ``spill`` or a temperature every goal has a
            share of every sample.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves.

    Attributes:
        names: of the goals, in order.
        temperature: 0-dim buffer; write into it to anneal, ``goals.temperature.fill_(0.1)``.
        gather: None, or a function that makes the values of all ranks of one rank's, for the policies.
        params: [K, 4] buffer, the constraints' parameters (`ConstraintTable`).

    All state is in buffers: it moves with ``to``, is saved by ``state_dict``, and changes without a host sync. Policies
    and the monitor work in training mode only; ``eval()`` leaves everything as it is. Parameters stay float32 under
    ``half()`` and ``bfloat16()``; for float64 goals call ``double()``.

    Raises:
        ValueError: a name, count or value that cannot serve, named in the message.
        TypeError: something of the wrong type, named in the message.

    Example:
        >>> goals = GoalSet(recon=Anchored(0.0, 0.08), kl=Anchored(0.0, 120.0), realism=Anchored(0.5, 1.0))
        >>> out = goals({"recon": recon, "kl": kl, "realism": realism})  # [B] or 0-dim each
        >>> out.loss.backward()
        >>> print(goals)  # who got the gradient, and how high the water stands
    """

    params: Tensor
    temperature: Tensor
    policy_state: Tensor
    log_nudge: Tensor
    guard_share: Tensor
    average: Tensor
    multipliers: Tensor
    start: Tensor
    _belongs: Tensor
    _by_rank: Tensor | None

    def __init__(
        self,
        goals: Mapping[str, Constraint | Policy | Group] | None = None,
        /,
        *,
        reduction: str = "mean",
        temperature: float = 0.0,
        spill: float | Spill = 0.0,
        guard: ShareGuard | None = None,
        impl: str | None = None,
        route: str = "auto",
        materialize: Sequence[str] = (),
        **named: Constraint | Policy | Group,
    ) -> None:
        super().__init__()
        given = {**(goals or {}), **named}
        if goals is not None and not isinstance(goals, Mapping):
            raise TypeError(f"goals must be a mapping of names to constraints, got {type(goals).__name__}")
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < 1e30:
            raise ValueError(f"temperature must be a number, at least 0, got {temperature!r}")
        if guard is not None and not isinstance(guard, ShareGuard):
            raise TypeError(f"guard must be a ShareGuard or None, got {type(guard).__name__}")
        self.spill = spill if isinstance(spill, Spill) else None if spill == 0 else Spill(spill)
        if self.spill and temperature:
            raise ValueError(f"temperature must be 0 with spill, got temperature={temperature} and spill={spill}")
        self.reduction, self.guard, self.impl = reduction, guard, impl
        self.names = list(given)
        members: dict[str, list[str]] = {}  # of each group
        self.policies: dict[str, Policy] = {}  # by column
        for name, goal in given.items():
            inside = goal.members if isinstance(goal, Group) else {"": policy_of(name, goal)}
            if isinstance(goal, Group):
                members[name] = list(inside)
            self.policies |= {f"{name}.{member}" if member else name: policy for member, policy in inside.items()}
        columns = list(self.policies)
        check_route(route)
        materialize = [materialize] if isinstance(materialize, str) else materialize
        for name in materialize:
            if name not in self.names:
                raise ValueError(f"materialize must name goals ({', '.join(self.names)}), got {name!r}")
        if not 1 <= len(columns) <= MAX_GOALS:
            raise ValueError(f"a GoalSet must have 1 to {MAX_GOALS} goals, got {len(columns)}")
        self.owner = [self.names.index(column if column in given else column.rpartition(".")[0]) for column in columns]
        self.route, self._may = route, bits([self.names[g] for g in self.owner], materialize)
        self._raw = RawValues(self.names, members, columns)
        by_rank = self.spill.weights(len(self.names)) if self.spill else None
        most = 1.0 if by_rank is None else float(by_rank[0])
        self.layout = Layout(self.names, columns, self.owner, [repr(p) for p in self.policies.values()], most)
        self._waits = [column for column, policy in self.policies.items() if policy.waits]
        self._given: dict[str, dict[str, float]] = {c: {} for c in self._waits}  # anchors found so far
        self._alarmed: set[str] = set()
        self._only: int | None = None
        self._before: list[tuple[Tensor, Tensor]] = []  # what this step changes, and a copy from before it
        self.gather: Callable[[Tensor], Tensor] | None = None
        self._learns = ["params", "log_nudge", "guard_share"] * bool(guard) + ["average", "multipliers"] * bool(spill)
        self._until = max(math.inf if p.until is None else p.until for p in self.policies.values())
        self.monitor = Monitor(self.layout)

        table = ConstraintTable([policy.constraint for policy in self.policies.values()])
        self.curves = table.curves
        for name, buffer in (
            ("params", table.params),
            ("start", table.params.clone()),
            ("temperature", torch.tensor(float(temperature))),
            ("policy_state", torch.zeros(len(columns), STATE)),
            ("log_nudge", torch.zeros(len(columns))),
            ("guard_share", torch.full((len(self.names),), -1.0)),
            ("average", torch.zeros(len(self.names))),
            ("multipliers", torch.full((len(self.names),), 1 / len(self.names))),
        ):
            self.register_buffer(name, buffer)
        self.register_buffer("_belongs", torch.tensor(self.owner), persistent=False)
        self.register_buffer("_by_rank", by_rank, persistent=False)

    # One step.

    def forward(self, raw: Raw) -> GoalOutput:
        """The loss of a step and its record.

        Args:
            raw: a raw value for every goal, [B] or 0-dim, of any float dtype, or `lazy`; for a `Group` a mapping of its
                members'.

        Raises:
            KeyError: a goal is missing or unknown; the message names it.
            ValueError: a shape or device that cannot serve; the message names the goal.
        """
        tensors = self._raw.columns(raw)
        if self._waits and self._only is None:
            self._refuse_unanchored()
        self._before.clear()
        settled = None
        if any(type(value) is Lazy for value in tensors):
            settled = Settled(tensors, rows_too(self.route), self.route == "always")
            tensors = settled.tensors
        try:
            if self.training:
                self._learn(tensors)
            loss, bottleneck, record = self._serve(tensors)
            if self._only is not None:
                loss = tensors[self._only].to(record.dtype).mean()
            if settled is not None:
                loss = settled.attach(loss)
        except Exception:
            for now, before in self._before:
                now.copy_(before)
            self._before.clear()
            self._raw.explain(tensors, self.params.device)
            raise
        if self.training:
            self._keep(record)
        return GoalOutput(loss, bottleneck, record, self.layout, None if settled is None else settled.walked)

    def _serve(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One call of the op, in float64 where a raw value is."""
        held: dict[str, Any] = self._buffers  # each attribute of a module would cost as much as a small op
        numbers = [held["params"], held["temperature"], held["multipliers"] if self.spill else None]
        dtype = torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32
        if numbers[0].dtype is not dtype:
            numbers = [x if x is None else x.to(dtype) for x in numbers]
        params, temperature, multipliers = numbers
        serve = _impl.resolve("goal_set", params.device.type, self.impl)
        route = self._may if routes(self.route, params.device) else 0
        code = REDUCTIONS[self.reduction]
        return serve(tensors, params, self.curves, self.owner, temperature, code, multipliers, route=route)

    def _learn(self, tensors: list[Tensor]) -> None:
        """Keep a copy of what this step changes; ask the policies that still have something to say."""
        held: dict[str, Any] = self._buffers
        for name in self._learns:
            self._before.append((held[name], held[name].clone()))
        if not self._until or (step := self.monitor.steps) >= self._until:
            return
        for name in ("params", "policy_state"):
            self._before.append((held[name], held[name].clone()))
        for k, policy in enumerate(self.policies.values()):
            if policy.until is not None and step >= policy.until:
                continue
            raw = tensors[k].detach().float()
            found = policy.update(raw if self.gather is None else self.gather(raw), self.policy_state[k], step)
            if found is not None:
                self._place(k, *found)

    def _place(self, k: int, ideal: float | Tensor, scale: float | Tensor) -> None:
        """Give column k an ideal and a scale, on the device."""
        slope = torch.exp(-self.log_nudge[k]) / scale
        row = self.params[k]
        row[0] = ideal
        row[1] = slope
        row[2] = torch.where(row[2] < 0, -slope, slope)  # MinimizeHard's other side mirrors the first

    def _keep(self, record: Tensor) -> None:
        """Put the step into the history; let the guard and the spill look at it."""
        held: dict[str, Any] = self._buffers
        self._modules["monitor"].add(record)  # type: ignore[operator,union-attr]
        goals = len(self.names)
        if record.dtype is not held["average"].dtype:
            record = record.to(held["average"].dtype)
        if self.guard is not None:
            so_far = held["log_nudge"]
            nudge = self.guard.update(record[:goals], held["guard_share"])[held["_belongs"]]
            nudge = (so_far + nudge).clamp(-MOST_NUDGE, MOST_NUDGE) - so_far
            so_far += nudge
            held["params"][:, 1:3] *= torch.exp(-nudge)[:, None]
        if self.spill is not None:
            deficit = record[2 * goals : 3 * goals]
            if self.gather is not None:
                deficit = self.gather(deficit).view(-1, goals).mean(0)
            self.spill.update(deficit, held["average"], held["_by_rank"], held["multipliers"])

    def accept(self, ok: Tensor) -> None:
        """Take the last step back where ``ok``, a 0-dim bool on the device, is False; no host sync.

        For whoever rejects steps, as `torch.amp.GradScaler` does: what the policies learnt from such a step is
        forgotten, and the history counts it as not finite.
        """
        for now, before in self._before:
            now.copy_(torch.where(ok, now, before))
        self._before.clear()
        self.monitor.reject(ok)

    @property
    def history(self) -> History:
        """All training steps so far. Reading it waits for the device."""
        return self.monitor.history

    @property
    def steps(self) -> int:
        """Training steps so far."""
        return self.monitor.steps

    # Anchors.

    def _refuse_unanchored(self) -> None:
        column = self._waits[0]
        waits, given = self.policies[column].waits, self._given[column]
        name, source = next((name, source) for name, source in waits.items() if name not in given)
        what = f"{source}={{{column!r}: ...}}" if isinstance(source, str) else "a batch"
        raise RuntimeError(f"the {name} of {column} is not known yet: call GoalSet.anchor with {what} first")

    def anchor(self, batch: Any = None, **sources: Any) -> None:
        """Supply the anchors that `Anchored` policies wait for, before the first step.

        Args:
            batch: what functions given as ideal or nadir are called with.
            sources: ``floor=``, ``baseline=`` or ``probe=``: a mapping from goals (of a group's member
                "group.member") to numbers or 0-dim tensors; for ``probe`` what `bomkern.probe` returned.
        """
        for source in sources:
            if source not in ("floor", "baseline", "probe"):
                raise TypeError(f"anchors come from floor, baseline or probe, got {source!r}")
        for column in list(self._waits):
            policy, known = self.policies[column], self._given[column]
            for name, wanted in policy.waits.items():
                value: Any = None
                if callable(wanted):
                    value = wanted(batch) if batch is not None else None
                else:
                    found = sources.get(str(wanted), {})
                    value = (found.anchors(name) if hasattr(found, "anchors") else found).get(column)
                if value is not None:
                    known[name] = number = float(value.detach().float().mean() if isinstance(value, Tensor) else value)
                    if not math.isfinite(number):
                        raise ValueError(f"the {name} of {column} must be finite, got {number}")
            if len(known) == len(policy.waits):
                assert isinstance(policy, Anchored)
                both = {**policy.known, **known}
                ideal, nadir, k = both["ideal"], both["nadir"], self._column(column)
                if not ideal < nadir:
                    log.warning(
                        "the nadir of %s, %g, is not above its ideal, %g: it will hold the gradient",
                        column,
                        nadir,
                        ideal,
                    )
                self._place(k, ideal, max(nadir - ideal, SMALLEST))
                self.start[k] = self.params[k]
                self._waits.remove(column)

    @torch.no_grad()
    def remeasure(self, measured: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Move the anchors of goals with ``moving=True`` towards what was measured on held-out samples; no host sync.

        Args:
            measured: by column, raw values [n] or 0-dim of what is ideal and of what is no better than nothing.
                What is not finite moves nothing.
        """
        for column, pair in measured.items():
            policy = self.policies.get(column)
            if not isinstance(policy, Anchored) or not policy.moving:
                raise ValueError(f"{column} is not a goal with Anchored(moving=True)")
            k = list(self.policies).index(column)
            now = self.params[k]
            ideal, nadir = (torch.as_tensor(x, dtype=now.dtype, device=now.device).mean() for x in pair)
            scale = torch.exp(-self.log_nudge[k]) / now[1]
            old = torch.stack([now[0], now[0] + scale])
            new = torch.stack([ideal, nadir])
            low, high = old.lerp(torch.where(new.isfinite(), new, old), policy.weight).unbind()
            least = 0.05 / self.start[k, 1]  # anchors that meet would make the goal infinitely steep
            self._place(k, low, torch.maximum(high - low, least))

    def drift(self) -> dict[str, float]:
        """How far the anchors of each moving goal are from where they began, in units of its first scale.

        Reads from the device. The first drift of a goal beyond its policy's ``alarm`` is also logged as a warning.
        """
        found = {}
        for k, (column, policy) in enumerate(self.policies.items()):
            if isinstance(policy, Anchored) and policy.moving:
                (low, slope), (low0, slope0) = self.params[k, :2].tolist(), self.start[k, :2].tolist()
                found[column] = max(abs(low - low0), abs(low + 1 / slope - low0 - 1 / slope0)) * slope0
                if found[column] > policy.alarm and column not in self._alarmed:
                    self._alarmed.add(column)
                    log.warning("the anchors of %s have drifted %.2f of its scale", column, found[column])
        return found

    # Other ways to set and see it.

    def __setitem__(self, column: str, constraint: Constraint) -> None:
        """Give a goal another constraint of the same curve; no host sync."""
        k = self._column(column)
        if not isinstance(constraint, Constraint):
            raise TypeError(f"{column} must be a constraint, got {type(constraint).__name__}")
        if constraint.curve != self.curves[k]:
            raise ValueError(f"{column} cannot become {constraint!r}: its curve is fixed; make a new GoalSet")
        self.params[k].copy_(torch.tensor(constraint.ramp, dtype=self.params.dtype), non_blocking=True)
        self.log_nudge[k] = 0  # which is part of the scale

    def anchors(self) -> dict[str, tuple[float, float]]:
        """(ideal, scale) of every column, read from the device."""
        rows = self.params.tolist()
        return {
            column: (row[0], 1 / row[1] if row[1] else 0.0) for column, row in zip(self.policies, rows, strict=True)
        }

    def _column(self, name: str) -> int:
        columns = list(self.policies)
        if name not in columns:
            raise KeyError(f"no goal is called {name} (there are {', '.join(columns)})")
        return columns.index(name)

    @contextmanager
    def only(self, goal: str) -> Iterator[None]:
        """Train on one goal alone: inside, the loss is the mean of its raw value, whatever its scale."""
        self._only = self._column(goal)
        try:
            yield
        finally:
            self._only = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"waits": list(self._waits), "given": {column: dict(self._given[column]) for column in self._waits}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._waits = [column for column, policy in self.policies.items() if policy.waits and column in state["waits"]]
        self._given = {column: dict(state.get("given", {}).get(column, {})) for column in self._waits}

    def __repr__(self) -> str:
        return table(self)
