"""Files that a run writes: `metrics.jsonl`, TensorBoard events, `config.json`, `summary.json`."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from bomkern.common.files import write_atomically
from bomkern.report.run_folder import HISTORY as HISTORY
from bomkern.report.run_folder import REPORT as REPORT

from .checkpoint import before
from .config import TrainError

CHECKPOINT, METRICS, CONFIG, SUMMARY = "checkpoint.pt", "metrics.jsonl", "config.json", "summary.json"
PAYOFF = "payoff.json"
PICTURES = ("reconstructions.png", "swaps.png", "traversals.png")
FORMER = ("levels.png", "shares.png")  # of older versions; now in the report alone
OWN = (CHECKPOINT, before(Path(CHECKPOINT)).name, METRICS, CONFIG, SUMMARY, PAYOFF, HISTORY, REPORT, *PICTURES)
ROOM = 200 * 2**20  # bytes that must be free before a run starts


def prepare(folder: Path, overwrite: bool, resume: bool) -> None:
    """Make the run folder, or raise a TrainError of one line. Removes only files that an earlier run has written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", lambda file: file.write(b"\0" * 4096))
        (folder / ".writable").unlink()
        free = shutil.disk_usage(folder).free
    except OSError as why:
        raise TrainError(f"--out {folder}: cannot write there ({why.strerror or why})") from why
    if free < ROOM:
        raise TrainError(f"--out {folder}: {free // 2**20} MiB free, a run needs {ROOM // 2**20}")
    existing = [name for name in (*OWN, *FORMER) if (folder / name).exists()]
    if resume or not existing:
        return
    if not overwrite:
        raise TrainError(
            f"--out {folder} holds a run ({existing[0]}): add --resume to go on with it, or --overwrite to lose it"
        )
    for path in [*(folder / name for name in existing), *folder.glob("events.out.tfevents.*")]:
        path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`; a line cut short by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def versions() -> dict[str, str]:
    """Return the versions of all packages that affect the results of a run."""
    from importlib.metadata import PackageNotFoundError, version

    import bomkern

    installed = {"bomkern": bomkern.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("lightning-fabric", "numpy", "pillow", "scikit-image", "scikit-learn", "torchmetrics"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "missing"
    return installed


class Recorder:
    """Append to `metrics.jsonl` and to TensorBoard events, on rank 0 only.

    Args:
        folder: the run folder.
        step: the step to go on from. Lines beyond it, and lines of a window cut short by the end of a run, are removed,
            because their steps are repeated.
        active: False on every rank but rank 0.
    """

    def __init__(self, folder: Path, step: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        path = folder / METRICS
        earlier = [line for line in read_lines(path) if line["step"] <= step and not line.get("partial")]
        text = "".join(json.dumps(line) + "\n" for line in earlier)
        write_atomically(path, lambda file: file.write(text.encode()))
        self.file = path.open("a")
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def line(self, content: dict[str, Any]) -> None:
        """Write one line, and its values as TensorBoard scalars."""
        if not self.active:
            return
        self.file.write(json.dumps(content) + "\n")
        self.file.flush()
        for name in ("loss", "psnr", "ssim"):
            if name in content:
                self.events.add_scalar(name, content[name], content["step"])
        for goal, values in content.get("goals", {}).items():
            for name, value in values.items():
                self.events.add_scalar(f"{name}/{goal}", value, content["step"])

    def close(self) -> None:
        if self.active:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.events.close()
