"""`StepGuard`: take a step only if the loss and every gradient are finite, without a host sync."""

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
    """Step all optimizers together, or none of them if the loss or a gradient is not finite.

    The fused optimizers of torch (``torch.optim.AdamW(..., fused=True)``; Adam, SGD and Adagrad too) read
    ``found_inf`` on the device, as `torch.amp.GradScaler` passes it, and leave parameters and state alone if it is 1.
    The host never waits. Other optimizers cannot do that: with one of them each step waits for the device, and a
    warning is logged once.

    Args:
        optimizers: one or more, without closures.
        goals: a `GoalSet`, or several, whose last step is taken back if the step is rejected (`GoalSet.accept`).
        process_group: the ranks that step together or not at all; ``torch.distributed.group.WORLD`` is all of them.
            None decides on each rank alone. That is right under DistributedDataParallel, whose gradients are the same
            on all ranks, if ``finite`` is the same too.

    Attributes:
        rejected: number of steps that were not taken, 0-dim int64 on the device.
        rejected_in_a_row: number of rejected steps since the last one that was taken.

    Raises:
        TypeError: an argument is no optimizer, or no GoalSet; the message names it.
        ValueError: there is no optimizer, or the parameters are on several devices.

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
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(f"StepGuard: optimizers must be torch.optim.Optimizer, got {type(optimizer).__name__}")
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
        # Names of the optimizers whose steps the host has to decide on; empty if all are fused.
        self._waits = [type(x).__name__ for x in optimizers if not takes_found_inf(x)]
        self._told = False

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> Tensor:
        """Step all optimizers if ``finite`` is True and all gradients are finite.

        Args:
            finite: 0-dim bool on the device, as `GoalOutput.finite`; None to check the gradients alone.

        Returns:
            Whether the step was taken, 0-dim bool on the device.
        """
        found_inf = self._found_inf(finite)
        ok = found_inf == 0
        if self._waits:
            self._wait_for(bool(ok))
        else:
            for optimizer in self.optimizers:
                step_unless(found_inf, optimizer)
        for goal in self.goals:
            goal.accept(ok)
        self.rejected += ~ok
        self.rejected_in_a_row.add_(1).mul_(~ok)
        return ok

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def _found_inf(self, finite: Tensor | None) -> Tensor:
        """Return 1.0 if anything is not finite on any rank of the group, else 0.0; 0-dim float32."""
        if finite is None:
            found_inf = torch.zeros((), device=self.device)
        else:
            found_inf = (~finite.to(device=self.device, dtype=torch.bool)).float()
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters():
            grad = parameter.grad
            if grad is None:
                continue
            grad = grad.to_local() if hasattr(grad, "to_local") else grad  # a DTensor's part on this rank
            grad = sparse_values(grad) if grad.is_sparse else grad
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for grads in by_dtype.values():
            flag_non_finite(grads, found_inf, self._one)
        if self.process_group is not None:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, self.process_group)
        return found_inf

    def _wait_for(self, ok: bool) -> None:
        """Step the optimizers if ``ok``, which the host had to wait for; warn about that once."""
        if not self._told:
            names = " and ".join(self._waits)
            can_fuse = any(x.defaults.get("fused", True) in (None, False) for x in self.optimizers)
            hint = "; fused=True would not" if can_fuse else ""
            log.warning("StepGuard: %s takes no found_inf: each step waits for the device%s", names, hint)
            self._told = True
        for optimizer in self.optimizers if ok else ():
            optimizer.step()

    def state_dict(self) -> dict[str, int]:
        """Return the counts. Reading them waits for the device."""
        return {"rejected": int(self.rejected), "rejected_in_a_row": int(self.rejected_in_a_row)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rejected.fill_(state["rejected"])
        self.rejected_in_a_row.fill_(state["rejected_in_a_row"])

    def __repr__(self) -> str:
        return f"StepGuard({', '.join(type(x).__name__ for x in self.optimizers)})"
