"""The part of the study's page about the variance of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.budget.draws import METHODS
from bench.policies.report import NAMES

LITTLE = 0.1  # part of the variance over batches that a budget may add
SAYS = {
    "nested": "as bomkern draws: every goal takes the first rows of one permutation",
    "apart": "every goal draws rows of its own",
    "code whole": "goals of the latent code alone take all rows, which are there anyway",
    "by deficit": "chances half even, half in proportion to the deficit, weights by the inverse; needs all deficits",
    "by norm": "chances in proportion to each row's gradient norm: the best that chances can do, and unknowable",
    "allocated": "rows shared out by weight times the spread of a goal's gradient, unknowable too, in place of weight",
    "calibrated": "control variate: weights corrected so that the mean deficit is that of all rows; needs these",
    "2 visits": "each row once before any again, over 2 steps with the same samples and weights",
    "4 visits": "the same over 4 steps",
}
HOW = """\
`python -m bench.budget --variance`: a model is trained by exact spill ({steps}). Then, with its weights fixed, the
gradient of every row of every goal is computed, and rows are drawn many times. Figures are the variance of the gradient
of all parameters, as a part of the squared norm of the expected gradient. *Batches* is the variance of the exact rule
from batch to batch: the noise that training has anyway. It adds up with that of the rows. Columns besides *nested* are
other ways to draw, as multiples of *nested*, at the same number of rows:
"""
VISITS = """\
The visits are a bound. Two steps of one epoch have different samples, whose rows are independent, so that seeing each
row once before any again changes nothing within an epoch. From one epoch to the next the weights have moved, and views
and noise are drawn anew."""


def section(measured: Mapping[str, Any], picture: str) -> list[str]:
    """Return the paragraphs and tables."""
    steps = ", ".join(f"{NAMES[data].lower()} {found['steps']} steps" for data, found in measured.items())
    page = ["## The variance of the gradient", HOW.format(steps=steps)]
    page += ["\n".join(f"- *{name}*: {says}" for name, says in SAYS.items()), VISITS]
    page += [f"![variance by drawn rows over that by batches, against the budget]({picture})"]
    for data, found in measured.items():
        page += [f"### {NAMES[data]}", f"Worst goal first: {', '.join(found['goals'])}.", _table(found)]
        page += [*_advice(found)]
    return page


def _table(found: Mapping[str, Any]) -> str:
    others = [name for name in METHODS if name != "nested"]
    heads = ["ratio", "budget", "goal rows", "batches", "nested", "nested / batches", *others]
    lines = [heads, ["---"] * len(heads)]
    for ratio, at in found["ratios"].items():
        for budget, figures in at["budgets"].items():
            own = figures["nested"]
            line = [ratio, budget, f"{figures['rows']:.0%}", f"{at['batches']:.2f}", f"{own:.3g}"]
            line += [f"{own / at['batches']:.1%}", *(f"{figures[name] / own:.2f}x" if own else "" for name in others)]
            lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _advice(found: Mapping[str, Any]) -> list[str]:
    """Return which budget adds little noise for each ratio."""
    parts = []
    for ratio, at in found["ratios"].items():
        small = [b for b, figures in at["budgets"].items() if figures["nested"] <= LITTLE * at["batches"]]
        parts.append(f"{small[0]} for ratio {ratio}" if small else f"none for ratio {ratio}")
    return [f"Smallest budget here that adds at most {LITTLE:.0%} to the variance over batches: {', '.join(parts)}."]
