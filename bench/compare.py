"""Check whether bomkern became slower than eager PyTorch of the same run. Ratios are compared, never times.

python -m bench.compare BASE NEW [NEW ...]    # exit status 1 where a ratio fell by more than 15%
python -m bench.compare BASE --run 3          # time the three-minute subset, up to three times while a ratio fell
python -m bench.compare BASE --record 5       # time the subset five times, and write BASE: bench/results/guard.json

The subset, bench/ops/bench_guard.py, times each case on its worst kind of data. The check also fails where our slowest
kind of data takes more than 1.3 times as long as the fastest.

Files come from ``--benchmark-json`` or from bench/results. Where BASE holds several runs, a ratio fails that is 15%
below the least of them, and lower again by their spread: eager PyTorch, whose temporaries live on fresh pages, takes up
to 1.8 times as long in one run as in another. If several NEW files hold runs of the same benches, the best run counts:
a busy machine is no fault of the code. Between different processors only a fall by more than half fails, because their
ratios say little about each other. The same limit holds for a BASE that was timed on the usual kind of data alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.report.worst import LIMIT
from bench.results import GUARD, Results, read

ROOT = Path(__file__).resolve().parent.parent
FALL, FALL_ELSEWHERE = 0.15, 0.5
DECIDES = ("device", "name", "threads", "simd")  # properties of a machine that its ratios depend on
OURS, EAGER = "bomkern", "eager"


def ratios(results: Results, of_runs: Callable[[list[float]], float] = min) -> dict[str, float]:
    """Return eager's time over bomkern's for each group that has both, from pairs timed in turn where there are any.

    Args:
        results: of one run, or of several: then each group has as many pairs.
        of_runs: picks one of the runs' pairs.
    """
    by_group, pairs = {}, defaultdict(list)
    for group, peers in results.groups().items():
        if (ours := peers.get(OURS)) and EAGER in peers:
            by_group[group] = peers[EAGER]["seconds"] / ours["seconds"]
    for row in results.rows:
        if "pair" in row:
            pairs[results.group(row)].append(row["pair"])
    return by_group | {group: of_runs(each) for group, each in pairs.items()}


def spreads(news: list[Results]) -> dict[str, tuple[float, str]]:
    """Return, for each group timed on several kinds of data, slowest over fastest in its best run, and the slowest."""
    by_group: dict[str, tuple[float, str]] = {}
    for new in news:
        for group, peers in new.groups().items():
            if "spread" in (row := peers.get(OURS, {})):
                spread = row["spread"], row["slowest"]
                by_group[group] = min(spread, by_group.get(group, spread))
    return by_group


def compare(base: Results, news: list[Results]) -> tuple[list[str], bool]:
    """Return a line for each common ratio, worst first, and each spread; and whether all are within their limits."""
    elsewhere = {name: new.machine[name] for new in news for name in DECIDES if new.machine[name] != base.machine[name]}
    # A base from before there were regimes holds the usual regime alone.
    usual = any("worst" in row for new in news for row in new.rows) and not any("worst" in row for row in base.rows)
    limit = FALL_ELSEWHERE if elsewhere or usual else FALL
    before, most = ratios(base), ratios(base, max)
    after: dict[str, float] = {}
    for new in news:
        for group, ratio in ratios(new, max).items():
            after[group] = max(ratio, after.get(group, 0.0))
    both = sorted((after[group] / before[group], group) for group in before.keys() & after.keys())
    least = {group: (1 - limit) * before[group] / most[group] for group in before}
    lines = [f"base: {base.title}"]
    if elsewhere:
        lines.append(f"another machine ({elsewhere}): only a fall by more than {limit:.0%} fails")
    if usual:
        lines.append(f"the base has the usual kind of data, not the worst: only a fall by more than {limit:.0%} fails")
    for change, group in both:
        line = f"{before[group]:7.2f}x -> {after[group]:7.2f}x  {change - 1:+5.0%}  {group}"
        lines.append(line + (f"   FELL by more than {1 - least[group]:.0%}" if change < least[group] else ""))
    if not both:
        lines.append("nothing to compare: no group has bomkern and eager in both files")
    wide = sorted(((spread, slowest, group) for group, (spread, slowest) in spreads(news).items()), reverse=True)
    for spread, slowest, group in wide:
        over = f"   MORE than {LIMIT}x" if spread > LIMIT else ""
        lines.append(f"{spread:.2f}x between kinds of data, slowest in {slowest}: {group}{over}")
    fell = any(change < least[group] for change, group in both)
    return lines, bool(both) and not fell and not any(spread > LIMIT for spread, _, _ in wide)


def run(to: Path) -> Results:
    """Run the subset, bench/ops/bench_guard.py, in its own process, and return its results.

    Raises:
        subprocess.CalledProcessError: a bench failed.
    """
    options = ["--benchmark-only", "--benchmark-json", str(to)]
    subprocess.run([sys.executable, "-m", "pytest", "bench/ops/bench_guard.py", *options], check=True, cwd=ROOT)
    return read([to])


def record(to: Path, times: int) -> Results:
    """Run the subset so many times, and write all runs to one file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{n}.json" for n in range(times)]
        for path in paths:
            run(path)
        results = read(paths)
    results.command = f"python -m bench.compare {to} --record {times}"
    results.save(to, kind=GUARD)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="results to compare with")
    parser.add_argument("new", type=Path, nargs="*", help="new results, of one run or several")
    parser.add_argument("--run", type=int, default=0, metavar="TIMES", help="run the subset at most this many times")
    parser.add_argument(
        "--record", type=int, default=0, metavar="TIMES", help="run the subset so often, and write BASE"
    )
    args = parser.parse_args(argv)
    if sum(map(bool, (args.new, args.run, args.record))) != 1:
        parser.error("give one of NEW, --run TIMES and --record TIMES")
    try:
        if args.record:
            results = record(args.base, args.record)
            lowest, highest = ratios(results), ratios(results, max)
            print("\n".join(f"{lowest[group]:7.2f}x to {highest[group]:7.2f}x  {group}" for group in sorted(lowest)))
            return 0
        base, news = read([args.base]), [read([path]) for path in args.new]
        lines, passed = compare(base, news) if news else ([], False)
        with tempfile.TemporaryDirectory() as folder:
            while not passed and len(news) < args.run:
                news.append(run(Path(folder) / "run.json"))
                lines, passed = compare(base, news)
    except (OSError, ValueError, subprocess.CalledProcessError) as why:
        print(f"bench.compare: {why}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
