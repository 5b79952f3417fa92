"""`diagnose_folder`: diagnose the run in a folder, and write its report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..diagnosis.diagnose import Diagnosis, diagnose
from ..goals.history import History
from .page import write_report

HISTORY, REPORT = "history.pt", "report.html"
PICTURES = {
    "reconstructions.png": "Held-out crops and their reconstructions",
    "swaps.png": "Structure of one crop, appearance of another",
    "traversals.png": "One latent moved, the others kept",
}


def diagnose_folder(folder: str | os.PathLike[str], report: bool = True) -> tuple[Diagnosis, Path | None]:
    """Diagnose the run in a folder from its history.pt and payoff.json, and write report.html into it.

    Returns:
        The diagnosis, and the path of the report or None without one.

    Raises:
        OSError, ValueError, TypeError: the folder has no history, or a file in it is invalid.
    """
    run = Path(folder)
    if not (run / HISTORY).is_file():
        raise FileNotFoundError(f"{run} holds no {HISTORY}")
    try:
        history = History.load(run / HISTORY)
        _ = history["share"], history.steps
    except Exception as why:  # torch.load raises many kinds of errors for an invalid file
        raise ValueError(f"{run / HISTORY} is not a history of bomkern ({type(why).__name__})") from why
    payoff, config = (_read_json(run / name) for name in ("payoff.json", "config.json"))
    diagnosis = diagnose(history, payoff=payoff)
    if not report:
        return diagnosis, None
    pictures = {caption: run / name for name, caption in PICTURES.items() if (run / name).is_file()}
    write_report(run / REPORT, history, diagnosis, payoff=payoff, pictures=pictures, config=config)
    return diagnosis, run / REPORT


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as why:
        raise ValueError(f"{path} is not JSON ({why})") from why
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content
