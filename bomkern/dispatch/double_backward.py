"""Second derivatives of the compiled ops.

Under ``create_graph=True`` the backward of a compiled op (csrc/autograd.h) calls the reference by the names that are
registered here, and lets autograd differentiate it: once for the gradient, and again for whoever asks. Of total
correlation the reference is the gradient itself, whose memory stays bounded. The Triton implementations do the same in
Python, see _triton/_library.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import reference
from .schemas import _library


def _min_goal(goals: Sequence[Tensor], params: Tensor | None, curves: Sequence[int], reduction: int) -> Tensor:
    return reference.min_goal(goals, params, curves, reduction, False)[0]


def _goal_set(*given: Any) -> Tensor:
    return reference.goal_set(*given)[0]


_REFERENCES = {
    "min_goal_reference(Tensor[] goals, Tensor? params, int[] curves, int reduction) -> Tensor": _min_goal,
    "goal_set_reference(Tensor[] goals, Tensor params, int[] curves, int[] groups, Tensor temperature, int reduction, "
    "Tensor? multipliers) -> Tensor": _goal_set,
    "total_correlation_gradients_reference(Tensor grad, Tensor z, Tensor mu, Tensor logvar, int? dataset_size, "
    "bool stratified, int? first) -> (Tensor, Tensor, Tensor)": reference.total_correlation_gradients,
    "gaussian_kl_reference(Tensor mu, Tensor logvar, int block_size, float rho) -> Tensor": reference.gaussian_kl,
    "consistency_variance_reference(Tensor[] views, float correction) -> Tensor": reference.consistency_variance,
    "active_units_reference(Tensor mu, float threshold, float temperature) -> (Tensor, Tensor)": reference.active_units,
    "latent_statistics_reference(Tensor z, Tensor mu, Tensor logvar, float threshold, float temperature) -> "
    f"({', '.join(['Tensor'] * 9)})": reference.latent_statistics,
    "covariance_penalty_reference(Tensor z, bool normalize, bool per_sample) -> Tensor": reference.covariance_penalty,
}
for signature, function in _REFERENCES.items():
    _library.define(signature)
    _library.impl(signature.split("(")[0], function, "CompositeImplicitAutograd")
