"""bomkern: multi-goal training by the bottleneck rule, fast and safe, in PyTorch."""

from . import _info
from ._info import info
from .constraints import Box, BoxAsymmetric, Constraint, ConstraintTable, Lower, Minimize, MinimizeHard, Upper
from .min_goal import MinGoalStats, min_goal_loss
from .total_correlation import gaussian_total_correlation, total_correlation

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
    "gaussian_total_correlation",
    "info",
    "min_goal_loss",
    "total_correlation",
]

_info.warn_if_not_compiled()
