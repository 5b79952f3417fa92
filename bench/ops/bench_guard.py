"""The three-minute subset for `bench.compare`: each op and eager PyTorch in turn, so that a busy neighbour meets both.

Each case is checked, and timed for a moment, in every regime (`bench.regimes`). Pairs are of the worst one of single
precision, where eager's time over bomkern's is least, and of half precision, where eager has half the bytes to move. A
turn is some milliseconds of calls, after one that is not timed: right after eager, whose temporaries fill the caches, a
call of ours takes up to three times as long, by chance. In ``extra_info``:

- ``pair``: the median of eager's time over bomkern's, turn by turn, and ``worst``, the regime.
- ``spread``: bomkern's slowest regime of single precision, ``slowest``, over its fastest, by the best of some rounds in
  turn.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from bench import machine
from bench.cases import OPS, find
from bench.harness import OURS, Case, Size, Wrong, about, check, inputs, once, peer
from bench.regimes import HALF
from bench.report.worst import EAGER, as_info
from bench.rounds import least, looked_at, planned, repeat

SECONDS = 3.0  # of pairs, for each case
PAIRS = 12, 500  # at least, at most
CASES: list[tuple[Case, Size]] = [
    (find(op, label), size) for op, benches in OPS.items() for label, size in benches.guarded
]


IDS = [f"{case.name}-B{size['B']}" for case, size in CASES]
Steps = dict[str, machine.Step]  # by peer


def steps(case: Case, size: Size, regime: str) -> Steps:
    """Calls of ours and of eager, forward and backward; eager's where its result is right."""
    key = tuple(size.items())
    found: Steps = {}
    for name in (OURS, EAGER):
        function = peer(case, name, key, regime)
        try:
            check(case, function, key, True, regime, name)
        except Wrong:
            if name == OURS or regime == case.usual:
                raise
        else:
            found[name] = once(case, function, inputs(case, key, regime), backward=True)
    return found


def pairs(benchmark: Any, calls: Steps) -> None:
    """Time ours and eager in turn."""
    ours, eager = calls[OURS], calls[EAGER]
    call = [least([step]) for step in (ours, eager)]
    our_calls, eager_calls = (planned(seconds)[0] for seconds in call)
    beside: list[float] = []

    def turn_of_eager() -> None:
        eager()
        beside.append(machine.seconds(lambda: repeat([eager], eager_calls)) / eager_calls)
        ours()

    rounds = min(PAIRS[1], max(PAIRS[0], int(SECONDS / (call[0] * our_calls + call[1] * eager_calls))))
    benchmark.pedantic(ours, teardown=turn_of_eager, rounds=rounds, iterations=our_calls, warmup_rounds=1)
    if benchmark.stats:  # none with --benchmark-disable
        both = zip(beside[1 : rounds + 1], benchmark.stats.stats.data, strict=True)
        benchmark.extra_info["pair"] = statistics.median(theirs / own for theirs, own in both)


@pytest.mark.parametrize(("case", "size"), CASES, ids=IDS)
def test_pairs(benchmark: Any, case: Case, size: Size) -> None:
    found = {regime: steps(case, size, regime) for regime in (case.usual, *case.regimes)}
    times = looked_at({regime: calls[OURS] for regime, calls in found.items()})
    single = {regime: calls[EAGER] for regime, calls in found.items() if EAGER in calls and regime != HALF}
    worst = min(single, key=lambda regime: least([single[regime]]) / times[regime])
    about(benchmark, case.op, case.name, "forward+backward in pairs", OURS, size)
    benchmark.extra_info.update(worst=worst, **as_info(times))
    pairs(benchmark, found[worst])


@pytest.mark.parametrize(("case", "size"), CASES, ids=IDS)
def test_pairs_of_halves(benchmark: Any, case: Case, size: Size) -> None:
    calls = steps(case, size, HALF)
    if EAGER not in calls:
        pytest.skip("eager is wrong in half precision")
    about(benchmark, case.op, case.name, "forward+backward in pairs, half precision", OURS, size)
    pairs(benchmark, calls)
