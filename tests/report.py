"""Write the tables of tests/README.md from the results that the scripts left in tests/results.

python -m tests.report
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.report.tables import Lines, megabytes, table

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
MARKED = re.compile(r"(<!-- (results|installs) -->\n).*?(<!-- end -->)", re.DOTALL)
sys.path.insert(0, str(HERE.parent / "tools"))
import install_matrix  # noqa: E402

PARTS = {
    "kernels": "every CPU kernel on memory of exactly its size",
    "emulator": "the CUDA kernels, emulated",
    "memory": "the ops' tests in PyTorch",
    "threads": "the ops' tests in PyTorch",
}
PLANTED = {"Started", "AssertionError", "AttributeError", "ZeroDivisionError"}  # raised by a function of a test
Row = tuple[str, str, str]  # test, result, command


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def fuzz() -> Iterator[Row]:
    found = load("fuzz")
    cases = Counter[str]()
    for counts in found["cases"].values():
        cases.update(counts)
    by_impl = ", ".join(f"{impl} {count:,}" for impl, count in cases.most_common())
    yield (
        f"random cases of {len(found['cases'])} ops against the reference in float64",
        f"{cases.total():,} cases ({by_impl}), {len(found['failures'])} failed",
        found["command"],
    )


def sanitizers() -> Iterator[Row]:
    found = load("sanitize")
    names = {"address,undefined": "ASan and UBSan", "thread": "TSan"}
    for part in dict.fromkeys(run["part"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["part"] == part]
        under = " and ".join(names[name] for name in dict.fromkeys(run["sanitizer"] for run in runs))
        errors = sum(bool(run["found"]) for run in runs)
        if part == "planted":
            yield f"C++, errors planted for {under}", f"{len(runs) - errors} of {len(runs)} reported", found["command"]
            continue
        told = f": {runs[0]['said'].split(' in ')[0]}" if len(runs) == 1 else ""
        programs = f"{len(runs)} program{'s' * (len(runs) > 1)}, {errors or 'none'} with findings{told}"
        yield f"C++, {PARTS[part]}, {under}", programs, found["command"]


def faults() -> Iterator[Row]:
    found = load("faults")
    kills, damaged, full = found["kills"], found["damaged"], found["full_disk"]
    end = "equal to the bit" if kills["equal"] else "**different**"
    yield "runs killed at random moments", f"{kills['kills']} SIGKILLs; the final state is {end}", found["command"]
    yield (
        "checkpoints cut short",
        f"{damaged['refused']} of {damaged['cut']} refused, the previous one used",
        found["command"],
    )
    yield "bits of a checkpoint flipped", f"{damaged['survived']} of {damaged['flipped']} survived", found["command"]
    went_on = f"kept step {full['kept']}, continued to {full['steps']}, {len(full['left'])} files left over"
    yield "disk full while a checkpoint is written", went_on, found["command"]


def refusals() -> Iterator[Row]:
    found = load("refusals")
    errors = Counter({name: count for name, count in found["errors"].items() if name not in PLANTED})
    common = ", ".join(f"{name} {count:,}" for name, count in errors.most_common(4))
    yield (
        "bad inputs",
        f"{errors.total():,} refused with the expected error ({common})",
        found["command"],
    )


def endurance() -> Iterator[Row]:
    found = load("endurance")
    slope = found["slope_a_step"]
    impls = list(found["learnt_apart"])
    worst = [max(max(errors[k] for errors in found["errors"][impl].values()) for impl in impls) for k in (0, -1)]
    yield (
        f"a run of {found['steps']:,} steps of every op",
        f"growth in the second half: {slope['resident']:+.3g} bytes and {slope['handles']:+.3g} handles a step, of "
        f"{megabytes(found['last']['resident'])} and {found['last']['handles']}",
        found["command"],
    )
    yield "steps with a NaN in that run", f"{found['rejected']} of {found['planted']} rejected", found["command"]
    yield (
        f"drift from float64 in that run ({', '.join(impls)})",
        f"values and gradients {worst[0]:.1g} in the first fifth, {worst[1]:.1g} in the last; the state of GoalSets "
        f"{max(found['learnt_apart'].values()):.1g}",
        found["command"],
    )


def installs() -> Iterator[Row]:
    cells = load("install_matrix")["cells"].values()
    outcomes = Counter(cell["outcome"] for cell in cells if cell["as_expected"])
    names = {"works": "work", "clear error": "are refused clearly"}
    right = ", ".join(f"{count} {names[name]}" for name, count in outcomes.items())
    wrong = sum(not cell["as_expected"] for cell in cells)
    yield "ways to install", f"{len(cells)} cells: {right}, {wrong} not as expected", "make install-matrix"


SOURCES = (fuzz, sanitizers, faults, refusals, endurance, installs)


def results() -> Lines:
    rows = [row for source in SOURCES for row in source()]
    return table(("test", "result", "command"), ((test, result, f"`{command}`") for test, result, command in rows))


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    made = {"results": "\n".join(results()).strip(), "installs": install_matrix.table(load("install_matrix"))}
    return MARKED.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
