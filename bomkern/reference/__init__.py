"""The definition of every op in plain PyTorch: the oracle of the tests, and what serves where nothing was compiled."""

from .goal_set import counts_of as counts_of
from .goal_set import goal_set as goal_set
from .goal_set import goal_set_keep as goal_set_keep
from .goal_set import groups_of as groups_of
from .goal_set import mean_of_members as mean_of_members
from .goal_set import weights_of as weights_of
from .min_goal import deficit as deficit
from .min_goal import min_goal as min_goal
from .min_goal import worst_of as worst_of
from .record import RecordAt as RecordAt
from .record import record_of as record_of
from .record import record_parts as record_parts
from .statistics import active_units as active_units
from .statistics import centered as centered
from .statistics import column_moments as column_moments
from .statistics import consistency_variance as consistency_variance
from .statistics import covariance_penalty as covariance_penalty
from .statistics import gaussian_kl as gaussian_kl
from .statistics import latent_statistics as latent_statistics
from .statistics import log_density as log_density
from .statistics import log_weights as log_weights
from .statistics import merged_moments as merged_moments
from .statistics import total_correlation as total_correlation
from .statistics import total_correlation_gradients as total_correlation_gradients
from .statistics import units_of as units_of
