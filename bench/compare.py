"""Has bomkern become slower, against eager PyTorch in the same run? Ratios are compared, never times.

python -m bench.compare BASE NEW [NEW ...]    # exit status 1 where a ratio fell by more than 15%
python -m bench.compare BASE --run 3          # runs the three-minute subset for it, up to three times where one fell

The subset, bench/ops/bench_guard.py, measures each case on the worst kind of data for it. It fails, too, where our
slowest kind of data takes more than 1.3 times as long as its fastest.
Files are those of ``--benchmark-json`` or of bench/results. Of several NEW files, runs of the same benches, each ratio
counts at its best: what a busy neighbour takes away in one run is no fault of the code. Ratios of different processors
say little of one another: between them only a fall by more than half fails. So it is where BASE is older than the kinds
of data, and of the usual one alone.
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
DECIDES = ("device", "name", "threads", "simd")  # of a machine, for its ratios
OURS, EAGER = "bomkern", "eager"


def ratios(results: Results) -> dict[str, float]:
    """Eager's time over bomkern's, of each group that has both: of pairs that ran in turn where there are such."""
    found = {}
    for group, peers in results.groups().items():
        ours = peers.get(OURS)
        if ours and "pair" in ours:
            found[group] = ours["pair"]
        elif ours and EAGER in peers:
            found[group] = peers[EAGER]["seconds"] / ours["seconds"]
    return found


def spreads(news: list[Results]) -> dict[str, tuple[float, str]]:
    """Of each group that was timed on several kinds of data: slowest over fastest, in its best run, and the slowest."""
    found: dict[str, tuple[float, str]] = {}
    for new in news:
        for group, peers in new.groups().items():
            if "spread" in (row := peers.get(OURS, {})):
                seen = row["spread"], row["slowest"]
                found[group] = min(seen, found.get(group, seen))
    return found


def compare(base: Results, news: list[Results]) -> tuple[list[str], bool]:
    """A line for each ratio that both have, the worst first, and for each spread; whether none is beyond its limit."""
    elsewhere = {name: new.machine[name] for new in news for name in DECIDES if new.machine[name] != base.machine[name]}
    # The base may have been made before there were regimes, of the usual one alone.
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
        lines.append(f"the base is of one kind of data, not of the worst: only a fall by more than {limit:.0%} fails")
    for change, group in both:
        told = f"{before[group]:7.2f}x -> {after[group]:7.2f}x  {change - 1:+5.0%}  {group}"
        lines.append(told + (f"   FELL by more than {limit:.0%}" if change < 1 - limit else ""))
    if not both:
        lines.append("nothing to compare: no group has bomkern and eager in both")
    wide = sorted(((spread, slowest, group) for group, (spread, slowest) in spreads(news).items()), reverse=True)
    for spread, slowest, group in wide:
        over = f"   MORE than {LIMIT}x" if spread > LIMIT else ""
        lines.append(f"{spread:.2f}x between kinds of data, slowest in {slowest}: {group}{over}")
    return lines, bool(both) and both[0][0] >= 1 - limit and not any(spread > LIMIT for spread, _, _ in wide)


def run(to: Path) -> Results:
    """The subset, bench/ops/bench_guard.py, in a process of its own.

    Raises:
        subprocess.CalledProcessError: a bench failed.
    """
    options = ["--benchmark-only", "--benchmark-json", str(to)]
    subprocess.run([sys.executable, "-m", "pytest", "bench/ops/bench_guard.py", *options], check=True, cwd=ROOT)
    return read([to])


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="what it was")
    parser.add_argument("new", type=Path, nargs="*", help="what it is, in one run or several")
    parser.add_argument("--run", type=int, default=0, metavar="TIMES", help="run the subset, at most so many times")
    asked = parser.parse_args(given)
    if bool(asked.new) == bool(asked.run):
        parser.error("give either NEW or --run TIMES")
    try:
        base, news = read([asked.base]), [read([path]) for path in asked.new]
        lines, fine = compare(base, news) if news else ([], False)
        with tempfile.TemporaryDirectory() as folder:
            while not fine and len(news) < asked.run:
                news.append(run(Path(folder) / "run.json"))
                lines, fine = compare(base, news)
    except (OSError, ValueError, subprocess.CalledProcessError) as why:
        print(f"bench.compare: {why}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
