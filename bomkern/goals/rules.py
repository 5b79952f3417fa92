"""What a `bomkern.GoalSet` does with its goals as a whole: groups of them, weights by order, and a guard of shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import finite_number
from ..constraints import Constraint
from .policies import Policy, policy_of


class ShareGuard:
    """A safety net for a whole `GoalSet`, off unless asked for: ``log scale += rate`` while a goal's share is above
    ``high``, ``-= rate`` while it is below ``low``; nothing in between.

    The share is a moving average of who really got the gradient. Every nudge is in the history. It keeps any goal from
    being starved or from holding everything for long, at the price of what the scales meant: a goal that is satisfied
    and idle is pulled in too, until its scale is a thousandth. Anchors first; this if a run must not be watched.

    Args:
        low, high: the band without nudges, 0 <= low < high <= 1.
        rate: of log scale per step, > 0.
        halflife: of the share's moving average, in steps, > 0.
    """

    def __init__(self, low: float = 0.01, high: float = 0.6, rate: float = 0.01, halflife: float = 25.0) -> None:
        self.low, self.high = finite_number("ShareGuard: low", low), finite_number("ShareGuard: high", high)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"ShareGuard: 0 <= low < high <= 1 must hold, got low={low}, high={high}")
        self.rate = finite_number("ShareGuard: rate", rate, above=0)
        self.weight = 1 - 2 ** (-1 / finite_number("ShareGuard: halflife", halflife, above=0))

    def update(self, share: Tensor, average: Tensor) -> Tensor:
        """What to add to each goal's log scale, [G].

        Args:
            share: of this step, [G].
            average: [G], changed in place; below 0 before the first step.
        """
        torch.where(average < 0, share, average.lerp(share, self.weight), out=average)
        return self.rate * ((average > self.high).to(average.dtype) - (average < self.low).to(average.dtype))

    def __repr__(self) -> str:
        return f"ShareGuard(low={self.low:g}, high={self.high:g}, rate={self.rate:g})"


class Spill:
    """What flows over: goals in the order of their deficits, worst first, weigh ``1 : ratio : ratio^2 : ...``.

    ``loss = sum_g w_g mean_b D_bg`` with ``w_g`` proportional to ``ratio^(rank of goal g)``: an ordered weighted
    average of the goals' deficits (Yager 1988, "On ordered weighted averaging aggregation operators in multicriteria
    decisionmaking"), which becomes the worst goal's alone as ratio goes to 0. Ranks are those of a moving average of
    the steps before, so the weights are known before a step. Only ranks matter: a goal that can never be satisfied
    holds about ``1 - ratio`` of the gradient however bad it is, where the hard minimum would give it all, and the rest
    is shared out as if it were not there.

    Args:
        ratio: in (0, 1).
        halflife: of the moving average, in steps, > 0.
    """

    def __init__(self, ratio: float = 0.5, halflife: float = 7.0) -> None:
        self.ratio = finite_number("Spill: ratio", ratio, above=0)
        if self.ratio >= 1:
            raise ValueError(f"Spill: ratio must be below 1, got {ratio}")
        self.rate = 1 - 2 ** (-1 / finite_number("Spill: halflife", halflife, above=0))

    def weights(self, goals: int) -> Tensor:
        """By rank, [goals], summing to 1."""
        weights = self.ratio ** torch.arange(goals, dtype=torch.float64)
        return (weights / weights.sum()).float()

    def __repr__(self) -> str:
        return f"Spill({self.ratio:g})"


class Group:
    """Several constraints as one goal, whose deficit is the mean of its members': their scores' geometric mean.

    Args:
        members: constraints or policies, by name; at least one.

    Example:
        >>> GoalSet(latent=Group(correlation=Anchored("floor", 1.0), spread=Minimize(1.0)), recon=Anchored(0.0, 1.0))
    """

    def __init__(self, **members: Constraint | Policy) -> None:
        if not members:
            raise ValueError("Group must have at least one member, got none")
        self.members = {name: policy_of(f"Group: {name}", member) for name, member in members.items()}

    def __repr__(self) -> str:
        return f"Group({', '.join(f'{name}={policy!r}' for name, policy in self.members.items())})"
