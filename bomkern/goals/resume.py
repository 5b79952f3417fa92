"""Load the state of a `bomkern.GoalSet` by the names of its goals, and report what differs from the code."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..constraints import text_of
from .constraint_info import ConstraintInfo
from .policies import Policy, _shown
from .record import Layout
from .saved import names_of, pack, picked, picked_records, unpack, unpack_history

if TYPE_CHECKING:
    from .buffers import GoalBuffers

log = logging.getLogger("bomkern")
CHOICES = CODE, CHECKPOINT = "code", "checkpoint"
OF_COLUMNS = ("params", "start", "policy_state", "log_nudge")
OF_GOALS = ("guard_share", "average", "multipliers")
EXTRA, MONITOR = "_extra_state", "monitor._extra_state"


class Saved(NamedTuple):
    """What a checkpoint says about a GoalSet.

    Attributes:
        layout: names of its goals and columns.
        constraints: each column's constraint or policy, or None in a checkpoint of an older bomkern, without names.
        values: everything else.
    """

    layout: Layout
    constraints: list[dict[str, Any]] | None
    values: dict[str, Any]


class Resume:
    """How a `bomkern.GoalSet` loads a state whose goals or constraints may differ from its own.

    Args:
        which: "code" or "checkpoint", the constraint that holds where they differ.
        renamed: the name in the checkpoint of goals or columns that now have another one.
        layout: names of the goals and columns.
        policies: by column.
        rule: the rule by name, as plain values: ``temperature`` and ``spill`` (`Spill.by_order`, or 0).
    """

    def __init__(
        self,
        which: str,
        renamed: Mapping[str, str] | None,
        layout: Layout,
        policies: Mapping[str, Policy],
        rule: Mapping[str, Any],
    ) -> None:
        if which not in CHOICES:
            raise ValueError(f"resume must be one of {', '.join(map(repr, CHOICES))}, got {which!r}")
        self.which, self.layout, self.rule, self.renamed = which, layout, dict(rule), dict(renamed or {})
        for name in self.renamed:
            if name not in (*layout.goals, *layout.columns):
                raise ValueError(
                    f"renamed must map names of goals ({', '.join(layout.goals)}) to those in the checkpoint, "
                    f"got {name!r}"
                )
        pairs = zip(layout.constraints, policies.values(), strict=True)
        self.constraints = [_plain(info, policy) for info, policy in pairs]

    def pack(self, changing: Mapping[str, Any]) -> Tensor:
        """Return the state beside the buffers as one tensor."""
        fixed = {**names_of(self.layout), "constraints": self.constraints, "rule": self.rule}
        spare = 256 + sum(3 * len(name) + 192 for name in self.layout.columns)
        return pack(fixed, changing, spare)

    def fit(self, goals: GoalBuffers, state: MutableMapping[str, Any], prefix: str, errors: list[str]) -> bool:
        """Bring a state, in place, into the order of the goals, and log what the checkpoint and the code do not share.

        Args:
            goals: the GoalSet that is about to load the state.
            state: tensors by name, with ``prefix``.
            errors: receives a message if the state cannot be loaded.

        Returns:
            Whether the state can be loaded. If not, it no longer holds anything that the GoalSet's parts would load.
        """
        mine = [name for name in (*OF_COLUMNS, *OF_GOALS, "temperature", EXTRA, MONITOR) if prefix + name in state]
        try:
            saved = self._read(state, prefix)
        except ValueError as why:
            for name in mine:
                state.pop(prefix + name)
            state[prefix + MONITOR] = goals.monitor.get_extra_state()
            errors.append(f"{prefix.rstrip('.') or 'GoalSet'}: {why}")
            return False
        if saved is None:
            return True
        at_goals, at_columns = self._match(saved.layout)
        same_goals = at_goals == list(range(len(saved.layout.goals))) and self.layout.owner == saved.layout.owner
        same_columns = at_columns == list(range(len(saved.layout.columns)))
        new = [name for name, at in zip(self.layout.columns, at_columns, strict=True) if at is None]
        gone = [name for k, name in enumerate(saved.layout.columns) if k not in at_columns]
        self._report_names(new, gone)
        kept = self._kept(goals, saved, state, prefix, at_columns)
        params = goals.anchoring.first_params()
        first: dict[str, Tensor | float] = {"params": params, "start": params, "policy_state": 0.0, "log_nudge": 0.0}
        for name in OF_COLUMNS:
            value = state.get(prefix + name)
            if value is not None and not (same_columns and kept == at_columns):
                state[prefix + name] = picked(value, kept, first[name])
        if not (same_goals and same_columns):
            self._fit_goals(state, prefix, at_goals, saved)
        same_set = {*at_goals} == {*range(len(saved.layout.goals))}
        if saved.values.get("rule", self.rule)["spill"] != self.rule["spill"] or not same_set:
            self._weigh(goals, state, prefix, saved)
        self._fit_temperature(state, prefix, saved)
        if prefix + MONITOR in state and not (same_goals and same_columns):
            history = unpack_history(state[prefix + MONITOR])
            for name in ("rows", "open", "fresh"):
                history[name] = picked_records(history[name], saved.layout, at_goals, at_columns)
            for name in ("counts", "open_counts", "fresh_counts"):
                history[name] = picked(history[name].t(), at_columns, torch.nan).t()
            state[prefix + MONITOR] = history
        if prefix + EXTRA in state:
            state[prefix + EXTRA] = self._extra(saved, kept)
        return True

    def _read(self, state: Mapping[str, Any], prefix: str) -> Saved | None:
        """Read the names of a checkpoint; None if it holds nothing of a GoalSet, ValueError if it cannot be loaded."""
        extra = state.get(prefix + EXTRA)
        if isinstance(extra, Tensor) and not extra.is_meta:
            values, _ = unpack(extra)
            return Saved(Layout(values["goals"], values["columns"], values["owner"], []), values["constraints"], values)
        held = [state[prefix + name] for name in OF_COLUMNS if prefix + name in state]
        by_goal = [state[prefix + name] for name in OF_GOALS if prefix + name in state]
        if not held and not by_goal and extra is None:
            return None
        counts = (
            {len(x) for x in held} or {len(self.layout.columns)},
            {len(x) for x in by_goal} or {len(self.layout.goals)},
        )
        if counts != ({len(self.layout.columns)}, {len(self.layout.goals)}):
            columns, goals = (" or ".join(map(str, sorted(count))) for count in counts)
            raise ValueError(
                f"the checkpoint holds no names of goals, as an older bomkern wrote it: it has {goals} goals in "
                f"{columns} columns, and this GoalSet has {len(self.layout.goals)} in {len(self.layout.columns)}. "
                "Load it into a GoalSet with the goals that it had, in their order, and save that one's state_dict"
            )
        return Saved(self.layout, None, dict(extra) if isinstance(extra, Mapping) else {})

    def _match(self, saved: Layout) -> tuple[list[int | None], list[int | None]]:
        """Return, for each goal and for each column, its index in a checkpoint, or None."""

        def find(names: Sequence[str], wanted: Sequence[str]) -> int | None:
            return next((names.index(name) for name in wanted if name in names), None)

        goals = [find(saved.goals, [self.renamed.get(name, name)]) for name in self.layout.goals]
        columns = []
        for column, owner in zip(self.layout.columns, self.layout.owner, strict=True):
            goal = self.layout.goals[owner]
            member = column.removeprefix(goal)  # "" or ".member"
            columns.append(find(saved.columns, [self.renamed.get(column, self.renamed.get(goal, goal) + member)]))
        return goals, columns

    def _report_names(self, new: list[str], gone: list[str]) -> None:
        parts = [f"it does not hold {', '.join(new)}, which start fresh"] * bool(new)
        parts += [f"it holds {', '.join(gone)}, which this GoalSet lacks and drops"] * bool(gone)
        if parts:
            hint = f"; if one has a new name, say GoalSet(renamed={{{new[0]!r}: {gone[0]!r}}})" if new and gone else ""
            log.warning("the checkpoint has other goals: %s%s", "; ".join(parts), hint)

    def _kept(
        self, goals: GoalBuffers, saved: Saved, state: Mapping[str, Any], prefix: str, at: list[int | None]
    ) -> list[int | None]:
        """Return the columns whose parameters are those of the checkpoint, by index; report changed constraints."""
        kept = list(at)
        for k, index in enumerate(at):
            if index is None:
                continue
            now = self.constraints[k]
            if saved.constraints is not None:
                then: dict[str, Any] | None = saved.constraints[index]
                was, changed = saved.constraints[index]["text"], _differ(saved.constraints[index], now)
            else:
                then = None
                was = self._changed_start(goals, state.get(prefix + "start"), k)
                changed = was != ""
            if not changed:
                continue
            why = ""
            if self.which == CHECKPOINT and then is not None and then.get("curve") != now["curve"]:
                why = ", because their curves differ"
            elif self.which == CHECKPOINT:
                self._describe_again(k, then)
                log.warning(
                    "the checkpoint has %s for %s, and the code has %s: the checkpoint's holds, as resume='checkpoint' "
                    "says", was, self.layout.columns[k], now["text"],
                )  # fmt: skip
                continue
            else:
                why = "; resume='checkpoint' keeps the other"
            kept[k] = None
            log.warning(
                "the checkpoint has %s for %s, and the code has %s: the code's holds%s",
                was, self.layout.columns[k], now["text"], why,
            )  # fmt: skip
        return kept

    def _changed_start(self, goals: GoalBuffers, start: Tensor | None, k: int) -> str:
        """Compare the first parameters of a checkpoint without names with the code's; "" if they are the same."""
        policy = list(goals.policies.values())[k]
        if start is None or start.is_meta or policy.waits:
            return ""
        row, code = start[k].float().cpu(), goals.anchoring.first_params()[k]
        return "" if torch.allclose(row, code, rtol=1e-5, atol=1e-30) else text_of(policy.constraint, row.tolist())

    def _describe_again(self, k: int, then: dict[str, Any] | None) -> None:
        """Let the history describe the constraint that holds, if it is of the same class."""
        info = self.layout.constraints[k]
        if then is not None and then["kind"] == info.kind:
            self.layout.constraints[k] = ConstraintInfo.from_dict({**then, "moving": info.moving})

    def _fit_goals(self, state: MutableMapping[str, Any], prefix: str, at: list[int | None], saved: Saved) -> None:
        for name in OF_GOALS:
            value = state.get(prefix + name)
            if value is None:
                continue
            missing = -1.0
            if name == "average":  # that of a goal in the middle, whose order the next steps find
                known = [index for index in at if index is not None]
                missing = float(value[known].mean()) if known and not value.is_meta else 0.0
            state[prefix + name] = picked(value, at, missing)

    def _weigh(self, goals: GoalBuffers, state: MutableMapping[str, Any], prefix: str, saved: Saved) -> None:
        """Set the multipliers of another set of goals, or another spill, by the order of their averages."""
        average, count = state.get(prefix + "average"), len(self.layout.goals)
        if average is None or prefix + "multipliers" not in state:
            return
        weights = torch.full_like(average, 1 / count)
        if goals.spill is not None and saved.values.get("steps", 1):
            weights = goals.spill.weights_of(average)
        state[prefix + "multipliers"] = weights

    def _fit_temperature(self, state: MutableMapping[str, Any], prefix: str, saved: Saved) -> None:
        """Let the code's temperature hold if it was edited, or if the rule has changed to a spill."""
        temperature, code = state.get(prefix + "temperature"), self.rule["temperature"]
        if temperature is None or temperature.is_meta:
            return
        then = saved.values.get("rule", {}).get("temperature", code)
        spilled = self.rule["spill"] and bool(temperature != 0)
        if spilled or (then != code and self.which == CODE):
            log.warning("the checkpoint has temperature %g, and the code has %g: the code's holds", temperature, code)
            state[prefix + "temperature"] = torch.full_like(temperature, code)

    def _extra(self, saved: Saved, kept: list[int | None]) -> dict[str, Any]:
        """Return the state of the anchors by the names of this GoalSet's columns, those of a checkpoint alone."""
        values, steps = saved.values, saved.values.get("steps", 0)
        begun = values.get("begun", [0] * len(saved.layout.columns))
        names = {k: saved.layout.columns[at] for k, at in enumerate(kept) if at is not None}
        columns = self.layout.columns
        return {
            "from": [columns[k] for k in names],
            "waits": [columns[k] for k, name in names.items() if name in values.get("waits", ())],
            "given": {columns[k]: values.get("given", {}).get(name, {}) for k, name in names.items()},
            "begun": [steps if at is None else begun[at] for at in kept],
        }


def _plain(info: ConstraintInfo, policy: Policy) -> dict[str, Any]:
    """Return everything that tells a constraint or policy from another, in plain values that outlive a process."""
    given = getattr(policy, "_arguments", None) or {}
    others = {name: _stable(_shown(value)) for name, value in given.items() if name not in info.arguments}
    return {**info.to_dict(), "others": others, "text": _stable(info.text)}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two results of `_plain` differ in what both versions of bomkern know."""
    return any(one[name] != other[name] for name in one.keys() & other.keys() if name != "text")


def _stable(text: str) -> str:
    """Leave out addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
