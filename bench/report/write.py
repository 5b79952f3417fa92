"""Write the benchmarks' report: bench/results/README.md with its pictures, and the table in the main README.

pytest bench/ --benchmark-only --benchmark-json=run.json    # or --keep run.jsonl, see bench/keep.py
python -m bench.report run.json     # saves a run in bench/results, and writes all pages and pictures
python -m bench.report              # writes all pages and pictures from the saved results
python -m bench.report --check      # exit status 1 where a page differs from the saved results

``--results FOLDER`` reads and writes there instead, and leaves bench/results and the main README alone. Without
matplotlib the pictures are left out, with a message.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.cases import OPS
from bench.cases import named as named_case
from bench.readme import README, put
from bench.report.page import BOTH, CASES, page, plain_step
from bench.report.tables import named, ratio, table, time
from bench.report.worst import EAGER, LIMIT, by_case, told
from bench.results import HERE, Results, Size, committed, read

COMMAND = "python -m bench.report"
# The cases in the main README's table and their batch sizes, at which every regime is benched.
SHOWN = {named_case(op, label): batches for op, benches in OPS.items() for label, batches in benches.shown.items()}
DIMS = 128  # the D of cases that have one
STEPS = {
    "bomkern lazy": "the trainer's whole step, hard minimum",
    "bomkern default": "the same with the trainer's default, spill 1/2 and a budget of rows",
    "bomkern default, dearest first": "the same where the goals that decode most weigh most",
    "bomkern default compiled": "the trainer's default with `--compile`",
}
PEERS = (EAGER, "torch.compile", "KeOps")


def readme_table(results: Results) -> str:
    """Return the main README's table: forward and backward of each op, and whole steps of the trainer.

    Each op is shown on its worst kind of data and, as each step, at the batch size where bomkern gains least.
    """
    rows = []
    for case, batches in SHOWN.items():
        several = results.regimes(case, BOTH)
        sized = {size: figures for size, figures in by_case(results, case, BOTH).items() if _shown(size, batches)}
        if not sized:
            continue
        size = min(sized, key=lambda size: min((x for x, _ in sized[size].least.values()), default=0.0))
        figures = sized[size]
        cells = [ratio(figures.least[peer][0]) if peer in figures.least else "" for peer in PEERS]
        where = figures.bad if len(several[size]) > 1 else ""
        ours = [time(figures.slowest["seconds"]), told(figures.spread)]
        rows.append([f"{CASES[case]}, B = {dict(size)['B']:,}", *ours, *cells, where])
    rows += steps_table(results)
    head = ["forward and backward", "bomkern", "slowest / fastest", *PEERS, "worst regime"]
    lines = [*table(head, rows), f"(`{results.command}`; {results.title})"]
    if any("**" in row[2] for row in rows):
        lines.insert(-1, f"In bold: more than the {LIMIT}x that is allowed.\n")
    return "\n".join(lines)


def _shown(size: Size, batches: tuple[int, ...]) -> bool:
    sized = dict(size)
    return sized["B"] in batches and sized.get("D", DIMS) == DIMS


def steps_table(results: Results) -> list[list[str]]:
    """Return a row for each of the trainer's steps, at the batch size where it gains least."""
    gains: dict[str, list[tuple[float, float, str]]] = {}
    for size, peers in results.of("nine-goal step", "whole").items():
        if plain := plain_step(peers):
            for name in STEPS.keys() & peers.keys():
                ours = peers[name]["seconds"]
                gains.setdefault(name, []).append((plain["seconds"] / ours, ours, named(size)))
    least = {name: min(gains[name]) for name in STEPS if name in gains}
    return [[f"{STEPS[name]}, {size}", time(s), "", ratio(gain), "", "", ""] for name, (gain, s, size) in least.items()]


def pages(folder: Path = HERE) -> dict[Path, str]:
    """Return the text of each page; the main README is among them for bench/results alone."""
    saved = committed(folder)
    texts = {folder / "README.md": page(saved, folder)}
    if folder.resolve() == HERE:
        texts[README] = put(README.read_text(), COMMAND, readme_table(saved[0]))
    return texts


def draw(folder: Path) -> None:
    """Draw the pictures of all results in a folder, if matplotlib is installed."""
    try:
        from bench.report import figures
    except ModuleNotFoundError as why:
        print(f"bench.report: no pictures: {why.name} is not installed", file=sys.stderr)
        return
    for results in committed(folder):
        figures.draw(results, folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="files of --benchmark-json or --keep, of one machine")
    parser.add_argument("--check", action="store_true", help="only check that the pages show the saved results")
    parser.add_argument("--results", type=Path, default=HERE, metavar="FOLDER", help="default: bench/results")
    args = parser.parse_args(argv)
    if args.check:
        wrong = [path for path, text in pages(args.results).items() if not path.exists() or path.read_text() != text]
        for path in wrong:
            print(f"{path} does not show the saved results: run python -m bench.report")
        return bool(wrong)
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        if args.runs:
            results = read(args.runs)
            results.save(args.results / f"{results.stem}.json")
    except (OSError, ValueError) as why:
        print(f"bench.report: {why}", file=sys.stderr)
        return 2
    draw(args.results)
    for path, text in pages(args.results).items():
        path.write_text(text)
        print(path)
    return 0
