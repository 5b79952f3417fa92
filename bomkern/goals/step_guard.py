"""`StepGuard`: steps are taken only where the loss and every gradient are finite, without a host sync."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.torch_internals import flag_non_finite, sparse_values, step_unless, takes_found_inf
from .goal_set import GoalSet

log = logging.getLogger("bomkern")


class StepGuard:
    """Steps optimizers together, or none of them: a step whose loss or gradient is not finite changes nothing.

    torch's fused optimizers (``torch.optim.AdamW(..., fused=True)``; Adam, SGD and Adagrad too) take ``found_inf`` from
    the device, as `torch.amp.GradScaler` gives it to them, and leave parameters and state alone where it is 1: the host
    never waits to know. Other optimizers cannot do that; with one of them each step waits for the device, which is
    logged once.

    Args:
        optimizers: one or more, without closures.
        goals: `GoalSet`, or several, whose last step is taken back with the optimizers' (`GoalSet.accept`).
        process_group: with several processes, whose ranks step together or not at all
            (``torch.distributed.group.WORLD``: all of them). None asks nobody, which is right with
            DistributedDataParallel, whose gradients are the same on all ranks, if ``finite`` is.

    Attributes:
        rejected: 0-dim int64 on the device, steps that were not taken.
        rejected_in_a_row: the same since the last that was.

    Raises:
        TypeError: something that is no optimizer, or no GoalSet, named in the message.
        ValueError: no optimizer, or parameters on several devices.

    Example:
        >>> guard = StepGuard(torch.optim.AdamW(model.parameters(), fused=True), goals=goals)
        >>> out = goals(raw)
        >>> out.loss.backward()
        >>> guard.step(out.finite)  # and guard.zero_grad()
    """

    def __init__(
        self,
        *optimizers: torch.optim.Optimizer,
        goals: GoalSet | Iterable[GoalSet] = (),
        process_group: Any = None,
    ) -> None:
        if not optimizers:
            raise ValueError("StepGuard must be given at least one optimizer, got none")
        for one in optimizers:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(f"StepGuard: optimizers must be torch.optim.Optimizer, got {type(one).__name__}")
        self.optimizers = optimizers
        self.goals = [goals] if isinstance(goals, GoalSet) else list(goals)
        for goal in self.goals:
            if not isinstance(goal, GoalSet):
                raise TypeError(f"StepGuard: goals must be GoalSet, got {type(goal).__name__}")
        devices = {p.device for p in self._parameters()}
        if len(devices) != 1:
            raise ValueError(f"StepGuard: parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop()
        self.process_group = process_group
        self.rejected = torch.zeros((), dtype=torch.int64, device=self.device)
        self.rejected_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._one = torch.ones((), device=self.device)
        # Whose steps the host has to decide on; empty where all are fused.
        self._waits = [type(x).__name__ for x in optimizers if not takes_found_inf(x)]
        self._told = False

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> Tensor:
        """Step all optimizers if ``finite`` and all gradients are.

        Args:
            finite: 0-dim bool on the device, as `GoalOutput.finite`; None where the gradients tell.

        Returns:
            Whether the step was taken, 0-dim bool on the device.
        """
        found = self._found(finite)
        ok = found == 0
        if self._waits:
            self._wait_for(bool(ok))
        else:
            for optimizer in self.optimizers:
                step_unless(found, optimizer)
        for goal in self.goals:
            goal.accept(ok)
        self.rejected += ~ok
        self.rejected_in_a_row.add_(1).mul_(~ok)
        return ok

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def _found(self, finite: Tensor | None) -> Tensor:
        """1.0 where something is not finite, on any rank of the group, else 0.0; [] float32."""
        if finite is None:
            found = torch.zeros((), device=self.device)
        else:
            found = (~finite.to(device=self.device, dtype=torch.bool)).float()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters():
            grad = parameter.grad
            if grad is None:
                continue
            grad = grad.to_local() if hasattr(grad, "to_local") else grad  # a DTensor's part on this rank
            grad = sparse_values(grad) if grad.is_sparse else grad
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for grads in by_dtype.values():
            flag_non_finite(grads, found, self._one)
        if self.process_group is not None:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.process_group)
        return found

    def _wait_for(self, ok: bool) -> None:
        """Without ``found_inf`` the host has to know."""
        if not self._told:
            names = " and ".join(self._waits)
            could = any(one.defaults.get("fused", True) in (None, False) for one in self.optimizers)
            hint = "; fused=True would not" if could else ""
            log.warning("StepGuard: %s takes no found_inf: each step waits for the device%s", names, hint)
            self._told = True
        for optimizer in self.optimizers if ok else ():
            optimizer.step()

    def state_dict(self) -> dict[str, int]:
        """The counts; reading them waits for the device."""
        return {"rejected": int(self.rejected), "rejected_in_a_row": int(self.rejected_in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rejected.fill_(state["rejected"])
        self.rejected_in_a_row.fill_(state["rejected_in_a_row"])

    def __repr__(self) -> str:
        return f"StepGuard({', '.join(type(one).__name__ for one in self.optimizers)})"
