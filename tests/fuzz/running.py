"""Draw cases for a number of seconds, report failures and count the cases."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from tests.fuzz.cases import Case
from tests.fuzz.correlation import OPS as CORRELATION
from tests.fuzz.goal_sets import OPS as GOAL_SETS
from tests.fuzz.goals import OPS as GOALS
from tests.fuzz.judging import PULLS, Wrong, check
from tests.fuzz.ops import Op
from tests.fuzz.second import check_twice, twice
from tests.fuzz.shrinking import shrink
from tests.fuzz.statistics import OPS as STATISTICS

OPS: dict[str, Op] = {op.name: op for op in (*GOALS, *GOAL_SETS, *CORRELATION, *STATISTICS)}
ORDER = ("reference", "cpu", "triton", "cuda")
SPOILED = 0.04  # fraction of the cases with an error, which must be refused
TWICE = 0.15  # fraction of the cases that are differentiated twice, if small enough


def places(op: Op) -> list[tuple[str, str, float]]:
    """Return (impl, device, frequency) of each implementation that serves the op here.

    The interpreter is slow, and the reference is compared with itself.
    """
    gpu = torch.cuda.is_available()
    usual = {"reference": 2.0, "cpu": 50.0, "triton": 40.0 if gpu else 1.0, "cuda": 60.0}
    found = []
    for impl in ORDER:
        device = "cuda" if impl in ("cuda", "triton") and gpu else "cpu"
        if op.serves(impl, device):
            found.append((impl, device, usual[impl]))
    return found


def draw(seed: int, number: int, only_op: str | None = None, only_impl: str | None = None) -> Case:
    """Draw the case of one integer.

    The implementations available here determine its impl, unless one is given.
    """
    source = Random(f"{seed}:{number}")
    # the first suitable op is used, so --op and --impl do not change the rest of the case
    order = source.sample(list(OPS), len(OPS))
    served = {op: [place for place in places(OPS[op]) if only_impl in (None, place[0])] for op in order}
    names = [op for op, here in served.items() if here and only_op in (None, op)]
    if not names:
        raise SystemExit(f"--impl {only_impl} does not serve {only_op or 'any op'} here")
    op = OPS[names[0]]
    here = served[op.name]
    impl, device, _ = source.choices(here, [weight for *_, weight in here])[0]
    drawn = op.draw(source, impl == "triton" and device == "cpu")
    if source.random() < SPOILED:
        drawn = op.spoil(source, drawn)
    sizes, given, options = drawn
    threads = source.choice([2, 3, 5]) if source.random() < 0.1 else 1
    pull = source.choice(PULLS) if source.random() < 0.4 else "ramp"
    case = Case(op.name, impl, device, sizes, tuple(given), options, pull, threads)
    return twice(op, case) if source.random() < TWICE else case


def failure_of(case: Case) -> str | None:
    """Return a description of the case's error, or None."""
    op = OPS[case.op]
    try:
        if not check(op, case) and case.twice:
            check_twice(op, case)
    except Wrong as wrong:
        return str(wrong)
    return None


def reproducer(case: Case) -> str:
    return f"python -m tests.fuzz --spec '{case.to_json()}'"


def report(case: Case, wrong: str, line: str, seconds: float) -> dict[str, str]:
    """Print a failure with the command that reproduces it, and the smallest similar case."""
    print(f"FAILED {case}\n  {wrong}\n  {line}", flush=True)
    small = shrink(OPS[case.op], case, lambda other: fails_alike(other, wrong), seconds)
    if small != case:
        print(f"  smaller: {small}\n    {failure_of(small)}\n  {reproducer(small)}", flush=True)
    return {"case": str(case), "wrong": wrong, "reproduce": line, "smaller": str(small), "spec": small.to_json()}


def fails_alike(case: Case, wrong: str) -> bool:
    """Return whether the case fails in the same result, so that shrinking keeps the same bug."""
    try:
        found = failure_of(case)
    except Exception:  # the removed part was needed
        return False
    return found is not None and found.split(":")[0].split(" ")[0] == wrong.split(":")[0].split(" ")[0]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long to draw cases; default 60")
    parser.add_argument("--cases", type=int, default=None, help="how many cases at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", choices=list(OPS), default=None, help="this op alone")
    parser.add_argument("--impl", choices=ORDER, default=None, help="this implementation alone")
    parser.add_argument("--case", metavar="SEED:N", default=None, help="this case alone")
    parser.add_argument("--spec", metavar="JSON", default=None, help="this case alone, as a failure printed it")
    parser.add_argument("--most", type=int, default=20, help="stop after so many failures; default 20")
    parser.add_argument("--shrink", type=float, default=20, help="seconds to make a failing case smaller; default 20")
    parser.add_argument("--json", type=Path, default=None, help="write the counts and failures to this file")
    parser.add_argument("--verbose", action="store_true", help="print each case before it runs")
    return parser


def main(given: list[str] | None = None) -> int:
    """Run the fuzzer. Return 0 if every case passed, else 1."""
    args = arguments().parse_args(given)
    chosen = {name: value for name, value in (("--op", args.op), ("--impl", args.impl)) if value}
    if args.case or args.spec:
        seed, _, number = (args.case or "").partition(":")
        case = Case.from_json(args.spec) if args.spec else draw(int(seed), int(number), args.op, args.impl)
        if args.spec and args.impl:
            case = replace(case, impl=args.impl)
        wrong = failure_of(case)
        print(f"{case}\n  {wrong or 'right'}")
        return int(wrong is not None)

    command = " ".join(["python -m tests.fuzz", *(sys.argv[1:] if given is None else given)])
    print(f"{command}: seed {args.seed}, {args.seconds:g} s, torch {torch.__version__}", flush=True)
    counts: Counter[tuple[str, str]] = Counter()
    second = 0
    failures, begin = [], time.monotonic()
    for number in itertools.count():
        if time.monotonic() - begin > args.seconds or number == args.cases or len(failures) >= args.most:
            break
        case = draw(args.seed, number, args.op, args.impl)
        if args.verbose:
            print(f"{args.seed}:{number} {case}", flush=True)
        wrong = failure_of(case)
        counts[case.op, case.impl] += 1
        second += case.twice
        if wrong is not None:
            chosen["--impl"] = case.impl
            line = " ".join([f"python -m tests.fuzz --case {args.seed}:{number}", *itertools.chain(*chosen.items())])
            failures.append(report(case, wrong, line, args.shrink))
            if args.impl is None:
                chosen.pop("--impl")
    took = time.monotonic() - begin
    print_counts(counts)
    print(f"{sum(counts.values())} cases in {took:.0f} s, {second} differentiated twice, {len(failures)} failed")
    if args.json:
        write(args.json, command, took, args.seed, counts, failures)
    return int(bool(failures))


def print_counts(counts: Counter[tuple[str, str]]) -> None:
    impls = [impl for impl in ORDER if any(key[1] == impl for key in counts)]
    print(f"{'cases':<28}" + "".join(f"{impl:>11}" for impl in impls))
    for op in OPS:
        if any(counts[op, impl] for impl in impls):
            print(f"{op:<28}" + "".join(f"{counts[op, impl]:>11,}" for impl in impls))


def write(
    path: Path,
    command: str,
    seconds: float,
    seed: int,
    counts: Counter[tuple[str, str]],
    failures: list[dict[str, str]],
) -> None:
    found = {
        "command": command,
        "seconds": round(seconds),
        "seed": seed,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "cases": {op: {impl: counts[op, impl] for impl in ORDER if counts[op, impl]} for op in OPS},
        "failures": failures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
