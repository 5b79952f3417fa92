"""bomkern: multi-goal training by the bottleneck rule, fast and safe, in PyTorch."""

from . import anchors as anchors  # modules are not in __all__: a star import must not replace the user's torch.nn
from . import nn as nn
from ._version import __version__ as __version__
from .constraints import Box, BoxAsymmetric, Constraint, ConstraintTable, Lower, Maximize, Minimize, MinimizeHard, Upper
from .diagnosis.diagnose import Diagnosis, diagnose
from .diagnosis.finding import Finding
from .dispatch.info import info, warn_if_not_compiled
from .goals.anchor_check import AnchorCheck, AnchorFinding
from .goals.goal_set import GoalSet
from .goals.history import GoalOutput, History
from .goals.payoff import Payoff
from .goals.policies import Anchored, Calibrated, Fixed, Policy, Tracking
from .goals.probe import probe
from .goals.rules import Group, ShareGuard, Spill
from .goals.step_guard import StepGuard
from .lazy_goals.lazy import Lazy, lazy
from .ops.active_units import active_units
from .ops.consistency_variance import consistency_variance
from .ops.covariance_penalty import covariance_penalty
from .ops.gaussian_kl import gaussian_kl
from .ops.latent_statistics import LatentStatistics, latent_statistics
from .ops.min_goal import MinGoalStats, min_goal_loss
from .ops.total_correlation import KLParts, gaussian_total_correlation, total_correlation

__all__ = [
    "AnchorCheck",
    "AnchorFinding",
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
    "KLParts",
    "LatentStatistics",
    "Lazy",
    "Lower",
    "Maximize",
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
    "probe",
    "total_correlation",
]

for _name in __all__:
    if isinstance(globals()[_name], type):  # a pickle and a repr say where the class is public, not where it lives
        globals()[_name].__module__ = __name__

warn_if_not_compiled()
