"""List the public interface: names with their signatures, commands, state_dict keys and keys of files.

``python tools/public_api.py`` prints it as JSON. ``--against REV`` compares it with a commit, and exits with 1 where an
entry of REV is gone or has changed. New entries are listed too, but are no error.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ((), ("train",), ("diagnose",), ("info",))


def signature(value: Any) -> str:
    """Return the signature of a public name; for a class also its public methods and properties."""
    if not callable(value):
        return type(value).__name__
    try:
        called = str(inspect.signature(value))
    except (TypeError, ValueError):
        called = "(...)"
    if not isinstance(value, type):
        return called
    own = {}
    for base in reversed([c for c in value.__mro__ if c.__module__.startswith("bomkern")]):
        own.update({name: part for name, part in vars(base).items() if not name.startswith("_")})
    parts = (f"{n}{inspect.signature(p) if inspect.isfunction(p) else ''}" for n, p in sorted(own.items()))
    return f"{called}: {'; '.join(parts)}"


def names() -> dict[str, str]:
    """Return the signatures of all public names."""
    import bomkern
    import bomkern.integrations
    import bomkern.nn
    import bomkern.report

    signatures = {f"bomkern.{name}": signature(getattr(bomkern, name)) for name in (*bomkern.__all__, "nn")}
    anchors = getattr(bomkern, "anchors", None)  # a commit to compare with may lack it
    for name in anchors.__all__ if anchors else ():
        signatures[f"bomkern.anchors.{name}"] = signature(getattr(anchors, name))
    for name in bomkern.nn.__all__:
        signatures[f"bomkern.nn.{name}"] = signature(getattr(bomkern.nn, name))
    for name in bomkern.integrations.__all__:
        signatures[f"bomkern.integrations.{name}"] = signature(getattr(bomkern.integrations, name))
    for name in ("diagnose_folder", "write_report"):
        signatures[f"bomkern.report.{name}"] = signature(getattr(bomkern.report, name))
    return signatures


def commands() -> dict[str, str]:
    """Return the help of every command."""
    texts = {}
    for words in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "bomkern", *words, "--help"],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        texts[" ".join(["bomkern", *words])] = done.stdout
    return texts


def states() -> dict[str, list[str]]:
    """Return the keys of the state_dicts of every kind of `GoalSet`, of a history's file, of a record and a guard."""
    import torch

    import bomkern
    from bomkern import Anchored, Calibrated, GoalSet, Group, Minimize, ShareGuard, Tracking, Upper

    sets = {
        "constraints": GoalSet(a=Minimize(1.0), b=Upper(1.0, 0.5)),
        "policies": GoalSet(a=Anchored(0.0, 1.0, moving=True), b=Calibrated(3), c=Tracking()),
        "groups": GoalSet(a=Group(x=Minimize(1.0), y=Anchored(0.0, 2.0)), b=Minimize(1.0)),
        "spill": GoalSet({"a": Minimize(1.0), "b": Minimize(2.0)}, spill=0.5),
        "guard": GoalSet({"a": Minimize(1.0), "b": Minimize(2.0)}, guard=ShareGuard(), temperature=0.1),
    }
    keys = {f"GoalSet {name}": sorted(goals.state_dict()) for name, goals in sets.items()}
    goals = sets["spill"]
    for _ in range(3):
        goals({"a": torch.rand(4, requires_grad=True), "b": torch.rand(4, requires_grad=True)}).loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "history.pt")
        goals.history.save(path)
        kept = torch.load(path, weights_only=True)
    # One entry a key: readers leave out keys that they do not know, so that a new one changes nothing.
    keys |= {f"history file, {key}": [type(value).__name__] for key, value in sorted(kept.items())}
    keys["history file, layout's keys"] = sorted(kept["layout"])
    keys["record"] = sorted(goals.history.to_dict()) if hasattr(goals.history, "to_dict") else []
    model = torch.nn.Linear(2, 2)
    guard = bomkern.StepGuard(torch.optim.AdamW(model.parameters()), goals=goals)
    keys["StepGuard"] = sorted(guard.state_dict())
    return keys


def current() -> dict[str, Any]:
    return {"names": names(), "commands": commands(), "states": states()}


def of_commit(revision: str) -> dict[str, Any]:
    """Return the public interface of another commit, without an extension: its ops may differ from this checkout's."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["git", "archive", revision, "bomkern", "kernels"], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "-xf", "-", "-C", folder], input=packed.stdout, check=True)
        # An editable installation would find the extension of this checkout; children of the process see this too.
        Path(folder, "sitecustomize.py").write_text("import sys\nsys.modules['bomkern._C'] = None\n")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"public_api: {revision} cannot be listed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def compare(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return a line for each entry that is gone or changed, and one for each that is new."""
    changed, new = [], []
    for part in before:
        for key, value in before[part].items():
            if key not in now[part]:
                changed.append(f"{part}: {key} is gone")
            elif now[part][key] != value:
                changed.append(f"{part}: {key}\n  was {value}\n  is  {now[part][key]}")
        new += [f"{part}: {key} is new" for key in now[part] if key not in before[part]]
    return changed, new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    revision = parser.parse_args().against
    if revision is None:
        print(json.dumps(current(), indent=1))
        return 0
    before, now = of_commit(revision), current()
    changed, new = compare(before, now)
    counts = ", ".join(f"{len(part)} {name}" for name, part in now.items())
    print("\n".join([f"{counts}; {len(changed)} changed since {revision}, {len(new)} new", *changed, *new]))
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
