"""bomkern: multi-goal training by the bottleneck rule, fast and safe, in PyTorch."""

from . import _info
from ._info import info
from .constraints import Box, BoxAsymmetric, Constraint, ConstraintTable, Lower, Minimize, MinimizeHard, Upper
from .min_goal import MinGoalStats, min_goal_loss

__version__ = "0.1.0"
__all__ = [
    "Box",
    "BoxAsymmetric",
    "Constraint",
    "ConstraintTable",
    "Lower",
    "MinGoalStats",
    "Minimize",
    "MinimizeHard",
    "Upper",
    "info",
    "min_goal_loss",
]

_info.warn_if_not_compiled()
