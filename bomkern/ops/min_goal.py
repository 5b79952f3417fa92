"""`min_goal_loss`: the bottleneck rule as one fused call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..common.checks import check_goals
from ..common.graph_constants import keep_for_graph
from ..common.reductions import REDUCTIONS
from ..common.torch_internals import dispatch_modes
from ..constraints import Constraint, ConstraintTable, check_constraints, pack
from ..dispatch import select
from ..dispatch.routing import bits, check_route, routes, rows_too
from ..lazy_goals.evaluate import Evaluation
from ..lazy_goals.lazy import Lazy


class MinGoalStats(NamedTuple):
    """Statistics of one call of `min_goal_loss`: tensors on the goals' device, without gradient.

    Attributes:
        bottleneck: [B] int64, index of each sample's worst goal.
        share: [K], fraction of the samples in the loss whose bottleneck is that goal. With ``reduction="min"`` only the
            worst sample is in the loss, so share is 1 for the goal that gets the gradient.
        level: [K], mean score over the batch: the water level. An infeasible entry counts as score 0.
        finite: 0-dim bool, whether every sample's loss is finite.
    """

    bottleneck: Tensor
    share: Tensor
    level: Tensor
    finite: Tensor


@overload
def min_goal_loss(
    goals: Tensor | Sequence[Tensor | Lazy],
    constraints: Constraint | Sequence[Constraint] | ConstraintTable | None = None,
    *,
    reduction: str = "mean",
    return_stats: Literal[False] = False,
    impl: str | None = None,
    route: str = "auto",
    materialize: Sequence[int] = (),
) -> Tensor: ...
@overload
def min_goal_loss(
    goals: Tensor | Sequence[Tensor | Lazy],
    constraints: Constraint | Sequence[Constraint] | ConstraintTable | None = None,
    *,
    reduction: str = "mean",
    return_stats: Literal[True],
    impl: str | None = None,
    route: str = "auto",
    materialize: Sequence[int] = (),
) -> tuple[Tensor, MinGoalStats]: ...
@overload
def min_goal_loss(
    goals: Tensor | Sequence[Tensor | Lazy],
    constraints: Constraint | Sequence[Constraint] | ConstraintTable | None = None,
    *,
    reduction: str = "mean",
    return_stats: bool,
    impl: str | None = None,
    route: str = "auto",
    materialize: Sequence[int] = (),
) -> Tensor | tuple[Tensor, MinGoalStats]: ...
def min_goal_loss(
    goals: Tensor | Sequence[Tensor | Lazy],
    constraints: Constraint | Sequence[Constraint] | ConstraintTable | None = None,
    *,
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str | None = None,
    route: str = "auto",
    materialize: Sequence[int] = (),
) -> Tensor | tuple[Tensor, MinGoalStats]:
    """Compute ``-log(min over goals of score)`` per sample; only the worst goal of a sample gets its gradient.

    With the deficit ``d = -log(score)`` of goal k in sample b, ``l_b = max_k d_kb``. The scores themselves are never
    formed, so a raw value 10,000 scales away gives loss 10,000 and the right gradient.

    Args:
        goals: [B, K], or [K] (one sample), or a sequence of K tensors, each [B] or 0-dim (a batch-level goal, used for
            every sample). float16, bfloat16, float32 or float64, in any mixture, any strides; 1 <= K <= 64.
            They are scores in (0, 1] if ``constraints`` is None, raw values otherwise.
        constraints: None, one constraint for all goals, K of them, or a `ConstraintTable`.
        reduction: "mean" (over samples), "sum", "none" ([B]), or "min": the single worst entry of the whole batch,
            ``-log(goals.min())``.
        return_stats: also return `MinGoalStats`, from the same launch.
        impl: "reference", "cpu", "cuda" or "triton"; None selects the best one available on the goals' device.
        route: whether backward skips the graphs of goals without a share in the batch: "auto", "always" or "never",
            see below.
        materialize: indices of goals that always get a gradient, of zeros if they have no share.

    Returns:
        The loss, float32 (float64 if any goal is float64): 0-dim, or [B] for ``reduction="none"``. With
        ``return_stats``, ``(loss, MinGoalStats)``.

    Ties go to the lowest goal index, and for "min" to the lowest sample. A NaN entry is worse than any other: it makes
    the loss NaN and is its sample's bottleneck. A score <= 0, or a raw value whose deficit is not finite, makes the
    loss inf. Such samples get zero gradient, and ``stats.finite`` is False, all without a host sync. A score whose
    reciprocal overflows, below 3e-39 in float32, has an infinite gradient whatever the incoming gradient is.
    Constraint parameters get no gradient.

    **Routing.** A goal that is no sample's bottleneck has gradient zero. With routing its gradient is *undefined*
    instead, and autograd skips its graph (a decode, a feature network, a discriminator). The other gradients are the
    same, bit by bit if all gradients in a sum have one memory layout. A parameter that only skipped graphs reach keeps
    its ``grad``, None or accumulated, as if the goal had not been computed; `torch.autograd.grad` then needs
    ``materialize_grads=True``. An optimizer skips a parameter whose ``grad`` is None. A gradient of zeros would let
    weight decay and momentum move it: use ``route="never"`` if you want that. Routing also avoids NaN from 0 times an
    infinite derivative.

    "auto" routes on the CPU, where it costs nothing. It does not route on a GPU, with several processes, or under
    torch.compile. On a GPU the host must wait for the shares of the forward, and that cost has not been measured yet.
    "always" routes on a GPU too, except while a CUDA graph is captured: the shares go to pinned memory, and backward
    waits for them alone.

    With several processes, "always" is right under DistributedDataParallel, which accepts undefined gradients because
    every rank reaches every parameter's hook. The exception is ``static_graph=True``, which promises that the same
    parameters get gradient in every step: ranks would drift apart. "always" is wrong under FSDP: a rank without a
    gradient for a layer skips its collective, and the others wait for it.

    A `torch.autograd.Function` gets zeros, unless it calls ``set_materialize_grads(False)`` to accept None. A hook on a
    tensor of a skipped graph, or on a parameter that only such graphs reach, is called with None instead of zeros.
    Name in ``materialize`` the goals whose graphs have hooks or other code that cannot take None.

    **Accumulation.** The loss has no state. Over n micro-batches of equal size the gradients of ``loss / n`` add up to
    that of one batch. With ``reduction="min"`` each micro-batch has a worst entry of its own, and a batch-level goal is
    judged within each.

    `lazy` goals go further: only the rows that get gradient are built into their graphs.

    Raises:
        ValueError: an argument has an invalid shape, device, count or value; the message names it.
        TypeError: an argument has the wrong type or dtype; the message names it.
        RuntimeError: ``impl`` is not available here; the message says why. Or a CUDA graph is being captured, and no
            earlier call has copied these constraints to the device.

    Example:
        >>> loss = min_goal_loss([recon, kl], [Minimize(0.1), Upper(30.0, margin=10.0)])
        >>> loss.backward()
    """
    check_route(route)
    evaluation = None
    if isinstance(goals, Tensor):
        tensors = [goals if goals.dim() != 1 else goals.unsqueeze(0)]
        if goals.dim() not in (1, 2):
            fix = "write .flatten(2).mean(2)" if goals.dim() else "pass a 0-dim goal in a list"
            raise ValueError(f"goals must have shape [B, K] or [K], got {list(goals.shape)}: {fix}")
        count = tensors[0].shape[1]
    elif isinstance(goals, (list, tuple)):
        tensors = list(goals)
        count = len(tensors)
        if any(type(goal) is Lazy for goal in goals):
            evaluation = Evaluation(goals)
            tensors = evaluation.tensors(rows_too(route), route == "always")
        if count == 1 and isinstance(tensors[0], Tensor) and tensors[0].dim() == 2:
            check_goals(tensors, ["goals[0]"])  # raises: a matrix of goals is passed without a list
    else:
        raise TypeError(f"goals must be a tensor or a sequence of tensors, got {type(goals).__name__}")
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if count == 0 or not isinstance(tensors[0], Tensor):
        check_goals(tensors)  # raises; the implementation checks everything else
    for k in materialize:
        if k not in range(count):
            raise ValueError(f"materialize must hold indices of goals, 0 to {count - 1}, got {k!r}")
    device = tensors[0].device
    may = bits(range(count), materialize) if routes(route, device) else 0
    serve = select.resolve("min_goal", device.type, impl)
    if constraints is None:
        out = serve(tensors, None, [], code, return_stats, may)
    else:
        params, curves = _packed(constraints, count, tensors, device)
        out = serve(tensors, params, curves, code, return_stats, may)
    loss = out[0] if evaluation is None else evaluation.attach(out[0])
    return (loss, MinGoalStats(*out[-4:])) if return_stats else loss


# Parameters and curves of recent tuples, by identity: a tuple of immutable constraints cannot change, and hashing its
# numbers would take most of the time of a small call.
_recent: dict[tuple[int, torch.device, torch.dtype], tuple[object, tuple[Tensor, list[int]]]] = {}


def _packed(
    constraints: Constraint | Sequence[Constraint] | ConstraintTable,
    count: int,
    tensors: list[Tensor],
    device: torch.device,
) -> tuple[Tensor, list[int]]:
    """Return the constraints' parameters on the goals' device, in the compute dtype, and their curves."""
    if isinstance(constraints, ConstraintTable):
        return constraints.params, constraints.curves
    dtype = torch.float32
    for t in tensors:
        if getattr(t, "dtype", None) is torch.float64:
            dtype = torch.float64
    # Compiled code cannot see a Python table change; a dispatch mode may need a tensor of its own.
    if torch.compiler.is_compiling() or dispatch_modes():
        return pack(_all(constraints, count), device, dtype)
    key = (id(constraints), device, dtype)
    owner, packed = _recent.get(key, (None, None))
    if packed is None or owner is not constraints or len(packed[1]) != count:
        packed = pack(_all(constraints, count), device, dtype)
        if isinstance(constraints, (tuple, Constraint)):
            if len(_recent) >= 64:
                _recent.clear()
            _recent[key] = (constraints, packed)
    keep_for_graph(packed[0])
    return packed


def _all(constraints: Constraint | Sequence[Constraint], count: int) -> tuple[Constraint, ...]:
    """Return K checked constraints."""
    if isinstance(constraints, Constraint):
        return (constraints,) * count
    if not isinstance(constraints, (list, tuple)):
        raise TypeError(
            "constraints must be a constraint, a sequence of them, or a ConstraintTable, "
            f"got {type(constraints).__name__}"
        )
    if len(constraints) != count:
        raise ValueError(f"constraints must be one, or one for each of the {count} goals, got {len(constraints)}")
    check_constraints(constraints)
    return tuple(constraints)
