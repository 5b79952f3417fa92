"""bomkern: multi-goal training by the bottleneck rule, fast and safe, in PyTorch."""

from . import _info, nn
from ._findings import Finding
from ._info import info
from ._lazies import Lazy
from .active_units import active_units
from .consistency_variance import consistency_variance
from .constraints import Box, BoxAsymmetric, Constraint, ConstraintTable, Lower, Minimize, MinimizeHard, Upper
from .covariance_penalty import covariance_penalty
from .diagnose import Diagnosis, diagnose
from .gaussian_kl import gaussian_kl
from .goal_set import GoalSet
from .history import GoalOutput, History
from .latent_statistics import LatentStatistics, latent_statistics
from .lazy import lazy
from .min_goal import MinGoalStats, min_goal_loss
from .policies import Anchored, Calibrated, Fixed, Group, Policy, ShareGuard, Spill, Tracking
from .probe import Payoff, probe
from .step_guard import StepGuard
from .total_correlation import gaussian_total_correlation, total_correlation

__version__ = "0.1.0"
__all__ = [
    "Anchored",
    "Box",
    "BoxAsymmetric",
    "Calibrated",
    "Constraint",
    "ConstraintTable",
    "Diagnosis",
    "Finding",
    "Fixed",
    "GoalOutput",
    "GoalSet",
    "Group",
    "History",
    "LatentStatistics",
    "Lazy",
    "Lower",
    "MinGoalStats",
    "Minimize",
    "MinimizeHard",
    "Payoff",
    "Policy",
    "ShareGuard",
    "Spill",
    "StepGuard",
    "Tracking",
    "Upper",
    "active_units",
    "consistency_variance",
    "covariance_penalty",
    "diagnose",
    "gaussian_kl",
    "gaussian_total_correlation",
    "info",
    "latent_statistics",
    "lazy",
    "min_goal_loss",
    "nn",
    "probe",
    "total_correlation",
]

_info.warn_if_not_compiled()
