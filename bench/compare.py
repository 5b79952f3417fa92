"""Check whether bomkern became slower than eager PyTorch of the same run. Ratios are compared, never times.

python -m bench.compare BASE NEW [NEW ...]    # exit status 1 where a ratio fell by more than 15%
python -m bench.compare BASE --run 3          # time the three-minute subset, up to three times while a ratio fell

The subset, bench/ops/bench_guard.py, times each case on its worst kind of data. The check also fails where our slowest
kind of data takes more than 1.3 times as long as the fastest.

Files come from ``--benchmark-json`` or from bench/results. If several NEW files hold runs of the same benches, the best
run of each ratio counts: a busy machine is no fault of the code. Between different processors only a fall by more than
half fails, because their ratios say little about each other. The same limit holds for a BASE that was timed on the
usual kind of data alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report.worst import LIMIT
from bench.results import Results, read

ROOT = Path(__file__).resolve().parent.parent
FALL, FALL_ELSEWHERE = 0.15, 0.5
DECIDES = ("device", "name", "threads", "simd")  # properties of a machine that its ratios depend on
OURS, EAGER = "bomkern", "eager"


def ratios(results: Results) -> dict[str, float]:
    """Return eager's time over bomkern's for each group that has both, from pairs timed in turn where there are any."""
    by_group = {}
    for group, peers in results.groups().items():
        ours = peers.get(OURS)
        if ours and "pair" in ours:
            by_group[group] = ours["pair"]
        elif ours and EAGER in peers:
            by_group[group] = peers[EAGER]["seconds"] / ours["seconds"]
    return by_group


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
    before = ratios(base)
    after: dict[str, float] = {}
    for new in news:
        for group, ratio in ratios(new).items():
            after[group] = max(ratio, after.get(group, 0.0))
    both = sorted((after[group] / before[group], group) for group in before.keys() & after.keys())
    lines = [f"base: {base.title}"]
    if elsewhere:
        lines.append(f"another machine ({elsewhere}): only a fall by more than {limit:.0%} fails")
    if usual:
        lines.append(f"the base has the usual kind of data, not the worst: only a fall by more than {limit:.0%} fails")
    for change, group in both:
        line = f"{before[group]:7.2f}x -> {after[group]:7.2f}x  {change - 1:+5.0%}  {group}"
        lines.append(line + (f"   FELL by more than {limit:.0%}" if change < 1 - limit else ""))
    if not both:
        lines.append("nothing to compare: no group has bomkern and eager in both files")
    wide = sorted(((spread, slowest, group) for group, (spread, slowest) in spreads(news).items()), reverse=True)
    for spread, slowest, group in wide:
        over = f"   MORE than {LIMIT}x" if spread > LIMIT else ""
        lines.append(f"{spread:.2f}x between kinds of data, slowest in {slowest}: {group}{over}")
    return lines, bool(both) and both[0][0] >= 1 - limit and not any(spread > LIMIT for spread, _, _ in wide)


def run(to: Path) -> Results:
    """Run the subset, bench/ops/bench_guard.py, in its own process, and return its results.

    Raises:
        subprocess.CalledProcessError: a bench failed.
    """
    options = ["--benchmark-only", "--benchmark-json", str(to)]
    subprocess.run([sys.executable, "-m", "pytest", "bench/ops/bench_guard.py", *options], check=True, cwd=ROOT)
    return read([to])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="results to compare with")
    parser.add_argument("new", type=Path, nargs="*", help="new results, of one run or several")
    parser.add_argument("--run", type=int, default=0, metavar="TIMES", help="run the subset at most this many times")
    args = parser.parse_args(argv)
    if bool(args.new) == bool(args.run):
        parser.error("give either NEW or --run TIMES")
    try:
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
