"""Time each constant of the launch plans at several values, and report which value to commit.

python -m bench.tune                       # every knob that serves here, then where routing a backward pays
python -m bench.tune min_goal route        # some: an op's name, "triton", "cuda", "route"
python -m bench.tune --json tuned.json --stop-at 1767225600   # the file holds all rows so far

A value is timed only if its result agrees with the reference. Values alternate, so that load on the machine affects all
alike. Knobs alternate too, one row each, so that every knob has some rows when the time is over. On a GPU, calls are
replayed as a CUDA graph where possible: launched singly, small calls would measure the host, which no knob changes. On
a CPU the times decide nothing: ``--device cpu --quick`` only checks that the code runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bomkern
from bench import kernels, machine
from bench.harness import Case, Size, check, inputs, once
from bench.ops import bench_covariance_penalty, bench_min_goal
from bench.rounds import looked_at
from bomkern import Anchored, GoalSet
from bomkern.dispatch import select

RECORDED = 20  # calls of a graph
WORTH = 1.03  # a value that is this many times faster is worth a change
SMALL = {"B": 48, "D": 8}  # the sizes of a dry run
WIDE = ({"B": 4096, "D": 128}, {"B": 65536, "D": 128}, {"B": 262_144, "D": 32})
CODES = ({"B": 1024, "D": 128}, {"B": 4096, "D": 64})
GOALS = tuple({"K": 9, "B": batch} for batch in (2048, 8192, 16384, 65536, 1_048_576))
FEW_GOALS = tuple({"K": 9, "B": batch} for batch in (1024, 512, 2048))


@dataclass(frozen=True)
class Knob:
    """A constant of a module, or of the CUDA kernels where ``module`` is "", and the values to try.

    Attributes:
        name: name of the constant. values: values to try beside the current one. cases: the cases to time, in float32.
    """

    module: str
    name: str
    values: tuple[int, ...]
    cases: tuple[Case, ...]
    sizes: tuple[Size, ...]

    @property
    def impl(self) -> str:
        return "triton" if self.module else "cuda"

    @property
    def title(self) -> str:
        return f"{self.module or 'cuda'} {self.name}"

    def get(self) -> int:
        return int(getattr(importlib.import_module(self.module), self.name)) if self.module else _cuda(self.name)

    def put(self, value: int) -> None:
        if self.module:
            setattr(importlib.import_module(self.module), self.name, value)
            return
        _cuda(self.name, value)
        if (now := _cuda(self.name)) != value:
            raise ValueError(f"{self.name} stays {now}, {value} takes a build with NVCC_APPEND_FLAGS=-DBOMKERN_TUNE")

    @contextmanager
    def at(self, value: int) -> Iterator[None]:
        before = self.get()
        self.put(value)
        try:
            yield
        finally:
            self.put(before)


def _cuda(name: str, value: int = 0) -> int:
    """Return a threshold of the CUDA kernels, named "op.threshold", and set it to ``value`` if that is a valid value.

    This is the only use in Python of kernels/common/cuda_tune.h.
    """
    op, _, threshold = name.partition(".")
    setter = getattr(ctypes.CDLL(bomkern._C.__file__), f"bomkern_tune_{op}")
    setter.argtypes, setter.restype = (ctypes.c_char_p, ctypes.c_int64), ctypes.c_int64
    before = int(setter(threshold.encode(), value))
    if before < 0:
        raise ValueError(f"{op} has no threshold {threshold}")
    return before


TRITON = "bomkern.kernels"
CASE: dict[str, Case] = {case.op: case for case, _, _ in kernels.cases()}
MIN_GOALS = tuple(bench_min_goal.CASES.values())
MOMENTS, SPILL = (CASE["active_units"], CASE["latent_statistics"]), (CASE["goal_set"],)
COVARIANCE, CORRELATION = (CASE["covariance_penalty"],), (CASE["total_correlation"],)
ROWS, COLUMNS = (CASE["gaussian_kl"], CASE["consistency_variance"], *COVARIANCE), (*MOMENTS, *COVARIANCE)
RECENTERED = (bench_covariance_penalty.WEIGHED, bench_covariance_penalty.BATCH)
# At the sizes of a CUDA threshold its values plan different grids for 132 multiprocessors.
CORNERS = ({"B": 512, "D": 32}, {"B": 512, "D": 128}, {"B": 2048, "D": 128})
KNOBS = (
    Knob("", "min_goal.one_block", (256, 512, 2048), MIN_GOALS, FEW_GOALS),
    Knob("", "min_goal.one_cluster", (4096, 8192, 16384, 32768, 65536), MIN_GOALS, GOALS[1:4]),
    Knob("", "min_goal.least_grid_threads", (32, 64, 128, 256), MIN_GOALS, GOALS[2:]),
    Knob("", "min_goal.most_grid_threads", (64, 128, 256), MIN_GOALS, GOALS[2:]),
    Knob("", "goal_set.one_block", (256, 512), SPILL, FEW_GOALS[:2]),
    Knob("", "goal_set.least_grid_threads", (32, 64, 128), SPILL, GOALS[1:4]),
    Knob("", "goal_set.most_grid_threads", (64, 128, 256), SPILL, GOALS[2:]),
    Knob("", "total_correlation.poly_period", (8, 10, 32), CORRELATION, CODES),
    Knob("", "total_correlation.most_splits", (8, 16, 64), CORRELATION, ({"B": 1024, "D": 16}, {"B": 512, "D": 128})),
    Knob("", "total_correlation.shortest_split", (8, 32, 64), CORRELATION, ({"B": 512, "D": 128}, {"B": 256, "D": 64})),
    Knob("", "total_correlation.fixed_steps", (16, 64), CORRELATION, ({"B": 1536, "D": 128}, {"B": 5000, "D": 64})),
    Knob("", "rows.few_rows", (256, 512, 2048, 4096), ROWS, tuple({"B": b, "D": 512} for b in (1024, 512, 2048, 256))),
    Knob("", "rows.most_row_blocks", (4, 8, 32), ROWS[:2], WIDE[1:]),
    Knob("", "gaussian_kl.full_blocks", (1, 2, 8), ROWS[:1], ({"B": 8192, "D": 128}, {"B": 4096, "D": 128})),
    Knob("", "columns.most_slices", (32, 64, 128), COLUMNS, WIDE[::-1]),
    Knob("", "columns.one_slice", (4096, 65536, 262_144), COLUMNS, CORNERS),
    Knob("", "columns.most_column_blocks", (2, 4, 16), RECENTERED, WIDE[1:]),
    Knob(f"{TRITON}.active_units.triton_moments", "PROGRAMS", (128, 256, 512, 1024), MOMENTS, WIDE),
    Knob(f"{TRITON}.active_units.triton_moments", "WHOLE", (4096, 16384, 65536), MOMENTS, ({"B": 512, "D": 32},)),
    Knob(f"{TRITON}.covariance_penalty.triton_columns", "PROGRAMS", (128, 256, 512), COVARIANCE, WIDE),
    Knob(f"{TRITON}.gaussian_kl.triton", "CELLS", (512, 1024, 2048, 4096), (CASE["gaussian_kl"],), WIDE),
    Knob(f"{TRITON}.total_correlation.triton", "PROGRAMS", (2048, 4096, 8192), CORRELATION, CODES),
    Knob(f"{TRITON}.total_correlation.triton", "LEAST", (8, 16, 32), CORRELATION, CODES),
)
PLANNED = "as planned"
# Sizes at which numbers of warps are tried, for ops whose sizes differ from those of the statistics.
WARPS = {"min_goal": GOALS[3:], "goal_set": GOALS[3:], "total_correlation": CODES[:1]}
BRANCHES = (1, 2, 4, 8, 16, 32)  # layers behind each goal
WIDTH = 512


class TimeOver(Exception):
    """The time is over."""


@dataclass
class Clock:
    stop_at: float = math.inf

    def look(self) -> None:
        if time.time() >= self.stop_at:
            raise TimeOver


def small(size: Size) -> Size:
    return {letter: min(n, SMALL.get(letter, n)) for letter, n in size.items()}


def timed(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the microseconds of a call of each step, timed in turn."""
    return {name: round(1e6 * seconds, 3) for name, seconds in looked_at(steps).items()}


Rows = Iterator[dict[str, Any]]
Settings = Mapping[str, Callable[[], AbstractContextManager[None]]]


def compare(
    title: str, now: str, settings: Settings, impl: str, cases: Sequence[Case], sizes: Sequence[Size], clock: Clock,
    quick: bool,
) -> Rows:  # fmt: skip
    """Yield a row for each case and size, with the time under each setting or the error of a wrong result."""
    for case in cases:
        for size in sizes:
            clock.look()
            size = small(size) if quick else size
            key, steps, wrong = tuple(size.items()), {}, {}
            ours = functools.partial(case.ours, impl=impl)
            for name, setting in settings.items():
                try:
                    with setting():
                        check(case, ours, key, True)
                except Exception as why:  # such as a tile that is too large or a refused launch
                    wrong[name] = str(why).splitlines()[0][:120]
                    continue
                steps[name] = functools.partial(_within, setting, once(case, ours, inputs(case, key), True))
            us, replayed = timed_replays(steps)
            steps.clear()  # frees the inputs while other knobs have their turn
            yield {
                "knob": title, "now": now, "case": case.name, "size": dict(size), "us": us, "replayed": replayed,
                "wrong": wrong,
            }  # fmt: skip


def timed_replays(steps: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], bool]:
    """Return the microseconds of a call of each step, and whether all were replayed as graphs; otherwise none was."""
    replays = {name: replay for name, step in steps.items() if (replay := recorded(step))}
    if not replays or len(replays) < len(steps):
        return timed(steps), False
    return {name: round(spent / RECORDED, 3) for name, spent in timed(replays).items()}, True


def recorded(step: Callable[[], object]) -> Callable[[], object] | None:
    """Return a replay of `RECORDED` calls as a CUDA graph; None without a GPU or where a call cannot be captured."""
    if machine.DEVICE != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(RECORDED):
                step()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # the driver may report the failed capture once more
            machine.synchronize()
        return None

    def replay(inputs: object = step) -> None:  # keeps the inputs alive, which a graph does not
        graph.replay()

    return replay


def _within(setting: Callable[[], AbstractContextManager[None]], step: Callable[[], object]) -> None:
    with setting():
        step()


def tune(knob: Knob, clock: Clock, quick: bool) -> Rows:
    now = knob.get()
    settings = {str(value): functools.partial(knob.at, value) for value in sorted({now, *knob.values})}
    yield from compare(knob.title, str(now), settings, knob.impl, knob.cases, knob.sizes, clock, quick)


@contextmanager
def warps(count: int) -> Iterator[None]:
    """Launch every Triton kernel with ``count`` warps whatever its launch says; 0 changes nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def other(self: Any, *args: Any, **options: Any) -> Any:
        return run(self, *args, **{**options, "num_warps": count})

    JITFunction.run = other if count else run
    try:
        yield
    finally:
        JITFunction.run = run


def tune_warps(op: str, clock: Clock, quick: bool) -> Rows:
    """Time numbers of warps, each for all Triton kernels of an op at once."""
    counts = (0, 4) if quick else (0, 2, 4, 8, 16)
    settings = {str(count or PLANNED): functools.partial(warps, count) for count in counts}
    return compare(
        f"triton {op} num_warps", PLANNED, settings, "triton", (CASE[op],), WARPS.get(op, WIDE[1:2]), clock, quick
    )


def route(clock: Clock, quick: bool) -> Rows:
    """Time a step of nine goals of which one owns all samples, with all branches walked and with that goal's alone.

    The rows differ in the number of layers behind each goal. ``wait_us`` is the host's wait for the shares at the start
    of a backward, when the device has only just begun to compute them. Routing pays where ``always`` takes less than
    ``never``; ``auto`` should change over there.
    """
    width, batch = (32, 16) if quick else (WIDTH, 4096)
    for layers in BRANCHES[:2] if quick else BRANCHES:
        clock.look()
        torch.manual_seed(0)
        branches = torch.nn.ModuleList(
            torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)]) for _ in range(9)
        ).to(machine.DEVICE)
        x = torch.rand(batch, width, device=machine.DEVICE)
        steps = {}
        for how in ("never", "always"):
            goals = GoalSet({f"goal{k}": Anchored(0.0, 1.0) for k in range(9)}, route=how).to(machine.DEVICE)

            def step(goals: GoalSet = goals, branches: Any = branches, x: Any = x) -> None:
                raw = {f"goal{k}": b(x).square().mean(1) + 5.0 * (k == 0) for k, b in enumerate(branches)}
                goals(raw).loss.backward()

            steps[how] = step
        us = timed(steps)
        yield {"knob": "route", "layers": layers, "width": width, "B": batch, "us": us, "wait_us": _wait(x)}


def _wait(x: torch.Tensor) -> float | None:
    """Return the microseconds in which the host gets a small result from an idle GPU; None without a GPU."""
    if machine.DEVICE != "cuda":
        return None
    from bomkern.common.host_copy import HostCopy

    spent = []
    for _ in range(50):
        machine.synchronize()
        begun = time.perf_counter()
        HostCopy(x[0, :9].clone()).wait()
        spent.append(time.perf_counter() - begun)
    return round(1e6 * sorted(spent)[25], 3)


def advice(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each knob: the best value over all its rows if it is worth a change, else the current one."""
    lines = []
    for title in dict.fromkeys(row["knob"] for row in rows if "now" in row):
        mine = [row for row in rows if row["knob"] == title and row["us"]]
        shared = set.intersection(*(set(row["us"]) for row in mine)) if mine else set()
        now = str(mine[0]["now"]) if mine else ""
        if now not in shared:
            lines.append(f"{title}: the current value gave no right result")
            continue
        score = {v: math.prod(row["us"][now] / row["us"][v] for row in mine) ** (1 / len(mine)) for v in shared}
        best = max(score, key=lambda v: score[v])
        better = f"{best} is {score[best]:.2f} times as fast as {now}: commit it"
        stays = f"{now} stays" if len(shared) > 1 else "no other value gave a right result"
        lines.append(f"{title}: {better if score[best] > WORTH else stays}")
    routes = [row for row in rows if row["knob"] == "route"]
    if routes:
        pays = [row["layers"] for row in routes if row["us"]["always"] < row["us"]["never"]]
        lines.append(f"route: always is faster with {', '.join(map(str, pays)) or 'no number of'} layers behind a goal")
    return lines


def jobs(wanted: Sequence[str], clock: Clock, quick: bool) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """Yield the title of each job and a function that begins it."""
    everything = not wanted or "all" in wanted
    for knob in KNOBS:
        if everything or knob.impl in wanted or any(case.op in wanted for case in knob.cases):
            yield knob.title, functools.partial(tune, knob, clock, quick)
    for op in CASE:
        if everything or "triton" in wanted or op in wanted:
            yield f"triton {op} num_warps", functools.partial(tune_warps, op, clock, quick)
    if everything or "route" in wanted:
        yield "route", functools.partial(route, clock, quick)


def why_not(title: str) -> str | None:
    """Return the reason why a knob cannot be turned here, or None."""
    if title == "route":
        return None
    impl = "cuda" if title.startswith("cuda") else "triton"
    return select.why_not("min_goal", impl, machine.DEVICE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="KNOB", help="ops, triton, cuda, route or all (all)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each row")
    parser.add_argument(
        "--stop-at", type=float, default=math.inf, help="begin nothing after this time, in seconds since 1970"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs")
    args = parser.parse_args(argv)
    known = {"all", "triton", "cuda", "route", *CASE}
    if unknown := set(args.what) - known:
        parser.error(f"no such knob: {', '.join(sorted(unknown))}; the knobs are {' '.join(sorted(known))}")
    if args.device != machine.DEVICE:
        print(f"bench.tune: this machine's device is {machine.DEVICE}; say --device {machine.DEVICE}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    status, clock = 0, Clock(args.stop_at)
    turns: deque[tuple[str, Rows]] = deque()
    for title, begin in jobs(args.what, clock, args.quick):
        if reason := why_not(title):
            print(f"{title}: not turned: {reason}")
        else:
            turns.append((title, begin()))
    while turns:
        title, pending = turns.popleft()
        try:
            if (row := next(pending, None)) is None:
                continue
            turns.append((title, pending))
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine.described(), "rows": rows}, indent=1) + "\n")
        except TimeOver:
            print(f"not begun or not ended, the time was over: {', '.join([title, *(other for other, _ in turns)])}")
            break
        except Exception as why:  # the other knobs go on
            print(f"{title}: FAILED: {type(why).__name__}: {why}")
            status = 1
    print("\n".join(advice(rows)))
    return status


if __name__ == "__main__":
    sys.exit(main())
