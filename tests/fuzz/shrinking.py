"""Make a failing case smaller while it still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.cases import Case
from tests.fuzz.ops import Op


def shrink(op: Op, case: Case, fails: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    """Return the smallest failing case found within ``seconds``."""
    until = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for smaller in candidates(op, case):
            if time.monotonic() > until:
                return case
            if smaller != case and fails(smaller):
                case, found = smaller, True
                break
    return case


def candidates(op: Op, case: Case) -> Iterator[Case]:
    """Yield simpler cases, the largest reductions first."""
    yield from op.smaller(case)
    for name, value in case.sizes.items():
        for fewer in dict.fromkeys([1, 2, value // 2, value - 1]):
            if 0 < fewer < value:
                yield replace(case, sizes={**case.sizes, name: fewer})
    yield replace(case, threads=1)
    yield replace(case, pull="ramp")
    for simple in ({"layout": "plain"}, {"values": "plain"}, {"dtype": "float32"}, {"grad": False}):
        for k, g in enumerate(case.given):
            yield replace(case, given=(*case.given[:k], replace(g, **simple), *case.given[k + 1 :]))
    for name in case.options:
        if name not in op.alike:
            yield replace(case, options={k: v for k, v in case.options.items() if k != name})
