"""List the imports of bomkern/ by room, and check that they only go down.

``python tools/rooms.py`` prints a line for each room, from the top floor down: the rooms it imports, and how often. The
exit status is 1 where an import goes up, sideways or in a circle. ``--files`` prints a line for each file instead.
An import from `bomkern` itself counts as the room `bomkern`: only the rooms in `PUBLIC` may do so.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bomkern"
KERNELS = PACKAGE.parent / "kernels"  # installed as bomkern.kernels
# From the ground up. A room imports from all lower floors, unless ALONE limits it.
FLOORS = (
    ("_version", "common"),
    ("constraints",),
    ("reference",),
    ("kernels",),
    ("dispatch", "lazy_goals"),
    ("ops",),
    ("goals",),
    ("anchors", "diagnosis", "nn"),
    ("report", "integrations"),
    ("train",),
    ("cli",),
    ("__main__",),
)
# Rooms that may import only some of the rooms below them.
ALONE = {
    "kernels": {"common", "reference"},
    "lazy_goals": {"common"},
    "diagnosis": {"common", "goals"},
    "train": {"bomkern", "report", "common"},
}
PUBLIC = ("train", "cli", "__main__")  # these use bomkern as its users do
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """Return the room of a module of bomkern; "bomkern" for the package itself."""
    return module.split(".")[1] if "." in module else "bomkern"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the files of the package by module name."""
    files = {}
    for folder, name in ((package, "bomkern"), (KERNELS, "bomkern.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of bomkern that a file imports, except those under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text())
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for node in guarded for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            start = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            targets = {f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names}
            yield from (target for target in sorted(targets) if target in known)


def upward(package: Path = PACKAGE) -> list[str]:
    """Return a line for each import that does not go down."""
    known, wrong = modules(package), []
    for module, path in known.items():
        room = room_of(module)
        if room == "bomkern":  # the package gathers the public names of all rooms
            continue
        if room not in FLOOR:
            wrong.append(f"{module} is in no room: name it in FLOORS of tools/rooms.py")
            continue
        for target in imports(module, path, known):
            other = room_of(target)
            if other == room or (other == "bomkern" and room in PUBLIC):
                continue
            allowed = ALONE.get(room, {name for name, floor in FLOOR.items() if floor < FLOOR[room]})
            if other not in allowed:
                wrong.append(f"{module} imports {target}: {room} may import {', '.join(sorted(allowed)) or 'no room'}")
    return wrong


def circles(package: Path = PACKAGE) -> list[str]:
    """Return a line for each circle of imports between files, also within a room."""
    known = modules(package)
    graph = {module: set(imports(module, path, known)) - {module, "bomkern"} for module, path in known.items()}
    lines, done, trail = [], set(), []

    def visit(module: str) -> None:
        if module in trail:
            lines.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            trail.append(module)
            for target in sorted(graph[module]):
                visit(target)
            trail.pop()
            done.add(module)

    for module in graph:
        visit(module)
    return lines


def drawing(package: Path = PACKAGE) -> str:
    """Return a line for each room, from the top floor down, with the rooms it imports and the number of imports."""
    known = modules(package)
    uses: dict[str, Counter[str]] = {}
    sizes: Counter[str] = Counter()
    for module, path in known.items():
        sizes[room_of(module)] += 1
        uses.setdefault(room_of(module), Counter()).update(room_of(target) for target in imports(module, path, known))
    lines = []
    for floor in range(len(FLOORS) - 1, -1, -1):
        for room in FLOORS[floor]:
            below = sorted(uses.get(room, {}), key=lambda name: -FLOOR.get(name, len(FLOORS)))
            arrows = ", ".join(f"{name} {uses[room][name]}" for name in below if name != room)
            files = f"{sizes[room]} file{'s' * (sizes[room] != 1)}"
            lines.append(f"{floor:>2}  {room:<12} {files:<9} -> {arrows or '(nothing)'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="print a line for each file instead of each room")
    if parser.parse_args().files:
        known = modules()
        for module, path in known.items():
            names = ", ".join(sorted({t.removeprefix("bomkern.") for t in imports(module, path, known)}))
            print(f"{module.removeprefix('bomkern.')} ({len(path.read_text().splitlines())}): {names}")
        return 0
    print(drawing())
    wrong = upward() + circles()
    print("\n".join(["", *wrong]) if wrong else "\nevery import goes down, and there is no circle")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
