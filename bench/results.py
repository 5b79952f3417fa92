"""The results of benchmark runs: one small file for each machine, in bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import OPS

HERE = Path(__file__).resolve().parent / "results"
KIND = "bench"  # the "kind" of these files, which distinguishes them from others in the folder
GUARD = "guard"  # the "kind" of bench/results/guard.json, see bench.compare
KEPT = "kept benches"  # the "kind" of files of --keep, see bench.keep
PREDICTED, PREDICTIONS = "predictions", HERE / "predictions.json"  # kind and path of the file of bench.predictions
USUAL = {op: benches.usual for op, benches in OPS.items()}  # the usual regime of each op, see bench/cases.py
Row = dict[str, Any]
Size = tuple[tuple[str, int], ...]
KEEP = (
    *("impl", "first_seconds", "work", "unit", "rate", "ceiling", "share", "peak_bytes", "launches", "syncs"),
    *("host_us", "event_us", "graph_us", "no_graph_because", "parts", "pair", "regime", "worst", "spread", "slowest"),
)


def usual(row: Row) -> bool:
    """Return whether a bench ran in the usual regime of its op, or has no regime."""
    return row.get("regime") in (None, USUAL.get(row["op"]))


def named(size: Mapping[str, int]) -> str:
    return " ".join(f"{letter}={n}" for letter, n in size.items())


def stem_of(gpu: str) -> str:
    """Return the stem of the file names of a GPU."""
    return re.sub(r"\W+", "-", gpu).strip("-")


class Results:
    """The benches of one machine.

    Attributes:
        machine: its properties and ceilings. date: in ISO format. command: the command that made the results.
        rows: a dict for each bench; the row of a peer with a wrong result has "wrong" and no "seconds".
        folder: the folder that a profile of the same machine may be in.
    """

    def __init__(
        self, machine: dict[str, Any], date: str, command: str, rows: Sequence[Row], folder: Path = HERE
    ) -> None:
        self.machine, self.date, self.command, self.rows = machine, date, command, list(rows)
        self.folder = folder

    @property
    def stem(self) -> str:
        """The stem of the file names of results and pictures: the GPU's name, or "cpu"."""
        if self.machine["device"] == "cpu":
            return "cpu"
        return stem_of(self.machine["name"])

    @property
    def title(self) -> str:
        m = self.machine
        where = f"{m['threads']} threads of " if m["device"] == "cpu" else ""
        return f"{where}{m['name']}, torch {m['torch']}, {self.date[:10]}"

    def of(self, case: str, direction: str) -> dict[Size, dict[str, Row]]:
        """Return the rows of the usual regime by size, D before B, then by peer in the order in which they ran."""
        by_size: dict[Size, dict[str, Row]] = {}
        for row in self.rows:
            if row["case"] == case and row["direction"] == direction and usual(row) and "wrong" not in row:
                by_size.setdefault(tuple(row["size"].items()), {})[row["peer"]] = row
        return dict(sorted(by_size.items(), key=lambda item: item[0][::-1]))

    def regimes(self, case: str, direction: str) -> dict[Size, dict[str, dict[str, Row]]]:
        """Return all rows by size, as above, then by regime, the usual one first, then by peer."""
        by_size: dict[Size, dict[str, dict[str, Row]]] = {}
        rows = [row for row in self.rows if row["case"] == case and row["direction"] == direction]
        for row in sorted(rows, key=usual, reverse=True):
            regime = row.get("regime") or USUAL.get(row["op"], "")
            by_size.setdefault(tuple(row["size"].items()), {}).setdefault(regime, {})[row["peer"]] = row
        return dict(sorted(by_size.items(), key=lambda item: item[0][::-1]))

    def groups(self) -> dict[str, dict[str, Row]]:
        """Return the rows by group, then by peer."""
        by_group: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            if "wrong" not in row:
                by_group.setdefault(self.group(row), {})[row["peer"]] = row
        return by_group

    @staticmethod
    def group(row: Row) -> str:
        """Return the name of what a row's peer was timed on, which its peers share."""
        where = "" if usual(row) else f" in {row['regime']}"
        return f"{row['case']} {row['direction']} {named(row['size'])}{where}"

    def save(self, path: Path, kind: str = KIND) -> None:
        """Write the results, one row per line so that a diff is readable."""
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = {"kind": kind, "machine": self.machine, "date": self.date, "command": self.command}
        path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def read(paths: Iterable[Path]) -> Results:
    """Read files of pytest-benchmark, of ``--keep`` or of `Results.save`, all of one machine, as one `Results`.

    Raises:
        ValueError: the files were not made by these benches, or are of different machines.
    """
    parts: list[Results] = []
    for path in paths:
        try:
            parts.append(_from_file(path))
        except (KeyError, json.JSONDecodeError) as why:
            what = f"it has no {why}" if isinstance(why, KeyError) else str(why)
            raise ValueError(f"{path} is not a file of pytest bench/ --benchmark-only: {what}") from why
    if not parts:
        raise ValueError("no benchmark files were given")
    first = parts[0]
    for other in parts[1:]:
        if apart(first.machine) != apart(other.machine):
            raise ValueError(f"files of different machines: {apart(first.machine)} and {apart(other.machine)}")
    ceilings = [part.machine["ceilings"] for part in parts]
    machine = {**first.machine, "ceilings": {u: max((c[u] or 0.0) for c in ceilings) or None for u in ceilings[0]}}
    rows = [row for part in parts for row in part.rows]
    return Results(machine, min(part.date for part in parts), first.command, rows)


def committed(folder: Path = HERE) -> list[Results]:
    """Return all results in a folder, the CPU's first."""
    machines = [read([p]) for p in sorted(folder.glob("*.json")) if f'"kind": "{KIND}"' in p.read_text()[:200]]
    for results in machines:
        results.folder = folder
    return sorted(machines, key=lambda r: (r.stem != "cpu", r.stem))


def kept_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file of ``--keep`` and their length in bytes.

    An unfinished last line is ignored: the run was killed while it wrote the line.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], len(whole)


def row_of(bench: dict[str, Any]) -> Row:
    """Return the row of a bench from the dict of pytest-benchmark."""
    info, stats = bench["extra_info"], bench["stats"]
    row = {name: info[name] for name in ("op", "case", "direction", "peer", "size")}
    row |= {"seconds": rounded(stats["median"]), "iqr": rounded(stats["iqr"]), "rounds": stats["rounds"]}
    return row | {name: rounded(info[name]) for name in KEEP if info.get(name) is not None}


def apart(machine: dict[str, Any]) -> dict[str, Any]:
    """Return the properties that identify a machine: all but its ceilings, which are measured."""
    return {name: value for name, value in machine.items() if name != "ceilings"}


def _from_file(path: Path) -> Results:
    with path.open() as file:
        first = file.readline()
    if f'"kind": "{KEPT}"' in first and first.endswith("\n"):
        return _from_lines(*kept_lines(path)[0])
    raw = json.loads(path.read_text())
    if raw.get("kind") in (KIND, GUARD):
        return Results(raw["machine"], raw["date"], raw["command"], raw["rows"])
    machine = raw["machine_info"]
    machine["ceilings"] = {unit: rounded(most) for unit, most in machine["ceilings"].items()}
    rows = [row_of(bench) for bench in raw["benchmarks"]] + raw.get("wrong", [])
    return Results(machine, raw["datetime"], "pytest bench/ --benchmark-only", rows)


def _from_lines(head: dict[str, Any], *lines: dict[str, Any]) -> Results:
    """Return the results of a file of ``--keep``, with the highest of the ceilings that its runs measured."""
    most = dict(head["machine"]["ceilings"])
    for line in lines:
        for unit, rate in line.get("ceilings", {}).items():
            most[unit] = max(rate or 0.0, most.get(unit) or 0.0) or None
    rows = [line["row"] for line in lines if "row" in line]
    return Results({**head["machine"], "ceilings": most}, head["date"], head["command"], rows)


def rounded(x: Any) -> Any:
    """Round floats, also inside a dict, to four digits: more would be noise."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x
