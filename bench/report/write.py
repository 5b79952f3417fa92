"""The benchmark's report: bench/results/README.md with its pictures, and the table in the main README.

pytest bench/ --benchmark-only --benchmark-json=run.json    # or --keep run.jsonl, see bench/keep.py
python -m bench.report run.json     # keeps what matters of it in bench/results; writes pages and pictures anew
python -m bench.report              # pages and pictures, from what is kept
python -m bench.report --check      # exit status 1 where a page says something else than what is kept

``--results FOLDER`` reads and writes there instead, and leaves bench/results and the main README alone. Without
matplotlib there are no pictures, and a line says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.cases import OPS
from bench.cases import named as named_case
from bench.report.page import BOTH, CASES, compiled_step, page, plain_step
from bench.report.tables import named, ratio, table, time
from bench.report.worst import EAGER, LIMIT, by_case, told
from bench.results import HERE, Results, committed, read

README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- written by python -m bench.report -->", "<!-- end of what it writes -->"
# What the main README shows, and at which batch sizes; there every regime is benched.
SHOWN = {named_case(op, label): batches for op, benches in OPS.items() for label, batches in benches.shown.items()}
DIMS = 128  # of what has them
PEERS = (EAGER, "torch.compile", "KeOps")


def readme_table(results: Results) -> str:
    """The main README's: forward and backward of the ops on the worst of their data, and a whole step."""
    rows = []
    for case, batches in SHOWN.items():
        several = results.regimes(case, BOTH)
        for size, found in by_case(results, case, BOTH).items():
            sized = dict(size)
            if sized["B"] in batches and sized.get("D", DIMS) == DIMS:
                cells = [ratio(found.least[peer][0]) if peer in found.least else "" for peer in PEERS]
                where = found.bad if len(several[size]) > 1 else ""
                ours = [time(found.slowest["seconds"]), told(found.spread)]
                rows.append([f"{CASES[case]}, B = {sized['B']:,}", *ours, *cells, where])
    for size, peers in results.of("nine-goal step", "whole").items():
        if (ours := peers.get("bomkern lazy")) and (plain := plain_step(peers)):
            what = f"the trainer's whole step, hard minimum, {named(size)}"
            rows.append(_step(what, ours["seconds"], plain["seconds"]))
        if pair := compiled_step(peers):
            eager, made = (row["seconds"] for row in pair)
            rows.append(_step(f"the same, spill 1/2, compiled against not, {named(size)}", made, eager))
    head = ["forward and backward", "bomkern", "slowest / fastest", *PEERS, "worst regime"]
    lines = [*table(head, rows), f"(`{results.command}`; {results.title})"]
    if any("**" in row[2] for row in rows):
        lines.insert(-1, f"In bold: more than the {LIMIT}x that is allowed.\n")
    return "\n".join(lines)


def _step(what: str, ours: float, other: float) -> list[str]:
    return [what, time(ours), "", ratio(other / ours), "", "", ""]


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


def pages(folder: Path = HERE) -> dict[Path, str]:
    """What each page should hold; the main README shows what is in bench/results alone."""
    kept = committed(folder)
    found = {folder / "README.md": page(kept, folder)}
    if folder.resolve() == HERE:
        found[README] = readme_with(README.read_text(), readme_table(kept[0]))
    return found


def draw(folder: Path) -> None:
    """The pictures of all that is kept in a folder, where there is matplotlib."""
    try:
        from bench.report import figures
    except ModuleNotFoundError as why:
        print(f"bench.report: no pictures, for there is no {why.name}", file=sys.stderr)
        return
    for results in committed(folder):
        figures.draw(results, folder)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("made", type=Path, nargs="*", help="files of --benchmark-json or --keep, of one machine")
    parser.add_argument("--check", action="store_true", help="only see whether the pages are what they should be")
    parser.add_argument("--results", type=Path, default=HERE, metavar="FOLDER", help="default: bench/results")
    asked = parser.parse_args(given)
    if asked.check:
        wrong = [path for path, text in pages(asked.results).items() if not path.exists() or path.read_text() != text]
        for path in wrong:
            print(f"{path} does not show what is kept: run python -m bench.report")
        return bool(wrong)
    try:
        asked.results.mkdir(parents=True, exist_ok=True)
        if asked.made:
            results = read(asked.made)
            results.save(asked.results / f"{results.stem}.json")
    except (OSError, ValueError) as why:
        print(f"bench.report: {why}", file=sys.stderr)
        return 2
    draw(asked.results)
    for path, text in pages(asked.results).items():
        path.write_text(text)
        print(path)
    return 0
