"""The table that a `bomkern.GoalSet` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .goal_set import GoalSet

WINDOW = 100  # steps whose shares and levels are shown


def table(goals: GoalSet) -> str:
    """Return a table with a row per column: constraint, anchors, and share and level over the last `WINDOW` steps."""
    rows: list[tuple[str, ...]] = [("goal", "constraint", "ideal", "scale", "share", "level"), *_rows(goals)]
    if goals.watched is not None:
        rows += [(*cells[:4], "watched", *cells[5:]) for cells in _rows(goals.watched)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rule = f"spill={goals.spill.ratio:g}" if goals.spill else f"temperature={float(goals.temperature):g}"
    options = f"reduction={goals.reduction}, {rule}"
    lines = [f"GoalSet({options}{f', {goals.guard}' * bool(goals.guard)}), {goals.steps} steps"]
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _rows(goals: GoalSet) -> list[tuple[str, ...]]:
    """Return the cells of each column."""
    history, anchors, rows = goals.history, goals.anchors(), []
    seen = {part: goals.monitor.last_mean(part, WINDOW).tolist() if len(history) else [] for part in ("share", "level")}
    for column, owner, constraint in zip(goals.policies, goals.owner, goals.layout.constraints, strict=True):
        ideal, scale = anchors[column]
        numbers = [f"{seen[part][owner]:.3f}" if seen[part] else "" for part in ("share", "level")]
        rows.append((column, str(constraint), f"{ideal:.4g}", f"{scale:.4g}", *numbers))
    return rows
