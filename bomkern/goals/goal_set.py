"""`GoalSet`: the bottleneck rule for named goals, with what it needs to be safe, as one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..common.checks import MAX_GOALS
from ..common.host_copy import capturing
from ..common.process_group import ranks_of
from ..common.torch_internals import buffers_of, children_of, under_transform
from ..constraints import Constraint, ConstraintTable
from ..dispatch import select
from ..dispatch.routing import bits, check_route, routes, rows_too
from ..lazy_goals.evaluate import Lazy
from ..lazy_goals.owned_rows import Settled
from ..ops.min_goal import REDUCTIONS
from .anchors import Columns
from .history import GoalOutput, History
from .monitor import Monitor
from .policies import MOST_NUDGE, STATE, Policy, policy_of
from .raw_values import Raw, RawValues
from .record import Layout, share_record
from .rules import Group, ShareGuard, Spill
from .table import table

SPILL = ("average", "multipliers", "_average_before", "_multipliers_before")  # the buffers of the rule by rank
NO_END = 2**63 - 1  # the step at which a policy ends that never does


class GoalSet(Columns):
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
        process_group: the ranks that share the batch, each with B samples of it, the same number, and a GoalSet of its
            own: loss, record, policies, spill and guard are then those of one process with the whole batch, and so are
            the gradients that DistributedDataParallel averages; bottlenecks, and the loss of ``reduction="none"``, are
            of a rank's own samples. One gather of the record a step, and one of the raw values while a policy learns
            (compiled or captured: in every step). The group is not copied with the module, nor saved.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves.

    Attributes:
        names: of the goals, in order.
        temperature: 0-dim buffer; write into it to anneal, ``goals.temperature.fill_(0.1)``.
        params: [K, 4] buffer, the constraints' parameters (`ConstraintTable`).

    All state is in buffers: it moves with ``to``, is saved by ``state_dict``, and changes without a host sync. The
    device counts the steps, so a replayed CUDA graph goes on as eager calls would. Policies and the monitor work in
    training mode only; ``eval()`` leaves everything as it is. Parameters stay float32 under ``half()`` and
    ``bfloat16()``; for float64 goals call ``double()``.

    Raises:
        ValueError: a name, count or value that cannot serve, named in the message.
        TypeError: something of the wrong type, named in the message.

    Example:
        >>> goals = GoalSet(recon=Anchored(0.0, 0.08), kl=Anchored(0.0, 120.0), realism=Anchored(0.5, 1.0))
        >>> out = goals({"recon": recon, "kl": kl, "realism": realism})  # [B] or 0-dim each
        >>> out.loss.backward()
        >>> print(goals)  # who got the gradient, and how high the water stands
    """

    temperature: Tensor
    policy_state: Tensor
    guard_share: Tensor
    average: Tensor
    multipliers: Tensor
    _average_before: Tensor
    _multipliers_before: Tensor
    _belongs: Tensor
    _ends: Tensor
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
        process_group: dist.ProcessGroup | None = None,
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
        self._ranks = ranks_of(process_group)
        if self._ranks.size > 1 and route == "always":
            raise ValueError(
                "route must be 'auto' or 'never' with a process_group, got 'always': a rank whose backward leaves out "
                "what another's walks keeps it waiting"
            )
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
        self._await_anchors()
        self._only: int | None = None
        self._before: list[tuple[Tensor, Tensor]] = []  # what this step changes, and a copy from before it
        self._learns = ["params", "log_nudge", "guard_share"] * bool(guard)
        ends = [NO_END if p.until is None else p.until for p in self.policies.values()]
        self._until = max(ends)
        self.monitor = Monitor(self.layout, impl)

        table = ConstraintTable([policy.constraint for policy in self.policies.values()])
        self.curves, single = table.curves, table.params.dtype  # whatever the default dtype is
        for name, buffer in (
            ("params", table.params),
            ("start", table.params.clone()),
            ("temperature", torch.tensor(float(temperature), dtype=single)),
            ("policy_state", torch.zeros(len(columns), STATE, dtype=single)),
            ("log_nudge", torch.zeros(len(columns), dtype=single)),
            ("guard_share", torch.full((len(self.names),), -1.0, dtype=single)),
            ("average", torch.zeros(len(self.names), dtype=single)),
            ("multipliers", torch.full((len(self.names),), 1 / len(self.names), dtype=single)),
        ):
            self.register_buffer(name, buffer)
        self.register_buffer("_belongs", torch.tensor(self.owner), persistent=False)
        self.register_buffer("_ends", torch.tensor(ends), persistent=False)
        self.register_buffer("_by_rank", by_rank, persistent=False)
        for name in ("average", "multipliers"):
            self.register_buffer(f"_{name}_before", self.get_buffer(name).clone(), persistent=False)

    # One step.

    if TYPE_CHECKING:  # what nn.Module calls Any

        def __call__(self, raw: Raw) -> GoalOutput: ...

    def forward(self, raw: Raw) -> GoalOutput:
        """The loss of a step and its record.

        Args:
            raw: a raw value for every goal, [B] or 0-dim, of any float dtype, or `lazy`; for a `Group` a mapping of its
                members'.

        Raises:
            KeyError: a goal is missing or unknown; the message names it.
            ValueError: a shape or device that cannot serve; the message names the goal.
        """
        tensors: list[Any] = self._raw.columns(raw)
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
            ranks = self._ranks
            if ranks.size > 1:
                ranks.check_shape("raw", bottleneck)
                code, sizes = REDUCTIONS[self.reduction], (len(self.names), len(self.policies))
                loss, record = share_record(loss, record, *sizes, code, ranks)
            if self._only is not None:
                own = tensors[self._only].to(record.dtype).mean()
                loss = ranks.shared(own, ranks.gather(own.detach()).mean(), 1.0) if ranks.size > 1 else own
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
        held = buffers_of(self)
        params, temperature, multipliers = (
            held["params"],
            held["temperature"],
            held["multipliers"] if self.spill else None,
        )
        dtype = torch.float32
        for t in tensors:
            if t.dtype is torch.float64:
                dtype = t.dtype
        if params.dtype is not dtype:
            params, temperature = params.to(dtype), temperature.to(dtype)
            multipliers = None if multipliers is None else multipliers.to(dtype)
        device = params.device
        serve: Callable[..., tuple[Tensor, Tensor, Tensor]] = select.resolve("goal_set", device.type, self.impl)
        route = self._may if routes(self.route, device) else 0
        code = REDUCTIONS[self.reduction]
        return serve(tensors, params, self.curves, self.owner, temperature, code, multipliers, route=route)

    def _learning(self) -> dict[int, Policy]:
        """The policies that may have something to say in this step, by column.

        A graph, compiled or captured, runs again at steps that the host does not know: it holds all that ever have.
        """
        if not self._until:
            return {}
        fixed = torch.compiler.is_compiling() or capturing(self.params.device)
        step = 0 if fixed else self.steps
        if step >= self._until:
            return {}
        return {k: p for k, p in enumerate(self.policies.values()) if p.until is None or step < p.until}

    def _learn(self, tensors: list[Tensor]) -> None:
        """Keep a copy of what this step changes; ask the policies."""
        learning = self._learning()
        if under_transform() and not torch.compiler.is_compiling() and (self.guard or learning):
            raise RuntimeError(
                "a GoalSet with a ShareGuard, or policies that follow raw values, cannot learn inside torch.func: "
                "call eval() first"
            )
        held = buffers_of(self)
        for name in self._learns:
            self._before.append((held[name], held[name].clone()))
        if not learning:
            return
        taught = [(held[name], held[name].clone()) for name in ("params", "policy_state")]
        self._before += taught
        raws = [tensors[k].detach().float() for k in learning]
        if self._ranks.size > 1:
            gathered = self._ranks.gather(torch.cat([raw.reshape(-1) for raw in raws]))
            raws = [part.flatten() for part in gathered.split([raw.numel() for raw in raws], 1)]
        step = self.monitor.place  # as the device counts them
        for (k, policy), raw in zip(learning.items(), raws, strict=True):
            found = policy.update(raw, held["policy_state"][k], step[0])
            if found is not None:
                self._place(k, *found)
        if any(policy.until is not None for policy in learning.values()):
            goes_on = (step < held["_ends"])[:, None]
            for now, before in taught:
                now.copy_(torch.where(goes_on, now, before))

    def _keep(self, record: Tensor) -> None:
        """Put the step into the history; let the guard and the spill look at it."""
        held = buffers_of(self)
        monitor = children_of(self)["monitor"]
        goals = len(self.names)
        if self.spill is None:
            monitor.add(record)
        else:
            deficit = record[2 * goals : 3 * goals]
            monitor.add(record, deficit, held["_by_rank"], self.spill.rate, [held[name] for name in SPILL])
            self._before += (
                (held["average"], held["_average_before"]),
                (held["multipliers"], held["_multipliers_before"]),
            )
        if self.guard is not None:
            so_far = held["log_nudge"]
            nudge = self.guard.update(record[:goals].to(so_far.dtype), held["guard_share"])[held["_belongs"]]
            nudge = (so_far + nudge).clamp(-MOST_NUDGE, MOST_NUDGE) - so_far
            so_far += nudge
            held["params"][:, 1:3] *= torch.exp(-nudge)[:, None]

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

    @contextmanager
    def only(self, goal: str) -> Iterator[None]:
        """Train on one goal alone: inside, the loss is the mean of its raw value, whatever its scale."""
        self._only = self._column(goal)
        try:
            yield
        finally:
            self._only = None

    def __repr__(self) -> str:
        return table(self)
