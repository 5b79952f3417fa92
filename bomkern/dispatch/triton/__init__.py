"""The Triton implementations' bridge to PyTorch, a file for each op: its ops, fakes and autograd.

Import it only where impl "triton" is asked for. It imports triton itself no sooner than the first call, because that
may touch a driver.
"""

# Each name is from now on the function, not its module.
from .active_units import active_units
from .consistency_variance import consistency_variance
from .covariance_penalty import covariance_penalty
from .gaussian_kl import gaussian_kl
from .goal_set import goal_set
from .latent_statistics import latent_statistics
from .launcher import why_not
from .min_goal import min_goal
from .total_correlation import total_correlation

__all__ = [
    "active_units",
    "consistency_variance",
    "covariance_penalty",
    "gaussian_kl",
    "goal_set",
    "latent_statistics",
    "min_goal",
    "total_correlation",
    "why_not",
]
