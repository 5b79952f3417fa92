"""The two-minute subset for `bench.compare`: each op and eager PyTorch in turn, so that a busy neighbour meets both.

A turn is some milliseconds of calls, after one that is not timed: right after eager, whose temporaries fill the caches,
a call of ours takes up to three times as long, by chance.
``pair`` in ``extra_info`` is the median of eager's time over bomkern's, turn by turn.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from bench import machine
from bench.bench_active_units import CASE as ACTIVE
from bench.bench_consistency_variance import CASE as CONSISTENCY
from bench.bench_covariance_penalty import BY_SAMPLE as COVARIANCE
from bench.bench_gaussian_kl import CASE as KL
from bench.bench_goal_set import CASES as GOAL_SET
from bench.bench_latent_statistics import CASE as LATENT
from bench.bench_min_goal import CASES as MIN_GOAL
from bench.bench_total_correlation import CASE as TOTAL_CORRELATION
from bench.harness import OURS, Case, Size, about, check, inputs, least, once, peer, planned, repeat

SECONDS = 5.0  # of pairs, for each case
PAIRS = 20, 500  # at least, at most
CASES: list[tuple[Case, Size]] = [
    (MIN_GOAL["all six constraints"], {"K": 9, "B": 64}),
    (MIN_GOAL["all six constraints"], {"K": 9, "B": 8192}),
    (GOAL_SET["spill"], {"K": 9, "B": 512}),
    (TOTAL_CORRELATION, {"B": 256, "D": 128}),
    *((case, {"B": 4096, "D": 128}) for case in (KL, CONSISTENCY, ACTIVE, LATENT, COVARIANCE)),
]


@pytest.mark.parametrize(("case", "size"), CASES, ids=[f"{case.name}-B{size['B']}" for case, size in CASES])
def test_pairs(benchmark: Any, case: Case, size: Size) -> None:
    key = tuple(size.items())
    functions = {name: peer(case, name, key) for name in (OURS, "eager")}
    for function in functions.values():
        check(case, function, key, backward=True)
    ours, eager = (once(case, function, inputs(case, key), backward=True) for function in functions.values())
    call = [least([step]) for step in (ours, eager)]
    our_calls, eager_calls = (planned(seconds)[0] for seconds in call)
    beside: list[float] = []

    def turn_of_eager() -> None:
        eager()
        beside.append(machine.seconds(lambda: repeat([eager], eager_calls)) / eager_calls)
        ours()

    about(benchmark, case.op, case.name, "forward+backward in pairs", OURS, size)
    rounds = min(PAIRS[1], max(PAIRS[0], int(SECONDS / (call[0] * our_calls + call[1] * eager_calls))))
    benchmark.pedantic(ours, teardown=turn_of_eager, rounds=rounds, iterations=our_calls, warmup_rounds=1)
    if benchmark.stats:  # none with --benchmark-disable
        both = zip(beside[1 : rounds + 1], benchmark.stats.stats.data, strict=True)
        benchmark.extra_info["pair"] = statistics.median(theirs / own for theirs, own in both)
