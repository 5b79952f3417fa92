"""Checkpoints, written whole or not at all and loadable with ``weights_only=True``; the previous one is kept."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch

from bomkern.common.files import load_plain, write_atomically

from .config import TrainError

FORMAT = 5
log = logging.getLogger("bomkern")


def before(path: Path) -> Path:
    """Return the path of the checkpoint before the one at ``path``."""
    return path.with_suffix(f".previous{path.suffix}")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors and plain Python values in dicts and lists."""
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=before(path))
    except (OSError, RuntimeError) as why:  # torch reports a full disk as RuntimeError
        raise TrainError(f"cannot write {path}: {str(why).splitlines()[0]}; the previous checkpoint is intact") from why


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint into host memory; if it cannot be read, read the previous one.

    Raises:
        TrainError: no checkpoint exists or can be read, or another version wrote it.
    """
    candidates = [candidate for candidate in (path, before(path)) if candidate.is_file()]
    if not candidates:
        raise TrainError(f"nothing to resume: {path} does not exist")
    reasons = []
    for candidate in candidates:
        try:
            state = _read(candidate)
        except TrainError as why:
            reasons.append(str(why))
            continue
        if candidate != path:
            why_not = reasons[0] if reasons else f"{path} does not exist"
            log.warning("%s: going on from the previous checkpoint, at step %s", why_not, state.get("step"))
        if state.get("format") != FORMAT:
            raise TrainError(f"{candidate} is not a checkpoint of this version of bomkern")
        return state
    raise TrainError("; ".join(reasons))


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch.load compares no checksums
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        return load_plain(path)
    except Exception as why:  # the exception depends on where the file is damaged
        text = (str(why) or type(why).__name__).splitlines()[0]
        raise TrainError(f"{path} is not a readable checkpoint: {text}") from why
