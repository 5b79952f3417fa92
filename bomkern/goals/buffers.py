"""The buffers of a `bomkern.GoalSet`: first values, saving, loading by name, and the way from the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.torch_internals import FullPrecisionBuffers
from .policies import STATE
from .rule_state import ends_of

if TYPE_CHECKING:
    from .anchors import Anchors
    from .micro_batches import MicroBatches
    from .monitor import Monitor
    from .policies import Policy
    from .resume import Resume
    from .row_budget import RowBudget
    from .rule_state import RuleState
    from .rules import Spill


class GoalBuffers(FullPrecisionBuffers):
    """Base of `bomkern.GoalSet` that holds its state, all of it in tensors. The subclass sets the parts named here."""

    names: list[str]
    policies: dict[str, Policy]
    owner: list[int]
    spill: Spill | None
    anchoring: Anchors
    rules: RuleState
    micro: MicroBatches
    monitor: Monitor
    row_budget: RowBudget | None
    _resume: Resume

    params: Tensor
    start: Tensor
    temperature: Tensor
    policy_state: Tensor
    log_nudge: Tensor
    guard_share: Tensor
    average: Tensor
    multipliers: Tensor
    _ends: Tensor

    def _first(self) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return the buffers before the first step, those that are saved and the others, in float32 on the host."""
        goals, columns = len(self.names), len(self.policies)
        params = self.anchoring.first_params()
        new = params.new_full
        saved = {
            "params": params,
            "start": params.clone(),
            "temperature": new((), self._resume.rule["temperature"]),
            "policy_state": new((columns, STATE), 0.0),
            "log_nudge": new((columns,), 0.0),
            "guard_share": new((goals,), -1.0),
            "average": new((goals,), 0.0),
            "multipliers": new((goals,), 1 / goals),
        }
        unsaved: dict[str, Tensor | None] = {
            "_belongs": torch.tensor(self.owner, device="cpu"),
            "_ends": torch.tensor(ends_of(self.policies, self.rules.begun), device="cpu"),
            "_weights_by_order": self.spill.weights(goals) if self.spill else None,
            "_average_before": saved["average"].clone(),
            "_multipliers_before": saved["multipliers"].clone(),
        }
        return saved, unsaved

    def _register(self) -> None:
        """Register the buffers, in float32 whatever the default dtype is, on torch's default device."""
        device = torch.get_default_device()
        saved, unsaved = self._first()
        for name, buffer in {**saved, **unsaved}.items():
            self.register_buffer(name, None if buffer is None else buffer.to(device), persistent=name in saved)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the state before the first step; anchors that `anchor` supplied stay known.

        Call it where ``to_empty`` has left any values in the buffers. Buffers that leave the meta device are reset so.
        """
        self.anchoring.restart()
        self.micro.forget()
        self.rules.changed.clear()
        if self.row_budget is not None:
            self.row_budget.forget()
        self.rules.begin([0] * len(self.policies))
        for buffers in self._first():
            for name, buffer in buffers.items():
                if buffer is not None:
                    getattr(self, name).copy_(buffer)
        self.monitor.reset_parameters()

    def get_extra_state(self) -> Tensor:
        _ = self.monitor.history  # which counts the steps of replayed graphs
        changing = {**self.anchoring.state(), "steps": self.monitor.steps, "begun": self.rules.begun}
        return self._resume.pack(changing)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what `Resume.fit` made of a saved state."""
        self.anchoring.load_state(state)
        if self.row_budget is not None:
            self.row_budget.forget()
        self._ends.copy_(torch.tensor(self.rules.begin(state["begun"]), device="cpu"))

    def _before_loading(self, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
        return self._resume.fit(self, state, prefix, errors)

    def _after_loading(self) -> None:
        """Fill the buffers that ``load_state_dict(assign=True)`` left on the meta device, as it had none for them."""
        device = self.params.device
        if device.type == "meta" or not self.monitor.ring.is_meta:
            return
        for buffers in self._first():
            for name, buffer in buffers.items():
                if buffer is not None and getattr(self, name).is_meta:
                    setattr(self, name, buffer.to(device))
        self.monitor.to_empty(device=device)
