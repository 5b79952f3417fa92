"""The benchmark's report: bench/results/README.md with its pictures, and the table in the main README.

pytest bench/ --benchmark-only --benchmark-json=run.json
python -m bench.report run.json     # keeps what matters of it in bench/results; writes pages and pictures anew
python -m bench.report              # pages and pictures, from what is kept
python -m bench.report --check      # exit status 1 where a page says something else than what is kept
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.page import BOTH, CASES, compiled_step, page, plain_step
from bench.results import HERE, Results, Row, committed, read
from bench.tables import named, ratio, table, time

README = HERE.parent.parent / "README.md"
PAGE = HERE / "README.md"
BEGIN, END = "<!-- written by python -m bench.report -->", "<!-- end of what it writes -->"
# What the main README shows, and at which batch sizes.
SHOWN = {
    "min_goal all six constraints": (64, 8192, 1_048_576),
    "min_goal anchored": (64, 8192, 1_048_576),
    "goal_set spill": (64, 8192),
    "total_correlation": (512, 1024),
    "gaussian_kl": (512, 65536),
    "consistency_variance": (512, 65536),
    "active_units": (512, 65536),
    "latent_statistics": (512, 65536),
    "covariance_penalty": (512, 65536),
}
DIMS = 128  # of what has them


def readme_table(results: Results) -> str:
    """The main README's: forward and backward of the ops, and a whole step."""
    rows = []
    for case, batches in SHOWN.items():
        for size, peers in results.of(case, BOTH).items():
            sized = dict(size)
            if sized["B"] in batches and sized.get("D", DIMS) == DIMS and "bomkern" in peers:
                cells = _beside(peers, "bomkern", ("eager", "torch.compile", "KeOps"))
                rows.append([f"{CASES[case]}, B = {sized['B']:,}", *cells])
    for size, peers in results.of("nine-goal step", "whole").items():
        ours, plain = peers["bomkern lazy"]["seconds"], plain_step(peers)["seconds"]
        rows.append([f"the trainer's whole step, hard minimum, {named(size)}", time(ours), ratio(plain / ours), "", ""])
        if found := compiled_step(peers):
            eager, made = (row["seconds"] for row in found)
            rows.append(
                [f"the same, spill 1/2, compiled against not, {named(size)}", time(made), ratio(eager / made), "", ""]
            )
    head = ["forward and backward", "bomkern", "eager", "torch.compile", "KeOps"]
    return "\n".join([*table(head, rows), f"(`{results.command}`; {results.title})"])


def _beside(peers: dict[str, Row], ours: str, others: Sequence[str]) -> list[str]:
    mine = peers[ours]["seconds"]
    return [time(mine), *(ratio(peers[p]["seconds"] / mine) if p in peers else "" for p in others)]


def readme_with(readme: str, table: str) -> str:
    """The README with what stands between its two marks replaced.

    Raises:
        ValueError: it has no marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{README} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """What each page should hold."""
    kept = committed()
    return {PAGE: page(kept), README: readme_with(README.read_text(), readme_table(kept[0]))}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("made", type=Path, nargs="*", help="files of --benchmark-json, of one machine")
    parser.add_argument("--check", action="store_true", help="only see whether the pages are what they should be")
    asked = parser.parse_args(given)
    if asked.check:
        wrong = [path for path, text in pages().items() if path.read_text() != text]
        for path in wrong:
            print(f"{path} does not show what is kept: run python -m bench.report")
        return bool(wrong)
    try:
        if asked.made:
            results = read(asked.made)
            results.save(HERE / f"{results.stem}.json")
    except (OSError, ValueError) as why:
        print(f"bench.report: {why}", file=sys.stderr)
        return 2
    from bench import figures

    for results in committed():
        figures.draw(results, HERE)
    for path, text in pages().items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
