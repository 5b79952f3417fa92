"""Predicted times of our CUDA kernels on an H200, written down before they ran on one: floors, and predictions.

python -m bench.predictions          # writes bench/results/predictions.json
python -m bench.predictions --check  # exit status 1 where the file says something else than this module

Nothing here was measured, and no GPU was at hand. A *floor* is a count: launches, and the work that the bench itself
counts (`Case.work`) at the rate of the device below. What stays in the L2 cache can pass it, and so would a product on
the tensor cores. A *prediction* adds what the kernels' machine code and launch plans say. Once there are results of
that GPU, the report prints both beside them (report/page.py): a prediction that misses by more than 1.5x is a finding.

Backward includes the bench's own loss, so that it is what forward and backward together take less forward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.cases import OPS, find
from bench.harness import BACKWARD, BOTH, FORWARD, Case, traffic
from bench.ops import (
    bench_active_units,
    bench_consistency_variance,
    bench_covariance_penalty,
    bench_gaussian_kl,
    bench_goal_set,
    bench_latent_statistics,
    bench_min_goal,
    bench_total_correlation,
)
from bench.results import PREDICTED, PREDICTIONS

MADE = "2026-11-30"
GPU = "NVIDIA H200"
CLOCK, PROCESSORS = 1.755e9, 132  # boost, and multiprocessors
LAUNCH = 2.5  # microseconds
RATES = {
    "bytes": 4.1e12,  # of a copy, of 4.8e12 that the memory does at its peak
    "exponentials": 16 * PROCESSORS * CLOCK,  # ex2, 16 a clock and multiprocessor
    "flops": 256 * PROCESSORS * CLOCK,  # float32 without the tensor cores
}
ISSUED = 4 * PROCESSORS * CLOCK  # warp instructions a second, at most
Size = Mapping[str, int]


class Part(NamedTuple):
    """A direction of our kernels: launches, microseconds beside the launches, and why."""

    launches: int
    us: float
    because: str


@dataclass(frozen=True)
class Plan:
    """A case.

    Attributes:
        loss: launches of the bench's own loss, in both directions.
        matrices: how many inputs it reads at least, and gradients it writes, where its work is not bytes.
    """

    case: Case
    sizes: Sequence[Size]
    forward: Callable[[Size], Part]
    backward: Callable[[Size], Part]
    loss: int
    matrices: int = 0

    def floor(self, size: Size, direction: str) -> tuple[float, float]:
        """The work, and microseconds of it beside the launches."""
        work = {d: self.case.work(size, d) for d in (FORWARD, BOTH)}
        work[BACKWARD] = work[BOTH] - work[FORWARD]
        moved = traffic(self.matrices)(size, direction) if self.matrices else 0.0
        return work[direction], 1e6 * max(work[direction] / RATES[self.case.unit], moved / RATES["bytes"])


def streamed(bytes_: float, share: float = 0.9) -> float:
    """Microseconds at a share of a copy's rate."""
    return 1e6 * bytes_ / RATES["bytes"] / share


def issued(instructions: float, share: float = 0.7, processors: int = PROCESSORS) -> float:
    """Microseconds for so many warp instructions, at a share of what the schedulers issue at most."""
    return 1e6 * instructions / (ISSUED * processors / PROCESSORS) / share


def matrices(size: Size) -> float:
    """Bytes of one [B, D] matrix of float32."""
    return 4.0 * size["B"] * size["D"]


# min_goal: instructions of a sample in forward, by its machine code for sm_90.
INSTRUCTIONS = {"anchored": 200, "all six constraints": 480, "a batch-level goal": 200}


def min_goal_forward(label: str) -> Callable[[Size], Part]:
    def part(size: Size) -> Part:
        batch, each = size["B"], INSTRUCTIONS[label]
        read = 4.0 * size["K"] * batch
        # Each thread has four samples, one after the other, and waits for three clocks an instruction.
        turn = 4 * each * 3 / CLOCK * 1e6
        if batch <= 1024:
            return Part(1, turn, f"one block; a thread goes over four samples, {each} each")
        if batch <= 16384:
            us = max(issued(each * batch / 32, 0.8, processors=8), 1e6 * read / (8 * 55e9), turn) + 2
            return Part(1, us, f"one cluster of 8 blocks, so 8 multiprocessors of {PROCESSORS}; {each} a sample")
        us = max(issued(each * batch / 32, 0.75), streamed(read), turn) + 2
        return Part(2, us, f"{each} a sample at 0.75 of the issue rate, a turn, or the bytes; a second launch sums")

    return part


def min_goal_backward(size: Size) -> Part:
    return Part(
        1, streamed(4.0 * size["K"] * size["B"] + 5.0 * size["B"]), "writes all gradients, reads 5 bytes a sample"
    )


def batch_level_backward(size: Size) -> Part:
    """Sums of 512 samples by the blocks of the first launch, which a second adds up."""
    if size["B"] <= 2048:
        return Part(1, 1.0, "one block, one turn of its threads")
    return Part(2, streamed(4.0 * size["K"] * size["B"] + 5.0 * size["B"]) + 3, "all gradients; a launch adds sums up")


def goal_set_forward(label: str) -> Callable[[Size], Part]:
    each = {"hard": 1.0, "smooth": 1.6, "spill": 2.0}[label]

    def part(size: Size) -> Part:
        grid = size["B"] > 1024
        us = 4.5 * each + (3.0 if grid else 0.0)
        where = "few blocks and a barrier of them" if grid else "one block"
        return Part(2, us, f"{where}: the latency of a few warps; the bench stacks share and level")

    return part


def goal_set_backward(size: Size) -> Part:
    return Part(1, 0.5 + streamed(8.0 * size["K"] * size["B"]), "reads the weights, writes the gradients")


def kl_forward(size: Size) -> Part:
    us = max(streamed(2 * matrices(size)), issued(120.0 * size["B"])) + 1
    return Part(1, us, "its bytes, or 120 warp instructions a row at 0.7 of the issue rate")


def kl_backward(size: Size) -> Part:
    return Part(1, streamed(4 * matrices(size)) + 1, "reads two matrices and writes two")


def consistency_forward(size: Size) -> Part:
    us = streamed(bench_consistency_variance.V * matrices(size)) + 1
    return Part(1, us, "63 registers leave 32 warps a multiprocessor: enough loads in flight for 0.9 of a copy")


def consistency_backward(size: Size) -> Part:
    return Part(1, streamed(2 * bench_consistency_variance.V * matrices(size)) + 1, "reads and writes every view")


def merged(size: Size) -> float:
    """Microseconds of a barrier of the grid, and of 16 blocks that merge up to 256 slices, eight parts at once."""
    return 1.5 + (1.0 if size["B"] > 1024 else 0.3)


def units_forward(size: Size) -> Part:
    us = streamed(matrices(size)) + merged(size)
    return Part(1, us, "one matrix, then a barrier, and 16 blocks that merge up to 256 slices")


def units_backward(size: Size) -> Part:
    return Part(1, streamed(2 * matrices(size)) + 1, "reads one matrix and writes one; no more blocks than fit at once")


def latent_forward(size: Size) -> Part:
    us = streamed(3 * matrices(size), 0.8) + merged(size)
    return Part(1, us, "some 250 instructions a row, 16 warps a multiprocessor; one merge")


def latent_backward(size: Size) -> Part:
    return Part(1, streamed(6 * matrices(size), 0.85) + 1, "reads three matrices and writes three")


def product(size: Size, share: float = 0.75) -> float:
    """Microseconds of one product of [B, D] with D x D numbers, by cuBLAS in float32; small ones fill no GPU."""
    flops = 2.0 * size["B"] * size["D"] ** 2
    return max(1e6 * flops / RATES["flops"] / share, 3.0)


def covariance_forward(size: Size) -> Part:
    us = 2 * product(size) + streamed(5 * matrices(size)) + merged(size)
    return Part(6, us, "two products in float32 at 0.75 of the peak, the first in two launches, and five passes")


def covariance_backward(size: Size) -> Part:
    return Part(1, streamed(3 * matrices(size)) + 1, "weights that are all the same: no product, three passes")


def weighed_backward(size: Size) -> Part:
    us = 2 * product(size) + streamed(8 * matrices(size)) + merged(size)
    return Part(6, us, "two products, and eight passes")


def batch_forward(size: Size) -> Part:
    us = product(size) + streamed(3 * matrices(size)) + merged(size)
    return Part(4, us, "one product in two launches, and three passes")


def batch_backward(size: Size) -> Part:
    return Part(3, product(size) + streamed(6 * matrices(size)) + 1, "one product, and six passes")


# total_correlation: exponentials a clock and multiprocessor that each inner loop allows (tools/sass_count.py).
ALLOWED = {"forward": 17.07, "rows": 16.0, "components": 13.21}
SQUARE = 2048  # rows, or components, of a square of backward


def correlation_us(size: Size, kernel: str) -> float:
    each = float(size["B"] ** 2 * size["D"])
    # A grid that does not come out evenly on the multiprocessors, and blocks that begin and end.
    full = 0.8 if each >= 1e9 else 0.65
    return 1e6 * each / (ALLOWED[kernel] * PROCESSORS * CLOCK) / full


def correlation_forward(size: Size) -> Part:
    us = correlation_us(size, "forward") + 2
    return Part(
        4, us, "what the inner loop allows an exponential, at 0.65 to 0.8 of full multiprocessors; packed first"
    )


def correlation_backward(size: Size) -> Part:
    squares = (-(-size["B"] // SQUARE)) ** 2
    joint = 1e6 * 6.0 * size["B"] ** 2 * size["D"] / RATES["flops"] / 0.7
    us = correlation_us(size, "rows") + correlation_us(size, "components") + joint + 2
    return Part(
        2 + 5 * squares, us, "the exponentials twice, once for rows and once for components, and the joint's sums"
    )


def streamed_both_ways(case: Case) -> Plan:
    """Return the plan of an op that has none of its own: it moves the bytes that its bench counts, a launch each way.

    An op that does more than stream, or whose bench has another loss than a mean, needs a plan in `PLANS`.
    """

    def part(direction: str) -> Callable[[Size], Part]:
        return lambda size: Part(1, streamed(case.work(size, direction)) + 1, "the bytes that its bench counts")

    return Plan(case, CODES, part(FORWARD), part(BACKWARD), 3)


GOALS = [{"K": 9, "B": batch} for batch in (64, 512, 8192, 65536, 1_048_576)]
CODES = [{"B": batch, "D": 128} for batch in (512, 4096, 65536, 1_048_576)]
GROWN = [{"B": 4096, "D": dims} for dims in (32, 64, 256, 512, 1024)]
CORRELATED = [
    *({"B": batch, "D": 128} for batch in (512, 1024)),
    *({"B": batch, "D": 32} for batch in (128, 256, 512, 1024, 2048, 4096)),
    *({"B": 512, "D": dims} for dims in (16, 64)),
    *({"B": batch, "D": dims} for batch in (4096, 16384) for dims in (64, 128, 256)),
]
PLANS = [
    *(
        Plan(bench_min_goal.CASES[label], GOALS, min_goal_forward(label), min_goal_backward, 3)
        for label in ("anchored", "all six constraints")
    ),
    Plan(bench_min_goal.BATCH_LEVEL, GOALS[2:], min_goal_forward("a batch-level goal"), batch_level_backward, 3),
    *(
        Plan(case, GOALS[:3], goal_set_forward(label), goal_set_backward, 1)
        for label, case in bench_goal_set.CASES.items()
    ),
    Plan(bench_total_correlation.CASE, CORRELATED, correlation_forward, correlation_backward, 3, 3),
    Plan(bench_gaussian_kl.CASE, CODES, kl_forward, kl_backward, 3),
    Plan(bench_consistency_variance.CASE, CODES, consistency_forward, consistency_backward, 3),
    Plan(bench_active_units.CASE, CODES, units_forward, units_backward, 3),
    Plan(bench_latent_statistics.CASE, CODES, latent_forward, latent_backward, 37),
    Plan(bench_covariance_penalty.BY_SAMPLE, [*CODES, *GROWN], covariance_forward, covariance_backward, 3, 1),
    Plan(bench_covariance_penalty.WEIGHED, CODES, covariance_forward, weighed_backward, 9, 1),
    Plan(bench_covariance_penalty.BATCH, CODES, batch_forward, batch_backward, 3, 1),
]
PLANS += [
    streamed_both_ways(find(op, label))
    for op, benches in OPS.items()
    for label in benches.cases
    if op not in {plan.case.op for plan in PLANS}
]


def entries() -> Iterator[dict[str, Any]]:
    """A dict for each case, direction and size."""
    for plan in PLANS:
        for size in plan.sizes:
            forward, backward = plan.forward(size), plan.backward(size)
            because = {FORWARD: forward.because, BACKWARD: backward.because, BOTH: "the sum of both directions"}
            launches = {FORWARD: forward.launches, BACKWARD: backward.launches + plan.loss}
            us = {FORWARD: forward.us, BACKWARD: backward.us}
            predicted = {direction: digits(LAUNCH * launches[direction] + us[direction], 2) for direction in us}
            launches[BOTH] = launches[FORWARD] + launches[BACKWARD]
            predicted[BOTH] = digits(predicted[FORWARD] + predicted[BACKWARD], 3)
            for direction in (FORWARD, BACKWARD, BOTH):
                work, least = plan.floor(size, direction)
                yield {
                    "case": plan.case.name, "direction": direction, "size": dict(size),
                    "launches": launches[direction], "work": work, "unit": plan.case.unit,
                    "floor_us": digits(LAUNCH * launches[direction] + least, 3),
                    "predicted_us": predicted[direction], "because": because[direction],
                }  # fmt: skip


def digits(x: float, count: int) -> float:
    return float(f"{x:.{count}g}")


def written() -> str:
    """The file: one entry a line, so that a change can be read."""
    head = {
        "kind": PREDICTED,
        "what": "Predictions, made without a GPU from counts of work and machine code. Nothing here was measured.",
        "made": MADE, "command": "python -m bench.predictions", "gpu": GPU, "launch_us": LAUNCH, "rates": RATES,
    }  # fmt: skip
    rows = ",\n  ".join(json.dumps(entry) for entry in entries())
    return f'{json.dumps(head, indent=1)[:-2]},\n "entries": [\n  {rows}\n ]\n}}\n'


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only see whether the file is what it should be")
    if not parser.parse_args(given).check:
        PREDICTIONS.write_text(written())
        print(PREDICTIONS)
        return 0
    if PREDICTIONS.exists() and PREDICTIONS.read_text() == written():
        return 0
    print(f"{PREDICTIONS} is not what bench/predictions.py gives: run python -m bench.predictions", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
