"""Rules over all goals of a `bomkern.GoalSet`: groups of goals, weights by order, and a guard of shares."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import check_flag, check_whole, finite_number
from ..constraints import Constraint
from ..reference import weights_of
from .policies import Policy, policy_of

AUTO = "auto"
EVEN, INERTIA = 0.5, 50.0
# What ``Spill("auto")``, whose ratio is 1/2, and a plain ratio take where nothing is given.
USUAL: dict[bool, dict[str, float]] = {
    True: {"even": EVEN, "relative": True, "inertia": INERTIA},
    False: {"even": 0.0, "relative": False, "inertia": 0.0},
}


class ShareGuard:
    """Nudge the scales of a `GoalSet` so that no goal's share of the gradient stays outside a band.

    In each step ``log scale += rate`` for a goal whose share is above ``high``, and ``-= rate`` for one whose share is
    below ``low``. The share is a moving average of the measured shares. Every nudge is in the history.

    The guard keeps goals from being starved, and from holding all of the gradient for long. The price is that scales
    lose their meaning: a goal that is satisfied and idle is pulled in too, until its scale is a thousandth. Prefer
    anchors, and use a guard for runs that nobody watches.

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
        """Return the amount to add to each goal's log scale, [G].

        Args:
            share: shares of this step, [G].
            average: moving average of the shares, [G], changed in place; below 0 before the first step.
        """
        torch.where(average < 0, share, average.lerp(share, self.weight), out=average)
        return self.rate * ((average > self.high).to(average.dtype) - (average < self.low).to(average.dtype))

    def __repr__(self) -> str:
        return f"ShareGuard(low={self.low:g}, high={self.high:g}, rate={self.rate:g})"


class Spill:
    """Weights by order: goals sorted by their deficits, worst first, weigh ``1 : ratio : ratio^2 : ...``.

    ``loss = sum_g w_g mean_b D_bg`` with ``w_g`` proportional to ``ratio^p_g``, where ``p_g`` is the position of goal g
    in the order, 0 for the worst. This is an ordered weighted average of the goals' deficits (Yager 1988, "On ordered
    weighted averaging aggregation operators in multicriteria decisionmaking"). As ratio goes to 0 it becomes the
    deficit of the worst goal alone.

    ``Spill("auto")`` is the rule to begin with on any problem and for any number of goals: ratio 1/2, half of the
    weight shared evenly (``even``), goals beyond their nadirs pulled by their relative progress (``relative``), and
    weights that change slowly (``inertia``). With many goals the last ones would otherwise weigh nothing, and a weight
    that jumps upsets Adam, whose second moments remember the gradients of some thousand steps.

    The order is that of a moving average over the steps before, so the weights are known before a step. Only the order
    matters: a goal that can never be satisfied holds about ``1 - ratio`` of the gradient however bad it is. The hard
    minimum would give it everything. The rest is distributed as if that goal were not there.

    With a ``budget`` a goal of weight w takes ``n = min(B, max(1, ceil(budget * w * B)))`` of the B samples of a step.
    Its part of the loss is w times its mean deficit over these. Rows are drawn at random, so the expected loss and
    gradient are those of all samples. All goals together take about ``budget * B`` rows instead of ``G * B``, and a
    `lazy` goal is evaluated once, for its rows alone. See "A budget of rows" in the documentation of `GoalSet`.

    Args:
        ratio: in (0, 1), or "auto".
        halflife: of the moving average, in steps, > 0.
        budget: goal rows of a step, in batches, > 0; None takes all rows. The reduction must be "mean" or "sum".
        seed: of the rows that are drawn, a whole number, at least 0. They are a function of seed, step and rank.
        even: the part of the weight that all goals share evenly, from 0 to below 1; the rest goes by order. None: 0, or
            0.5 with "auto".
        relative: whether the weight of a goal whose average deficit D is above 1 is divided by D, and all weights by
            their sum. The gradient of such a goal is then that of ``log D``: it pulls as much from 80 nadirs away as
            from 2, and leaves the others theirs. None: False, or True with "auto".
        inertia: half-life in steps with which the weights follow the order, >= 0; 0 follows at once. None: 0, or 50
            with "auto".
        look: the first of every ``look`` steps looks at all samples, a whole number, at least 1; None for never. The
            record, policies and the order of the goals then learn from all samples. The loss is that of the rows that
            were drawn. A look evaluates `lazy` goals once more, without a graph. Generators are left as they were, so a
            function that draws random numbers may draw others in a look than in the loss.

    Raises:
        ValueError: a number is out of range; the message names it.
        TypeError: an argument is no number; the message names it.
    """

    def __init__(
        self,
        ratio: float | str = 0.5,
        halflife: float = 7.0,
        budget: float | None = None,
        *,
        seed: int = 0,
        look: int | None = None,
        even: float | None = None,
        relative: bool | None = None,
        inertia: float | None = None,
    ) -> None:
        self.auto = isinstance(ratio, str) and ratio == AUTO
        if isinstance(ratio, str) and not self.auto:
            raise TypeError(f'Spill: ratio must be a number, got str {ratio!r}: write a number below 1, or "{AUTO}"')
        self.ratio = 0.5 if self.auto else finite_number("Spill: ratio", ratio, above=0)
        if self.ratio >= 1:
            raise ValueError(f"Spill: ratio must be below 1, got {ratio}")
        usual = USUAL[self.auto]
        self.even = finite_number("Spill: even", usual["even"] if even is None else even)
        if not 0 <= self.even < 1:
            raise ValueError(
                f"Spill: even must be at least 0 and below 1, got {even}: with 1 no goal would be singled out"
            )
        self.relative = bool(usual["relative"]) if relative is None else relative
        check_flag("Spill: relative", self.relative)
        self.inertia = finite_number("Spill: inertia", usual["inertia"] if inertia is None else inertia)
        if self.inertia < 0:
            raise ValueError(f"Spill: inertia must be at least 0, got {inertia}")
        self.follow = 1 - 2 ** (-1 / self.inertia) if self.inertia else 1.0
        self.rate = 1 - 2 ** (-1 / finite_number("Spill: halflife", halflife, above=0))
        self.budget = None if budget is None else finite_number("Spill: budget", budget, above=0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"Spill: seed must be a whole number, got {seed!r}")
        if seed < 0:
            raise ValueError(f"Spill: seed must be at least 0, got {seed}")
        self.seed = seed
        self.look = None if look is None else check_whole("Spill: look", look)
        if look is not None and budget is None:
            raise ValueError(f"Spill: look needs a budget, got look={look} without one: all rows are seen anyway")

    def weights(self, goals: int) -> Tensor:
        """Return the weights by order, the worst goal's first, [goals]; they sum to 1."""
        weights = self.ratio ** torch.arange(goals, dtype=torch.float64, device="cpu")
        return (self.even / goals + (1 - self.even) * weights / weights.sum()).float()

    def weights_of(self, average: Tensor) -> Tensor:
        """Return the weights of goals whose deficits have these averages, [G], without inertia."""
        return weights_of(average, self.weights(len(average)).to(average.device), self.relative)

    @property
    def by_order(self) -> float | list[float]:
        """What the weights depend on, as plain values: the ratio, or all of it where there is more."""
        more = [self.even, float(self.relative), self.inertia]
        return [self.ratio, *more] if any(more) else self.ratio

    @property
    def name(self) -> str:
        """The ratio as it was given."""
        return AUTO if self.auto else f"{self.ratio:g}"

    def __repr__(self) -> str:
        given: dict[str, float | None] = {"budget": self.budget, "look": self.look}
        given |= {name: getattr(self, name) for name, x in USUAL[self.auto].items() if getattr(self, name) != x}
        parts = [f"{n}={x if isinstance(x, bool) else f'{x:g}'}" for n, x in given.items() if x is not None]
        return f"Spill({', '.join([repr(AUTO) if self.auto else self.name, *parts])})"


class Group:
    """Several constraints as one goal, whose deficit is the mean of its members' deficits.

    Its score is then the geometric mean of its members' scores.

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
