"""The part of the study's page about the owners of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.policies.report import NAMES

CLOSE = 0.1  # an owner is worth trusting if the expected gradient is off by at most this part of its norm
EPOCH = "epoch"
HOW = """\
Under the hard minimum a sample's gradient goes to its worst goal, its *owner*. To find the owners, all rows of all
goals are evaluated without a graph. An owner that is known from before would save that.
`python -m bench.budget --owners` trains with the hard minimum, and measures how often an old owner is still the owner.
Batches are noted at some points of a run, and looked at again after k steps on other batches. *New noise* draws the
views and the noise of the code anew, as a run does when a sample comes again; k = 0 shows what noise alone changes.

{runs}

The gradient of the old owners, at the weights and noise of now, is compared with that of the hard minimum. For *one
batch*, norm and cosine compare the gradients of the same samples. For *expected*, they compare the gradients' means
over batches, which tell the bias; *off* is the norm of their difference as a part of the true one's, with the lowest
and highest seed. *off² / variance* is the square of this difference over the variance of the true gradient from batch
to batch. *Loss missed* is the part of the loss that the old owners do not see."""
RUN = "- {data}: {steps} steps of B = {batch}, {seeds} seeds, {batches} batches at each of {points} points"
NEW = """\
Each step draws new crops, so no sample comes twice and there is no last epoch. Only the same batches can be looked at
again, and the best guess without them is the owner most common in the step before."""


class Bias(NamedTuple):
    """How the gradient of old owners differs from the true one: norm - 1, cosine, difference, over the variance."""

    norm: float
    cosine: float
    off: float
    noise: float


def bias(products: Sequence[float]) -> Bias:
    """Return the figures of inner products: true with itself, old with itself, both.

    True gradients of single batches have a mean square of 1. Products are estimates, so they may not be positive; what
    has no value then is NaN.
    """
    true, old, both = products
    if true <= 0 or old <= 0:
        return Bias(*[math.nan] * 4)
    square = max(0.0, true + old - 2 * both)
    noise = square / (1 - true) if true < 1 else math.nan
    return Bias(math.sqrt(old / true) - 1, both / math.sqrt(true * old), math.sqrt(square / true), noise)


def section(owned: Mapping[str, Any]) -> list[str]:
    """Return the paragraphs and tables."""
    runs = "\n".join(RUN.format(**{**f, "data": NAMES[data].lower()}) for data, f in owned.items())
    page = ["## Does an old owner predict?", HOW.format(runs=runs)]
    for data, f in owned.items():
        page += [f"### {NAMES[data]}: owners", *([NEW] if EPOCH not in f["stale"] else [])]
        page += [_visits(f["visits"]), _ages(f["ages"]), _stale(f["stale"]), _verdict(f)]
    return page


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines))


def _part(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.0%}"


def _visits(visits: Mapping[str, Any]) -> str:
    names = {
        "last": f"the owner when the sample was last drawn, {np.mean(visits.get('age', 0)):.0f} steps ago on average",
        "common": "the owner most common in the step before, for all samples",
        "chance": "chance: two draws by the owners' frequencies",
    }
    lines = [[text, *map(_part, visits[name])] for name, text in names.items() if name in visits]
    return _table(["samples whose owner is predicted by", "first third", "second third", "last third"], lines)


def _ages(ages: Mapping[str, Any]) -> str:
    heads = ["same batch after k steps, the same owner", *(f"k = {age}" for age in ages)]
    lines = []
    for name, text in (("same", "same noise"), ("fresh", "new noise")):
        for third, part in enumerate(("first", "second", "last")):
            lines.append([f"{text}, {part} third", *(_part(f[name][third]) for f in ages.values())])
    return _table(heads, lines)


def _pooled(seeds: Sequence[Mapping[str, Sequence[float]]], name: str) -> list[float]:
    return [float(x) for x in np.mean([seed[name] for seed in seeds], axis=0)]


def _stale(stale: Mapping[str, Any]) -> str:
    heads = ["age of the owner", "one batch: norm", "cosine", "expected: norm", "cosine", "off", "off² / variance"]
    lines = []
    for age, seeds in sorted(stale.items(), key=lambda item: item[0] == EPOCH):
        one, all_ = bias(_pooled(seeds, "one")), bias(_pooled(seeds, "expected"))
        each = [bias(seed["expected"]).off for seed in seeds]
        steps = f"{age} step{'s' * (age != '1')}, the same batch"
        line = ["last time the sample was drawn" if age == EPOCH else steps]
        line += [f"{one.norm:+.1%}", f"{one.cosine:.3f}", f"{all_.norm:+.1%}", f"{all_.cosine:.3f}"]
        line += [f"{all_.off:.0%} ({min(each):.0%}, {max(each):.0%})", f"{all_.noise:.1%}"]
        lines.append([*line, f"{_pooled(seeds, 'gap')[0]:.1%}"])
    return _table([*heads, "loss missed"], lines)


def _verdict(found: Mapping[str, Any]) -> str:
    """Return in two sentences whether old owners are worth trusting: those of the last epoch, or the oldest."""
    stale = found["stale"]
    age = EPOCH if EPOCH in stale else max(stale, key=int)
    off = bias(_pooled(stale[age], "expected")).off
    name = "of the last time that a sample was drawn" if age == EPOCH else f"that is {age} steps old"
    kept = np.mean([x for x in found["visits"]["last"] if not math.isnan(x)] if age == EPOCH else
                   [x for x in found["ages"][age]["same"] if x is not None])  # fmt: skip
    about = f"an owner {name} is still right for {kept:.0%} of the samples, and the expected gradient is off"
    about = (
        f"A stale owner is a biased rule: {about} by {off:.0%} of its norm, which no number of samples averages out."
    )
    if off <= CLOSE:
        return f"{about} That is at most {CLOSE:.0%}, so it may be worth using where looking at all rows is dear."
    return (
        f"{about} That is above {CLOSE:.0%}, and a goal that gets worse on samples of others would go unseen, so it is "
        "not worth using."
    )
