"""The ops as modules, for `torch.nn.Sequential`, configuration files and ``print(model)``.

Each module is a function of bomkern with its options bound: ``TotalCorrelation(50_000)(z, mu, logvar)`` is
``total_correlation(z, mu, logvar, 50_000)``. The function checks the options when the module is called.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch import distributed as dist

from .common.process_group import ranks_of
from .common.torch_internals import FullPrecisionBuffers
from .constraints import Constraint, ConstraintTable, text_of
from .goals.goal_set import GoalSet
from .lazy_goals.lazy import Lazy
from .ops.active_units import active_units
from .ops.consistency_variance import consistency_variance
from .ops.covariance_penalty import covariance_penalty
from .ops.gaussian_kl import gaussian_kl
from .ops.latent_statistics import LatentStatistics as Statistics
from .ops.latent_statistics import latent_statistics
from .ops.min_goal import Mask, MinGoalStats, min_goal_loss
from .ops.total_correlation import KLParts, gaussian_total_correlation, total_correlation

log = logging.getLogger("bomkern")

__all__ = [
    "ActiveUnits",
    "ConsistencyVariance",
    "CovariancePenalty",
    "GaussianKL",
    "GaussianTotalCorrelation",
    "GoalSet",
    "LatentStatistics",
    "MinGoalLoss",
    "TotalCorrelation",
]


class _Bound(torch.nn.Module):
    """Base of the modules that bind the options of a function and print them.

    A ``process_group`` option is neither copied with the module nor saved.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._ranks = ranks_of(options.pop("process_group", None))
        self.options = options

    def extra_repr(self) -> str:
        shared = [f"process_group of {self._ranks.size} ranks"] if self._ranks.size > 1 else []
        return ", ".join([*(f"{name}={value!r}" for name, value in self.options.items()), *shared])


class MinGoalLoss(FullPrecisionBuffers):
    """`bomkern.min_goal_loss` with its constraints.

    Args:
        constraints: one for each goal, or None if the goals are scores already.
        reduction, return_stats, route, materialize, impl: see `bomkern.min_goal_loss`.

    Attributes:
        params: [K, 4] buffer of the constraints' parameters (`ConstraintTable`), which moves with ``to`` and is saved
            by ``state_dict``; None without constraints. The next call sees a change in place.

    Example:
        >>> loss = MinGoalLoss([Minimize(0.1), Upper(30.0, margin=10.0)])
        >>> loss([recon, kl]).backward()
    """

    params: Tensor | None

    def __init__(
        self,
        constraints: Sequence[Constraint] | None = None,
        *,
        reduction: str = "mean",
        return_stats: bool = False,
        route: str = "auto",
        materialize: Sequence[int] = (),
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.constraints = None if constraints is None else tuple(constraints)
        self.options: dict[str, Any] = {
            "reduction": reduction,
            "return_stats": return_stats,
            "route": route,
            "materialize": materialize,
            "impl": impl,
        }
        self._table = None if self.constraints is None else ConstraintTable(self.constraints)
        self.register_buffer("params", None if self._table is None else self._table.params)

    def reset_parameters(self) -> None:
        """Write the parameters of the constraints into ``params``, for example after ``to_empty``."""
        if self.constraints is not None and self.params is not None:
            self.params.copy_(ConstraintTable(self.constraints, "cpu").params)

    def _before_loading(self, state: dict[str, Any], prefix: str, errors: list[str]) -> bool:
        """Log which constraints of the code the state replaces; it has no names, so the order decides."""
        given = state.get(f"{prefix}params")
        if self.constraints is not None and isinstance(given, Tensor) and not given.is_meta:
            for k, (constraint, ramp) in enumerate(zip(self.constraints, given.tolist(), strict=False)):
                if (text := text_of(constraint, ramp)) != repr(constraint):
                    log.warning(
                        "MinGoalLoss: the state that is loaded has %s for goals[%d], and the code has %r: the state's "
                        "holds; reset_parameters() restores the code's", text, k, constraint,
                    )  # fmt: skip
        return True

    def forward(
        self, goals: Tensor | Sequence[Tensor | Lazy], mask: Mask = None
    ) -> Tensor | tuple[Tensor, MinGoalStats]:
        """See `bomkern.min_goal_loss`."""
        table = self._table
        if table is not None and self.params is not None:
            columns = [goals] if isinstance(goals, Tensor) else goals
            wide = any(isinstance(goal, Tensor) and goal.dtype is torch.float64 for goal in columns)
            table.params = self.params.to(torch.float64 if wide else torch.float32)
        out: Tensor | tuple[Tensor, MinGoalStats] = min_goal_loss(goals, table, mask=mask, **self.options)
        return out

    def extra_repr(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items() if value not in (None, ())]
        ramps = [] if self.params is None or self.params.is_meta else self.params.tolist()
        own = self.constraints or ()
        shown = [text_of(*pair) for pair in zip(own, ramps, strict=True)] if ramps else list(map(repr, own))
        return ", ".join([*shown, *options])


class TotalCorrelation(_Bound):
    """`bomkern.total_correlation`: maps (z, mu, logvar), [B, D] each, to [B], with ``parts`` to `bomkern.KLParts`."""

    def __init__(
        self,
        dataset_size: SupportsIndex | None = None,
        estimator: str = "mws",
        *,
        parts: bool = False,
        process_group: dist.ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            dataset_size=dataset_size, estimator=estimator, parts=parts, process_group=process_group, impl=impl
        )

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor, rows: Tensor | None = None) -> Tensor | KLParts:
        found: Tensor | KLParts = total_correlation(
            z, mu, logvar, rows=rows, **self.options, process_group=self._ranks.group
        )
        return found


class GaussianTotalCorrelation(_Bound):
    """`bomkern.gaussian_total_correlation`: maps z [B, D] to a 0-dim tensor."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group=process_group)

    def forward(self, z: Tensor) -> Tensor:
        return gaussian_total_correlation(z, process_group=self._ranks.group)


class GaussianKL(_Bound):
    """`bomkern.gaussian_kl`: maps (mu, logvar), [B, D] each, to [B]."""

    def __init__(self, block_size: int | None = None, rho: float = 0.0, *, impl: str | None = None) -> None:
        super().__init__(block_size=block_size, rho=rho, impl=impl)

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return gaussian_kl(mu, logvar, **self.options)


class ConsistencyVariance(_Bound):
    """`bomkern.consistency_variance`: maps views [V, B, D], or V tensors [B, D], to [B]."""

    def __init__(self, correction: float = 1, *, detach: bool = False, impl: str | None = None) -> None:
        super().__init__(correction=correction, detach=detach, impl=impl)

    def forward(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        return consistency_variance(views, **self.options)


class CovariancePenalty(_Bound):
    """`bomkern.covariance_penalty`: maps z [B, D] to [B], or to a 0-dim tensor with ``reduction="batch"``."""

    def __init__(
        self,
        normalize: bool = False,
        *,
        reduction: str = "sample",
        process_group: dist.ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, process_group=process_group, impl=impl)

    def forward(self, z: Tensor) -> Tensor:
        return covariance_penalty(z, **self.options, process_group=self._ranks.group)


class ActiveUnits(_Bound):
    """`bomkern.active_units`: maps mu [B, D] to the active and the effective fraction, 0-dim each."""

    def __init__(
        self,
        threshold: float = 0.1,
        temperature: float = 0.05,
        *,
        process_group: dist.ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(threshold=threshold, temperature=temperature, process_group=process_group, impl=impl)

    def forward(self, mu: Tensor) -> tuple[Tensor, Tensor]:
        return active_units(mu, **self.options, process_group=self._ranks.group)


class LatentStatistics(_Bound):
    """`bomkern.latent_statistics`: maps (z, mu, logvar), [B, D] each, to `bomkern.LatentStatistics`."""

    def __init__(
        self,
        threshold: float = 0.1,
        temperature: float = 0.05,
        *,
        process_group: dist.ProcessGroup | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__(threshold=threshold, temperature=temperature, process_group=process_group, impl=impl)

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor) -> Statistics:
        return latent_statistics(z, mu, logvar, **self.options, process_group=self._ranks.group)
