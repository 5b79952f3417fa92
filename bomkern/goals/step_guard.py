"""`StepGuard`: take a step only if the loss and every gradient are finite, without a host sync."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.torch_internals import (
    SteppedByScaler,
    already_unscaled,
    flag_non_finite,
    forget_scaler,
    from_scaler,
    innermost,
    inside_scaler,
    sparse_values,
    step_unless,
    takes_found_inf,
)
from .goal_set import GoalSet
from .rejections import Rejections

log = logging.getLogger("bomkern")


class StepGuard(SteppedByScaler):
    """Step all optimizers together, or none of them if the loss or a gradient is not finite.

    The fused optimizers of torch (``torch.optim.AdamW(..., fused=True)``; Adam, SGD and Adagrad too) read
    ``found_inf`` on the device, as `torch.amp.GradScaler` passes it, and leave parameters and state alone if it is 1.
    The host never waits. Other optimizers cannot do that: with one of them each step waits for the device, and a
    warning is logged once.

    The collective skipping of a bad step on all ranks is ``StepGuard(process_group=)``: if one rank has a NaN, no rank
    steps.

    After a rejected step a warning names the goal at fault. If the loss was not finite, the record of the step tells.
    Otherwise a goal's graph made the gradient bad, as ``torch.where(known, (y - x) ** 2, 0)`` does for a NaN in y. The
    next steps are then searched with a hook on each node, at least 16 of them, until one is rejected. Steps before
    the first rejection cost nothing more. A GPU's host learns of a rejection up to 32 steps later, without waiting.

    Args:
        optimizers: one or more, without closures. Those that Accelerate or Fabric has prepared will do.
        goals: a `GoalSet`, or several, whose last step is taken back if the step is rejected (`GoalSet.accept`).
        process_group: the ranks that step together or not at all; ``torch.distributed.group.WORLD`` is all of them.
            None decides on each rank alone. That is right under DistributedDataParallel, whose gradients are the same
            on all ranks, if ``finite`` is the same too.
        limit: number of rejected steps in a row after which `step` raises an error, on all ranks of the group in the
            same step; None never gives up. A GPU's host gives up at most 48 steps later.
        scaler: the `torch.amp.GradScaler` that scales the loss. ``scaler.step(guard, out.finite)`` then steps all
            optimizers or none, and so does `step`. Call ``scaler.unscale_(guard)`` before you clip gradients, and
            ``scaler.update()`` after the step.

    Attributes:
        rejected: number of steps that were not taken, 0-dim int64 on the device.
        rejected_in_a_row: number of rejected steps since the last one that was taken.
        reason: the last sentence that names a goal at fault, or None.
        param_groups: those of all optimizers, which ``scaler.unscale_`` and ``clip_grad_norm_`` can read.

    Raises:
        TypeError: an argument is no optimizer, GoalSet or GradScaler, or an optimizer needs a closure or has a
            GradScaler of its own; the message names it.
        ValueError: there is no optimizer, the parameters are on several devices, or ``limit`` is below 1.

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
        limit: int | None = 100,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not optimizers:
            raise ValueError("StepGuard must be given at least one optimizer, got none")
        for optimizer in optimizers:
            check_optimizer(optimizer)
        self.optimizers = optimizers
        self.goals = [goals] if isinstance(goals, GoalSet) else list(goals)
        for goal in self.goals:
            if not isinstance(goal, GoalSet):
                raise TypeError(f"StepGuard: goals must be GoalSet, got {type(goal).__name__}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise TypeError(f"StepGuard: limit must be a whole number or None, got {type(limit).__name__}")
        if limit is not None and limit < 1:
            raise ValueError(f"StepGuard: limit must be at least 1, or None to never give up, got {limit}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"StepGuard: scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        devices = {p.device for p in self._parameters()}
        if len(devices) != 1:
            raise ValueError(f"StepGuard: parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop()
        self.process_group = process_group
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.rejected, self.rejected_in_a_row = self._counts.unbind()
        self._rejections = Rejections(self.goals, limit, process_group, self.scaler is not None)
        self._one = torch.ones((), device=self.device)
        # Names of the optimizers whose steps the host has to decide on; empty if all are fused.
        self._waits = [type(x).__name__ for x in optimizers if not takes_found_inf(x)]
        self._told = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def reason(self) -> str | None:
        return self._rejections.reason

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> Tensor:
        """Step all optimizers if ``finite`` is True and all gradients are finite.

        Args:
            finite: 0-dim bool on the device, as `GoalOutput.finite`; None to check the gradients alone.

        Returns:
            Whether the step was taken, 0-dim bool on the device.

        Raises:
            RuntimeError: ``limit`` steps in a row were rejected; the message names the goal if it is known. Or the
                gradients of one optimizer are not scaled any more, and those of others are.
            TypeError: a GradScaler that the guard does not know called this method.
        """
        if self.scaler is not None and not inside_scaler(self):
            taken: Tensor = self.scaler.step(self, finite)  # type: ignore[arg-type, assignment]
            return taken
        try:
            return self._step(finite)
        except Exception:
            forget_scaler(self)
            raise

    def _step(self, finite: Tensor | None) -> Tensor:
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
        self._rejections.look(self._counts)
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
        factor, scaled = self._unscaling(found_inf)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters():
            grad = parameter.grad
            if grad is None:
                continue
            grad = grad.to_local() if hasattr(grad, "to_local") else grad  # a DTensor's part on this rank
            if grad.is_sparse:
                if scaled and not grad.is_coalesced():  # its values may overflow when they are summed
                    grad = parameter.grad = grad.coalesce()
                grad = sparse_values(grad)
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for grads in by_dtype.values():
            flag_non_finite(grads, found_inf, factor, scaled)
        if self.process_group is not None:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, self.process_group)
        return found_inf

    def _unscaling(self, found_inf: Tensor) -> tuple[Tensor, bool]:
        """Return the factor that takes the scale out of the gradients, and whether one must; merge what the scaler
        found."""
        if not inside_scaler(self):
            return self._one, False
        if self.scaler is None:
            raise TypeError("StepGuard: name the scaler that steps it: StepGuard(..., scaler=scaler)")
        if any(already_unscaled(self.scaler, x) for each in self.optimizers for x in (each, innermost(each))):
            raise RuntimeError("StepGuard: call scaler.unscale_(guard) instead of unscale_ for one of its optimizers")
        found, scale = from_scaler(self)
        if found is not None:
            torch.maximum(found_inf, found.to(found_inf), out=found_inf)
        return (self._one, False) if scale is None else (scale.to(found_inf).reciprocal(), True)

    def _wait_for(self, ok: bool) -> None:
        """Step the optimizers if ``ok``, which the host had to wait for; warn about that once."""
        if not self._told:
            names = " and ".join(self._waits)
            can_fuse = any(innermost(x).defaults.get("fused", True) in (None, False) for x in self.optimizers)
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
        self._rejections.restart(int(state["rejected"]))

    def __repr__(self) -> str:
        return f"StepGuard({', '.join(type(x).__name__ for x in self.optimizers)})"


def check_optimizer(optimizer: object) -> None:
    """Raise TypeError for anything that a `StepGuard` cannot step."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"StepGuard: optimizers must be torch.optim.Optimizer, got {type(optimizer).__name__}")
    inner = innermost(optimizer)
    closure = inspect.signature(inner.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"StepGuard cannot step {type(inner).__name__}, which evaluates a closure several times in a step: write "
            "`with goals.one_step(): optimizer.step(closure)` instead"
        )
    strategy = getattr(optimizer, "_strategy", None)  # Fabric's; Accelerate's wrapper has the scaler itself
    scaler = getattr(optimizer, "scaler", None) or getattr(getattr(strategy, "precision", None), "scaler", None)
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
        raise TypeError(
            f"StepGuard: {type(optimizer).__name__} steps by a GradScaler of its own. Give the guard both parts, "
            "StepGuard(optimizer.optimizer, scaler=scaler), where scaler is accelerator.scaler, or "
            "fabric.strategy.precision.scaler; and call scaler.update() after guard.step"
        )
