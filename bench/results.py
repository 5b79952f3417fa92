"""What is kept of a benchmark run: a small file for each machine, in bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import OPS

HERE = Path(__file__).resolve().parent / "results"
KIND = "bench"  # what tells these files from others in the folder
KEPT = "kept benches"  # and those of --keep, see bench.keep
PREDICTED, PREDICTIONS = "predictions", HERE / "predictions.json"  # and what bench.predictions writes
USUAL = {op: benches.usual for op, benches in OPS.items()}  # the regime in which everything is measured
Row = dict[str, Any]
Size = tuple[tuple[str, int], ...]
KEEP = (
    *("impl", "first_seconds", "work", "unit", "rate", "ceiling", "share", "peak_bytes", "launches", "syncs"),
    *("host_us", "event_us", "graph_us", "no_graph_because", "parts", "pair", "regime", "worst", "spread", "slowest"),
)


def usual(row: Row) -> bool:
    """Whether a bench was of the usual regime, or of what has none."""
    return row.get("regime") in (None, USUAL.get(row["op"]))


def named(size: Mapping[str, int]) -> str:
    return " ".join(f"{letter}={n}" for letter, n in size.items())


def stem_of(gpu: str) -> str:
    """What the files of a GPU are called."""
    return re.sub(r"\W+", "-", gpu).strip("-")


class Results:
    """The benches of one machine.

    Attributes:
        machine: what it is, and its ceilings. date: ISO. command: that which made it. rows: a dict for each bench;
            that of a peer which was wrong in a regime says so under "wrong" and has no "seconds".
        folder: where a profile of the same machine may lie.
    """

    def __init__(
        self, machine: dict[str, Any], date: str, command: str, rows: Sequence[Row], folder: Path = HERE
    ) -> None:
        self.machine, self.date, self.command, self.rows = machine, date, command, list(rows)
        self.folder = folder

    @property
    def stem(self) -> str:
        """What its file and its pictures are called: the GPU, or "cpu"."""
        if self.machine["device"] == "cpu":
            return "cpu"
        return stem_of(self.machine["name"])

    @property
    def title(self) -> str:
        m = self.machine
        where = f"{m['threads']} threads of " if m["device"] == "cpu" else ""
        return f"{where}{m['name']}, torch {m['torch']}, {self.date[:10]}"

    def of(self, case: str, direction: str) -> dict[Size, dict[str, Row]]:
        """Rows of the usual regime by size, D before B, then by peer in the order in which they ran."""
        found: dict[Size, dict[str, Row]] = {}
        for row in self.rows:
            if row["case"] == case and row["direction"] == direction and usual(row) and "wrong" not in row:
                found.setdefault(tuple(row["size"].items()), {})[row["peer"]] = row
        return dict(sorted(found.items(), key=lambda item: item[0][::-1]))

    def regimes(self, case: str, direction: str) -> dict[Size, dict[str, dict[str, Row]]]:
        """All rows by size, as above, then by regime, the usual one first, then by peer."""
        found: dict[Size, dict[str, dict[str, Row]]] = {}
        rows = [row for row in self.rows if row["case"] == case and row["direction"] == direction]
        for row in sorted(rows, key=usual, reverse=True):
            regime = row.get("regime") or USUAL.get(row["op"], "")
            found.setdefault(tuple(row["size"].items()), {}).setdefault(regime, {})[row["peer"]] = row
        return dict(sorted(found.items(), key=lambda item: item[0][::-1]))

    def groups(self) -> dict[str, dict[str, Row]]:
        """Rows by group, then by peer."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if "wrong" not in row:
                where = "" if usual(row) else f" in {row['regime']}"
                group = f"{row['case']} {row['direction']} {named(row['size'])}{where}"
                found.setdefault(group, {})[row["peer"]] = row
        return found

    def save(self, path: Path) -> None:
        """One row a line, so that a change can be read."""
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = {"kind": KIND, "machine": self.machine, "date": self.date, "command": self.command}
        path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def read(paths: Iterable[Path]) -> Results:
    """Of files of pytest-benchmark, of ``--keep``, or of one written by `Results.save`.

    Raises:
        ValueError: they were not made by these benches, or on different machines.
    """
    found: list[Results] = []
    for path in paths:
        try:
            found.append(_of_file(path))
        except (KeyError, json.JSONDecodeError) as why:
            what = f"it has no {why}" if isinstance(why, KeyError) else str(why)
            raise ValueError(f"{path} is not of pytest bench/ --benchmark-only: {what}") from why
    if not found:
        raise ValueError("no benchmark files were given")
    first = found[0]
    for other in found[1:]:
        if apart(first.machine) != apart(other.machine):
            raise ValueError(f"files of different machines: {apart(first.machine)} and {apart(other.machine)}")
    ceilings = [one.machine["ceilings"] for one in found]
    machine = {**first.machine, "ceilings": {u: max((c[u] or 0.0) for c in ceilings) or None for u in ceilings[0]}}
    rows = [row for one in found for row in one.rows]
    return Results(machine, min(one.date for one in found), first.command, rows)


def committed(folder: Path = HERE) -> list[Results]:
    """All that are kept in a folder, the CPU's first."""
    found = [read([p]) for p in sorted(folder.glob("*.json")) if f'"kind": "{KIND}"' in p.read_text()[:200]]
    for results in found:
        results.folder = folder
    return sorted(found, key=lambda r: (r.stem != "cpu", r.stem))


def kept_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of ``--keep``, and how many bytes they are.

    A last line without its end is left out: the run was killed while it was written.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], len(whole)


def row_of(bench: dict[str, Any]) -> Row:
    """What is kept of a bench, out of what pytest-benchmark knows of it."""
    info, stats = bench["extra_info"], bench["stats"]
    row = {name: info[name] for name in ("op", "case", "direction", "peer", "size")}
    row |= {"seconds": rounded(stats["median"]), "iqr": rounded(stats["iqr"]), "rounds": stats["rounds"]}
    return row | {name: rounded(info[name]) for name in KEEP if info.get(name) is not None}


def apart(machine: dict[str, Any]) -> dict[str, Any]:
    """What tells a machine from others: all but its ceilings, which are measured."""
    return {name: value for name, value in machine.items() if name != "ceilings"}


def _of_file(path: Path) -> Results:
    with path.open() as file:
        first = file.readline()
    if f'"kind": "{KEPT}"' in first and first.endswith("\n"):
        return _of_lines(*kept_lines(path)[0])
    raw = json.loads(path.read_text())
    if raw.get("kind") == KIND:
        return Results(raw["machine"], raw["date"], raw["command"], raw["rows"])
    machine = raw["machine_info"]
    machine["ceilings"] = {unit: rounded(most) for unit, most in machine["ceilings"].items()}
    rows = [row_of(bench) for bench in raw["benchmarks"]] + raw.get("wrong", [])
    return Results(machine, raw["datetime"], "pytest bench/ --benchmark-only", rows)


def _of_lines(head: dict[str, Any], *lines: dict[str, Any]) -> Results:
    """Of a file of ``--keep``: of ceilings that several runs measured the highest."""
    most = dict(head["machine"]["ceilings"])
    for line in lines:
        for unit, rate in line.get("ceilings", {}).items():
            most[unit] = max(rate or 0.0, most.get(unit) or 0.0) or None
    rows = [line["row"] for line in lines if "row" in line]
    return Results({**head["machine"], "ceilings": most}, head["date"], head["command"], rows)


def rounded(x: Any) -> Any:
    """Four digits: more would be noise."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x
