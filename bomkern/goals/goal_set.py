"""`GoalSet`: the bottleneck rule for named goals as one module, with its anchors, rules and record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..common.blame import TOO_MANY
from ..common.checks import MAX_GOALS, as_flag
from ..common.process_group import ranks_of
from ..common.torch_internals import buffers_of, children_of
from ..constraints import Constraint
from ..dispatch.routing import bits
from .anchor_check import AnchorCheck, check_anchors
from .anchors import Anchors
from .branches import Branches
from .buffers import GoalBuffers
from .constraint_info import describe
from .from_config import goals_of
from .history import GoalOutput, History
from .micro_batches import MicroBatches, TakesMicroBatches
from .monitor import Monitor
from .options import check_options
from .policies import Policy, policy_of
from .presence import Masks, Presence, averages
from .raw_values import Raw, RawValues
from .record import Layout
from .resume import Resume
from .row_budget import RowBudget
from .rule_state import RuleState
from .rules import Group, ShareGuard, Spill
from .step import take_step
from .table import table
from .watched import check_watched, fit_state, split_options


class GoalSet(GoalBuffers, TakesMicroBatches):
    """Named goals, each with a constraint or a scale policy, trained by the bottleneck rule in one fused call.

    The loss of a sample is ``max_g D_g``, where ``D_g`` is the deficit of goal g; that of a `Group` is the mean of its
    members' deficits. With a temperature ``mu > 0`` it is the smooth Tchebycheff scalarisation
    ``mu log sum_g exp(D_g / mu)`` (Lin et al. 2024, "Smooth Tchebycheff scalarization for multi-objective
    optimization"), which gives every goal a share of every sample, and the worst goal most. With ``spill`` goals are
    weighted by their order, see `Spill`: the worst gets most, and none can hold everything.

    Args:
        goals: constraints, policies or `Group` by name, in a mapping or as keywords; 1 to 64 columns in all.
        reduction: "mean" (over samples), "sum", "none" ([B]), or "min": the single worst sample of the batch.
        temperature: mu >= 0, in units of deficit.
        spill: a `Spill`, its ratio as a number, "auto" for `Spill("auto")`, or 0 for none. The temperature must be 0
            with a spill. With a ``budget`` each goal takes a part of the samples of a training step.
        guard: a `ShareGuard`, or None.
        route, materialize: whether backward skips the graphs of goals without a share in the batch, and the names of
            goals that always get a gradient, of zeros if they have no share; see `min_goal_loss`. With ``spill`` or a
            temperature every goal has a share of every sample.
        optional: names of goals, or "group.member", that may be missing from the raw values of a step. With a
            ``process_group`` only these may be absent or masked; each step then gathers counts too.
        process_group: the ranks that share the batch. Each has the same number B of samples and its own GoalSet. Loss,
            record, policies, spill and guard are then those of one process with the whole batch, and so are the
            gradients that DistributedDataParallel averages. Bottlenecks, and the loss of ``reduction="none"``, are
            those of a rank's own samples. Each step gathers the record, and the raw values while a policy learns
            (compiled or captured: in every step). The group is neither copied with the module nor saved.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the goals' device.
        resume: the constraint that holds if that of the code is not the one in a state that is loaded, "code" or
            "checkpoint". A warning names both.
        renamed: maps names of goals to the ones that they have in a state that is loaded.
        monitor: goals that are only watched, such as an accuracy: constraints, policies or `Group` by name. Their raw
            values stand beside the others', with or without a graph. They have levels and deficits in tables and logs,
            and in ``goals.watched.history`` and ``out.watched``; they are no bottleneck and get no share.

    Attributes:
        watched: the goals of ``monitor``, a GoalSet that no loss is taken of, or None.
        names: names of the goals, in order.
        temperature: 0-dim buffer; write into it to anneal, ``goals.temperature.fill_(0.1)``.
        params: [K, 4] buffer, the constraints' parameters (`ConstraintTable`).
        alone: inside `only` the index of the column that is trained on, else None.
        anchoring, rules, monitor, layout: the parts, see their classes; ``anchoring.waiting`` names the columns whose
            anchors are not known yet.

    All state is in buffers: it moves with ``to``, and changes without a host sync. A ``state_dict`` holds tensors only
    and is loaded by the names of the goals. New goals start fresh, and a warning names them and those that are gone.
    The device counts the steps, so a replayed CUDA graph continues as eager calls would. Policies and the monitor work
    in training mode only, and only where gradient is enabled. In ``eval()`` mode, and under ``torch.no_grad()`` or
    ``torch.inference_mode()``, a call changes no state. Parameters stay float32 under ``half()`` and ``bfloat16()``;
    for float64 goals call ``double()``.

    Raises:
        ValueError: a name, count or value is invalid; the message names it.
        TypeError: an argument has the wrong type; the message names it.

    Example:
        >>> goals = GoalSet(recon=Anchored(0.0, 0.08), kl=Anchored(0.0, 120.0), realism=Anchored(0.5, 1.0))
        >>> out = goals({"recon": recon, "kl": kl, "realism": realism})  # [B] or 0-dim each
        >>> out.loss.backward()
        >>> print(goals)  # each goal's share of the gradient, and its level
    """

    def __init__(
        self,
        goals: Mapping[str, Constraint | Policy | Group] | None = None,
        /,
        *,
        reduction: str = "mean",
        temperature: float = 0.0,
        spill: float | str | Spill = 0.0,
        guard: ShareGuard | None = None,
        impl: str | None = None,
        route: str = "auto",
        materialize: Sequence[str] = (),
        optional: Sequence[str] = (),
        process_group: dist.ProcessGroup | None = None,
        resume: str = "code",
        renamed: Mapping[str, str] | None = None,
        monitor: Mapping[str, Constraint | Policy | Group] | None = None,
        **named: Constraint | Policy | Group,
    ) -> None:
        super().__init__()
        ranks = ranks_of(process_group)
        check_options(goals, reduction, temperature, guard, route, ranks)
        self.reduction, self.guard, self.impl, self.route, self._ranks = reduction, guard, impl, route, ranks
        self.spill = spill if isinstance(spill, Spill) else None if spill == 0 else Spill(spill)
        if self.spill and temperature:
            raise ValueError(f"temperature must be 0 with spill, got temperature={temperature} and spill={spill}")
        own, theirs = split_options(monitor, optional, renamed, several=ranks.size > 1)
        self._lay_out({**(goals or {}), **named}, materialize, own[0])
        rule = {"temperature": float(temperature), "spill": self.spill.by_order if self.spill else 0.0}
        self._resume = Resume(resume, own[1], self.layout, self.policies, rule)
        self._register()
        self._watching = False  # whether this is the ``watched`` of another GoalSet
        self.watched: GoalSet | None = None
        if monitor is not None:
            check_watched(monitor, self.names)
            shared: dict[str, Any] = {"impl": impl, "process_group": process_group, "resume": resume}
            self.watched = GoalSet(monitor, route="never", optional=theirs[0], renamed=theirs[1], **shared)
            self.watched._watching = True
        self.register_load_state_dict_pre_hook(fit_state)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> GoalSet:
        """Make a GoalSet from plain values, as a YAML or JSON file holds them.

        Args:
            config: by name of the goal, a mapping with its ``type`` and the arguments of that constraint or policy, or
                ``{"members": {...}}`` for a `Group`. Constraints and policies themselves are taken as they are.
            options: of the GoalSet.

        A type is the name of a constraint or policy, in any case and with underscores: "MINIMIZE_SOFT" or "MINIMIZE",
        "MINIMIZE_HARD", "MAXIMIZE", "UPPER", "LOWER", "BOX", "BOX_ASYMMETRIC", "ANCHORED", "CALIBRATED", "TRACKING". A
        member of an enumeration counts by its name. The ``scale`` "auto" of MINIMIZE_SOFT is `Calibrated`.

        Raises:
            TypeError, ValueError: a goal's settings are invalid; the message names the goal and the key.

        Example:
            >>> goals = GoalSet.from_config({
            ...     "recon": {"type": "MINIMIZE_SOFT", "scale": "auto"},
            ...     "realism": {"type": "ANCHORED", "ideal": 0.5, "nadir": 1.0},
            ... }, spill="auto")
        """
        return cls(goals_of(config), **options)

    def _lay_out(
        self,
        goals: Mapping[str, Constraint | Policy | Group],
        materialize: str | Sequence[str],
        optional: str | Sequence[str],
    ) -> None:
        """Collect the columns of the goals and their policies, and make the parts of this object."""
        self.names = list(goals)
        self.policies: dict[str, Policy] = {}  # by column
        self.owner: list[int] = []  # index of the goal of each column
        members: dict[str, list[str]] = {}  # by group
        for index, (name, goal) in enumerate(goals.items()):
            if isinstance(goal, Group):
                members[name] = list(goal.members)
                own = {f"{name}.{member}": policy for member, policy in goal.members.items()}
            else:
                own = {name: policy_of(name, goal)}
            self.policies |= own
            self.owner += [index] * len(own)
        columns = list(self.policies)
        if not 1 <= len(columns) <= MAX_GOALS:
            fix = f": each member of a Group counts; {TOO_MANY}" if columns else ""
            raise ValueError(f"a GoalSet must have 1 to {MAX_GOALS} goals, got {len(columns)}{fix}")
        kept = [materialize] if isinstance(materialize, str) else materialize
        for name in kept:
            if name not in self.names:
                raise ValueError(f"materialize must name goals ({', '.join(self.names)}), got {name!r}")
        self._may = bits([self.names[g] for g in self.owner], kept)
        described = [describe(policy) for policy in self.policies.values()]
        self.curves = [info.curve for info in described]
        order = self.spill.weights(len(self.names)).tolist() if self.spill else [1.0, 0.0]
        self.layout = Layout(self.names, columns, self.owner, described, most=order[0], least=order[-1])
        averaged = averages(self.reduction, self.spill)
        self.presence = Presence(self.names, members, columns, self.owner, optional, self._ranks, averaged)
        self._raw = RawValues(self.names, members, columns, self.presence.optional)
        self.anchoring = Anchors(self.policies, self.curves, self._ranks)
        self.rules = RuleState(self.policies, self.guard, self.spill, self.layout.at, self._ranks)
        self.monitor = Monitor(self.layout, self.impl)
        self.micro = MicroBatches(self.rules, self.layout, self.reduction)
        self.row_budget: RowBudget | None = None
        if self.spill and self.spill.budget is not None:
            self.row_budget = RowBudget(self.spill, self.owner, self.presence, self.reduction, self._ranks)
        self.alone: int | None = None
        self.branches: list[Branches] | None = None  # of the steps in which `StepGuard` searches for a goal

    # One step.

    if TYPE_CHECKING:  # what nn.Module calls Any

        def __call__(self, raw: Raw, mask: Masks | None = None) -> GoalOutput: ...

    def forward(self, raw: Raw, mask: Masks | None = None) -> GoalOutput:
        """Compute the loss of a step and its record.

        Args:
            raw: a raw value for every goal, [B] or 0-dim, of any float dtype, or `lazy`; for a `Group` a mapping of its
                members' raw values. None, or an `optional` goal that is missing: no sample of this step has that goal.
            mask: for some goals, by name, a bool tensor [B] or 0-dim: which samples have the goal. For a `Group` one
                for all members or a mapping; "group.member" is a name too. Raw values under a False are not read.

        What is absent in a sample is never its bottleneck, gets no gradient, and counts in no share, level, mean or
        scale. A group's deficit is the mean of the members that are there. A sample without a goal has loss 0 and
        bottleneck -1, and counts in no mean. With ``spill`` each goal's deficit is its mean over the samples that have
        it, and the weights of goals that no sample has go to the others; goals may then have different lengths.

        Returns:
            The output of the step. The level, deficit and raw value of a goal that no sample has are NaN, its share 0.
            Of a micro-batch (`accumulate`), the loss is its own, and the record covers the step so far.

        Raises:
            KeyError: a goal is missing or unknown; the message names it.
            TypeError: a raw value is no float tensor, or a mask no bool tensor; the message names the goal.
            ValueError: a raw value or mask has an invalid shape or device, or is absent on one of several ranks without
                being `optional`; the message names the goal.
        """
        return take_step(self, raw, mask)

    def accept(self, ok: Tensor | bool) -> None:
        """Take back the last step if ``ok`` is False; no host sync.

        Call it in loops that reject steps. The policies forget what they learnt in a rejected step, and the history
        counts it as not finite. A step of several micro-batches is taken back whole; if it is still open
        (`accumulate`), it ends here. `StepGuard` calls it, and knows what a `torch.amp.GradScaler` has rejected
        (``scaler=``). Without a guard, compare ``scaler.get_scale()`` before and after ``scaler.update()``, which
        waits for the device: the scale shrinks if a step was rejected.

        Args:
            ok: whether the step was taken, a 0-dim bool tensor on the device or a bool.

        Raises:
            TypeError: ``ok`` is anything else.
        """
        taken = as_flag("ok", ok, self.params.device)
        if self.part is not None:
            self.end_step()
        self.rules.accept(taken)
        children_of(self)["monitor"].reject(taken)
        if self.watched is not None:
            self.watched.accept(taken)

    @property
    def history(self) -> History:
        """The history of all training steps so far. Reading it waits for the device."""
        return self.monitor.history

    @property
    def steps(self) -> int:
        """The number of training steps so far."""
        return self.monitor.steps

    @contextmanager
    def only(self, goal: str) -> Iterator[None]:
        """Train on one goal alone. Inside the context the loss is the mean of its raw value, whatever its scale.

        For a goal of which smaller raw values are worse, it is the negative of that mean.
        """
        self.alone = self.anchoring.index(goal)
        try:
            yield
        finally:
            self.alone = None

    # Anchors.

    def check(self, raw: Raw, mask: Masks | None = None) -> AnchorCheck:
        """Say which anchors look wrong for a batch, and what to use. Call it before the first step.

        A finding is a goal whose anchors are not known yet, whose raw values are not finite, that is better than its
        ideal, that is far beyond its nadir, or that is far from it: a deficit below 0.1, which only a goal that gets
        worse at first, such as a KL, may have. Deficits of two goals must not differ by more than 100 times; the goal
        whose deficit is further from 1 is named. A goal that starts at its ideal, and a policy that measures scales by
        itself, are not judged.

        The call changes no state: no step is counted, nothing is recorded, and random generators stay as they are. It
        evaluates `lazy` goals for all samples without a graph, and waits for the device. With a ``process_group`` all
        ranks must call it, and get the same answer.

        Args:
            raw, mask: those of a step, see `forward`.

        Returns:
            The findings, which print as a line each. It is empty if every anchor fits.

        Raises:
            KeyError, TypeError, ValueError: those of a step.

        Example:
            >>> print(goals.check({"recon": recon, "kl": kl, "realism": realism}))
            every anchor fits
        """
        return check_anchors(self, raw, mask)

    def anchor(self, batch: Any = None, **sources: Any) -> None:
        """Supply the anchors that `Anchored` policies wait for, before the first step.

        Args:
            batch: the argument of the functions that were given as ideal or nadir.
            sources: ``floor=``, ``baseline=`` or ``probe=``: a mapping from goals ("group.member" for the member of a
                group) to numbers or 0-dim tensors; for ``probe`` also the result of `bomkern.probe`.
        """
        self.anchoring.supply(buffers_of(self), batch, sources)
        if self.watched is not None:
            self.watched.anchor(batch, **sources)

    @torch.no_grad()
    def remeasure(self, measured: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Move the anchors of goals with ``moving=True`` towards values measured on held-out samples; no host sync.

        Args:
            measured: by column, the raw values of an ideal answer and those of a trivial one, [n] or 0-dim each. A
                value that is not finite moves nothing.
        """
        self.anchoring.move(buffers_of(self), measured)

    def drift(self) -> dict[str, float]:
        """Return the distance of each moving goal's anchors from their first values, in units of its first scale.

        The call waits for the device. The first drift of a goal beyond its policy's ``alarm`` is logged as a warning.
        """
        return self.anchoring.drift(buffers_of(self))

    def anchors(self) -> dict[str, tuple[float, float]]:
        """Return (ideal, scale) of every column. The call waits for the device.

        The scale is positive. The nadir is ``ideal + scale``, or ``ideal - scale`` for a goal to maximize.
        """
        return self.anchoring.read(buffers_of(self))

    def __setitem__(self, column: str, constraint: Constraint) -> None:
        """Replace the constraint of a goal by another one of the same curve; no host sync."""
        self.anchoring.replace(buffers_of(self), column, constraint)

    def __repr__(self) -> str:
        return table(self)
