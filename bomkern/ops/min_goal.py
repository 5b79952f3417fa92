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
    """What happened in one call of `min_goal_loss`; every field is a tensor on the goals' device, none has a gradient.

    Attributes:
        bottleneck: [B] int64, the index of each sample's worst goal.
        share: [K], the fraction of the samples taken into the loss whose bottleneck is that goal. With
            ``reduction="min"`` one sample is taken, the worst, so share is 1 for the goal that gets the gradient.
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
    """``-log(min over goals of score)`` per sample, and its gradient to the worst goal alone.

    With the deficit ``d = -log(score)`` of goal k in sample b, ``l_b = max_k d_kb``; the scores themselves are never
    formed, so a raw value 10,000 scales away gives loss 10,000 and the right gradient.

    Args:
        goals: [B, K], or [K] (one sample), or a sequence of K tensors, each [B] or 0-dim (a batch-level goal, used for
            every sample). float16, bfloat16, float32 or float64, mixed as you like, any strides; 1 <= K <= 64.
            Scores in (0, 1] where ``constraints`` is None, raw values otherwise.
        constraints: None, one constraint for all goals, K of them, or a `ConstraintTable`.
        reduction: "mean" (over samples), "sum", "none" ([B]), or "min": the one worst entry of the whole batch, which
            is ``-log(goals.min())``.
        return_stats: also return `MinGoalStats`, from the same launch.
        impl: "reference", "cpu", "cuda" or "triton"; None takes the best that serves the goals' device.
        route: whether backward passes by the graphs of goals without a share in the batch: "auto", "always" or "never",
            see below.
        materialize: indices of goals that get a gradient of zeros all the same.

    Returns:
        The loss, float32 (float64 if any goal is float64): 0-dim, or [B] for ``reduction="none"``. With
        ``return_stats``, ``(loss, MinGoalStats)``.

    Ties go to the lowest goal index, and for "min" to the lowest sample. A NaN entry is the worst there is: it makes
    the loss NaN and is its sample's bottleneck. A score <= 0, or a raw value whose deficit is not finite, makes the
    loss inf. Such samples get zero gradient, and ``stats.finite`` is False; no host sync is made to tell. A
    score of which 1 / score overflows, in float32 one below 3e-39, has an infinite gradient whatever comes from above.
    Constraint parameters get no gradient.

    **Routing.** A goal that is no sample's bottleneck has gradient zero. Routed, its gradient is *undefined* instead,
    and autograd does not walk its graph (a decode, a feature network, a discriminator): the other gradients are the
    same, to the bit where those that meet in a sum have one memory layout. What only such graphs reach keeps ``grad``
    None, or what it had accumulated, exactly as if the goal had not been computed (and `torch.autograd.grad` wants
    ``materialize_grads=True``): an optimizer then skips that parameter, where a gradient of zeros would have let its
    weight decay and its momentum move it. ``route="never"`` is for who wants that. Also: 0 times an infinite derivative
    would be NaN, and is not computed.

    "auto" routes on the CPU, where it costs nothing; not on a GPU (the host must wait for the forward to know the
    shares, and what that costs has not been measured yet), not with several processes, never under torch.compile.
    "always" routes on a GPU too, though not while a CUDA graph is captured: the shares go to pinned memory and backward
    waits for them alone. With several processes: DistributedDataParallel takes undefined gradients in its stride (every
    rank reaches every parameter's hook), so "always" is right there, unless ``static_graph=True`` has promised it that
    the same parameters get gradient in every step (ranks would drift apart); under FSDP a rank that has no gradient for
    a layer leaves its collective out and the others wait for it, so it is wrong there. A `torch.autograd.Function` is
    handed zeros, unless it calls ``set_materialize_grads(False)`` and so says that it takes None. A hook on a tensor of
    such a graph, or on a parameter that only it reaches, is called with None where it would have got zeros:
    ``materialize`` names goals whose graphs have hooks, or something else, that cannot take that.

    `lazy` goals go further: of their graphs only the rows are built that get gradient.

    Raises:
        ValueError: a shape, device, count or name that cannot serve, named in the message.
        TypeError: an argument of the wrong type or dtype, named in the message.
        RuntimeError: ``impl`` cannot serve here; the message says why. Or a CUDA graph is being captured, and no call
            before has brought these constraints to the device.

    Example:
        >>> loss = min_goal_loss([recon, kl], [Minimize(0.1), Upper(30.0, margin=10.0)])
        >>> loss.backward()
    """
    check_route(route)
    evaluation = None
    if isinstance(goals, Tensor):
        tensors = [goals if goals.dim() != 1 else goals.unsqueeze(0)]
        if goals.dim() not in (1, 2):
            raise ValueError(f"goals must have shape [B, K] or [K], got {list(goals.shape)}")
        count = tensors[0].shape[1]
    elif isinstance(goals, (list, tuple)):
        tensors = list(goals)
        count = len(tensors)
        if any(type(goal) is Lazy for goal in goals):
            evaluation = Evaluation(goals)
            tensors = evaluation.tensors(rows_too(route), route == "always")
        if count == 1 and isinstance(tensors[0], Tensor) and tensors[0].dim() == 2:
            raise ValueError(f"goals[0] must have shape [B] or [], got {list(tensors[0].shape)}")
    else:
        raise TypeError(f"goals must be a tensor or a sequence of tensors, got {type(goals).__name__}")
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if count == 0 or not isinstance(tensors[0], Tensor):
        check_goals(tensors)  # raises; all else is checked by the implementation
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


# The parameters and curves of the tuples seen last, by identity: a tuple of immutable constraints cannot change, and
# hashing its numbers is what a small call would otherwise spend its time on.
_recent: dict[tuple[int, torch.device, torch.dtype], tuple[object, tuple[Tensor, list[int]]]] = {}


def _packed(
    constraints: Constraint | Sequence[Constraint] | ConstraintTable,
    count: int,
    tensors: list[Tensor],
    device: torch.device,
) -> tuple[Tensor, list[int]]:
    """The constraints' parameters on the goals' device, in the dtype they are computed in, and their curves."""
    if isinstance(constraints, ConstraintTable):
        return constraints.params, constraints.curves
    dtype = torch.float32
    for t in tensors:
        if getattr(t, "dtype", None) is torch.float64:
            dtype = torch.float64
    # Compiled code sees no table of Python's change; a dispatch mode may want a tensor of its own.
    if torch.compiler.is_compiling() or dispatch_modes():
        return pack(_all(constraints, count), device, dtype)
    key = (id(constraints), device, dtype)
    held, found = _recent.get(key, (None, None))
    if found is None or held is not constraints or len(found[1]) != count:
        found = pack(_all(constraints, count), device, dtype)
        if isinstance(constraints, (tuple, Constraint)):
            if len(_recent) >= 64:
                _recent.clear()
            _recent[key] = (constraints, found)
    keep_for_graph(found[0])
    return found


def _all(constraints: Constraint | Sequence[Constraint], count: int) -> tuple[Constraint, ...]:
    """K constraints, checked."""
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
