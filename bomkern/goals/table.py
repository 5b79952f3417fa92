"""The table that a `bomkern.GoalSet` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..constraints import text_of
from .policies import Anchored, Fixed, Policy, _shown

if TYPE_CHECKING:
    from .goal_set import GoalSet

FORMATS = {"rows": ".4g"}
WINDOW = 100  # steps whose shares and levels are shown


def table(goals: GoalSet) -> str:
    """Return a table with a row per column: constraint, anchors, and share and level over the last `WINDOW` steps.

    With a budget of rows it also has the mean number of samples that a step's level rests on.
    All numbers are those in force. On the meta device there are none.
    """
    parts = ("share", "level") if goals.row_budget is None else ("share", "level", "rows")
    rows: list[tuple[str, ...]] = [("goal", "constraint", "ideal", "scale", *parts), *_rows(goals, parts)]
    if goals.watched is not None:
        rows += [(*cells[:4], "watched", *cells[5:]) for cells in _rows(goals.watched, parts)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    mu = "on meta" if goals.params.is_meta else f"{float(goals.temperature):g}"
    rule = f"spill={goals.spill.name}" if goals.spill else f"temperature={mu}"
    options = f"reduction={goals.reduction}, {rule}"
    lines = [f"GoalSet({options}{f', {goals.guard}' * bool(goals.guard)}), {goals.steps} steps"]
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _rows(goals: GoalSet, parts: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the cells of each column, the last of them means of these parts of the history."""
    history, on_meta, rows = goals.history, goals.params.is_meta, []
    anchors = {} if on_meta else goals.anchors()
    params = [] if on_meta else goals.params.tolist()
    seen = {part: goals.monitor.last_mean(part, WINDOW).tolist() if len(history) else [] for part in parts}
    described = zip(goals.policies.items(), goals.owner, goals.layout.constraints, strict=True)
    for k, ((column, policy), owner, info) in enumerate(described):
        text, both = str(info), ["on meta"] * 2
        if column in goals.anchoring.waiting:
            both = ["unknown"] * 2
        elif not on_meta:
            ideal, scale = anchors[column]
            text, both = _in_force(policy, text, params[k], ideal, scale), [f"{ideal:.4g}", f"{scale:.4g}"]
        at = {"rows": k}  # other parts have a number for each goal
        numbers = [f"{seen[p][at.get(p, owner)]:{FORMATS.get(p, '.3f')}}" if seen[p] else "" for p in parts]
        rows.append((column, text, *both, *numbers))
    return rows


def _in_force(policy: Policy, text: str, ramp: Sequence[float], ideal: float, scale: float) -> str:
    """Return the text of a constraint or policy with the numbers in force in place of those that the code gave."""
    if isinstance(policy, Anchored) and ramp[1] == ramp[2]:
        now = {"ideal": ideal, "nadir": ideal + (scale if ramp[1] > 0 else -scale)}
        shown = {name: now.get(name, x) if isinstance(x, float) else x for name, x in policy._arguments.items()}
        return f"{type(policy).__name__}({', '.join(f'{name}={_shown(x)}' for name, x in shown.items())})"
    return text_of(policy.constraint, ramp) if isinstance(policy, (Anchored, Fixed)) else text
