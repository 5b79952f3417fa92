"""One step of a `bomkern.GoalSet`: from raw values to the loss, and what the step leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.reductions import REDUCTIONS
from ..common.torch_internals import buffers_of, children_of
from ..dispatch import select
from ..dispatch.routing import routes, rows_too
from ..lazy_goals.evaluate import Evaluation
from ..lazy_goals.lazy import Lazy
from .branches import watch_backward
from .history import GoalOutput
from .looks import Seen, is_due, record_of_look
from .micro_batches import MicroBatches
from .presence import Masks, Present
from .raw_values import Raw
from .record import share_record
from .rule_state import RuleState, learning_is_enabled
from .watched import step as watch

if TYPE_CHECKING:
    from .goal_set import GoalSet


def take_step(goals: GoalSet, raw: Raw, mask: Masks | None) -> GoalOutput:
    """Take the step of a call, see `GoalSet.forward`."""
    watched = None
    if goals.watched is not None:
        raw, mask, watched = watch(goals.watched, raw, mask, goals.alone is None)
    tensors, absent = goals._raw.columns(raw)
    if goals.training and goals.alone is None:
        children_of(goals)["monitor"].check_graphs(tensors)
    if goals.anchoring.waiting and goals.alone is None:
        goals.anchoring.refuse()
    rules: RuleState | MicroBatches = goals.rules if goals.part is None else goals.part
    buffers, evaluation = buffers_of(goals), None
    learns = goals.training and learning_is_enabled()
    if learns:
        rules.changed.clear()  # the previous step can no longer be taken back
    budget = goals.row_budget if learns and goals.alone is None else None
    if any(type(value) is Lazy for value in tensors):
        evaluation = Evaluation(tensors)
        if budget is None:
            tensors = evaluation.tensors(rows_too(goals.route), goals.route == "always")
    present: Present | None = None
    seen: Seen | None = None
    if budget is not None:
        monitor = children_of(goals)["monitor"]
        look: bool | Tensor = False
        place = buffers_of(monitor)["place"]
        if budget.look is not None and not (goals.part and goals.part.complete):  # a repeated call leaves no record
            look = is_due(budget.look, monitor)
        tensors, present, seen = budget.of(tensors, absent, mask, evaluation, buffers, place, look)
    elif absent or mask is not None or goals.presence.needed(tensors):
        tensors, present = goals.presence.of(tensors, mask, buffers["params"].device)
    try:
        if learns:
            values, there = seen or (tensors, present)
            rules.learn(buffers, values, children_of(goals)["monitor"], there)
        loss, bottleneck, record = _shared(goals, tensors, buffers, present)
        ranks, rows = goals._ranks, _rows(goals, bottleneck, present)
        if seen is not None:
            with torch.no_grad():
                _, _, whole = _shared(goals, seen.values, buffers, seen.present)
            record, finite = record_of_look(record, whole, goals.layout.at)
            rows = torch.where(finite, _rows(goals, bottleneck, seen.present), rows)
        if goals.alone is not None:
            own = tensors[goals.alone].to(record.dtype)
            own = own.mean() if present is None else present.mean(goals.alone, own)
            if goals.layout.constraints[goals.alone].direction < 0:
                own = -own
            part = 1.0 if present is None else float(ranks.size)  # masked, it is a part of the whole batch's mean
            loss = ranks.shared(own, ranks.gather(own.detach()).mean() * part, part) if ranks.size > 1 else own
        if present is not None:
            loss = present.with_graph(loss, goals.alone)
        if evaluation is not None:
            loss = evaluation.attach(loss)
    except Exception:
        if learns:
            rules.restore()
        goals._raw.explain(tensors, goals.params.device)
        raise
    if goals._watching:
        record.narrow(0, goals.layout.at.share, len(goals.names)).zero_()
    if goals.branches is not None and goals.training and not torch.compiler.is_compiling():
        graphs = tensors if evaluation is None else evaluation.graphs()
        watch_backward(goals.branches, [goals.names[g] for g in goals.owner], graphs)
    if learns:
        record, rows = rules.keep(
            buffers, children_of(goals)["monitor"], record, rows, present if seen is None else seen.present
        )
        if budget is not None and evaluation is not None:
            budget.send(buffers["multipliers"])
    walked = None if evaluation is None else evaluation.walked
    return GoalOutput(loss, bottleneck, record, goals.layout, walked, watched, rows)


def _shared(
    goals: GoalSet, tensors: list[Tensor], buffers: dict[str, Tensor], present: Present | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op, and merge loss and record with those of the other ranks."""
    loss, bottleneck, record = _serve(goals, tensors, buffers, present)
    ranks = goals._ranks
    if ranks.size > 1:
        ranks.check_shape("raw", bottleneck)
        code, sizes = REDUCTIONS[goals.reduction], (len(goals.names), len(goals.policies))
        samples = None if present is None else present.samples
        loss, record = share_record(loss, record, *sizes, code, ranks, samples)
    return loss, bottleneck, record


def _rows(goals: GoalSet, bottleneck: Tensor, present: Present | None) -> Tensor | int:
    """Return the number of samples that a record rests on, over all ranks: [K], or one for all columns."""
    # Not len(), which would make the batch a constant of an exported program.
    return bottleneck.shape[0] * goals._ranks.size if present is None else present.of_columns


def _serve(
    goals: GoalSet, tensors: list[Tensor], buffers: dict[str, Tensor], present: Present | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op, in float64 if any raw value is float64."""
    params, temperature = buffers["params"], buffers["temperature"]
    multipliers = buffers["multipliers"] if goals.spill else None
    dtype = torch.float32
    for t in tensors:
        if t.dtype is torch.float64:
            dtype = t.dtype
    if params.dtype is not dtype:
        params, temperature = params.to(dtype), temperature.to(dtype)
        multipliers = None if multipliers is None else multipliers.to(dtype)
    device = params.device
    serve: Callable[..., tuple[Tensor, Tensor, Tensor]] = select.resolve("goal_set", device.type, goals.impl)
    route = goals._may if routes(goals.route, device) else 0
    code = REDUCTIONS[goals.reduction]
    if present is None:
        return serve(tensors, params, goals.curves, goals.owner, temperature, code, multipliers, route=route)
    if multipliers is not None:
        multipliers = present.weights(multipliers)
    masks = {"present": present.mask, "counts": present.counts.to(dtype)}
    return serve(tensors, params, goals.curves, goals.owner, temperature, code, multipliers, route=route, **masks)
