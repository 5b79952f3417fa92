"""Checkpoints: one file, written whole or not at all, loadable with ``weights_only=True``; and the one before it."""

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
    """Where the checkpoint before that at ``path`` is kept."""
    return path.with_suffix(f".previous{path.suffix}")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors and plain Python values in dicts and lists."""
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=before(path))
    except (OSError, RuntimeError) as why:  # torch reports a full disk as RuntimeError
        raise TrainError(
            f"cannot write {path}: {str(why).splitlines()[0]}; the checkpoint before it is intact"
        ) from why


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint into host memory; where it cannot be read, the one before it.

    Raises:
        TrainError: there is none, neither can be read, or it is another version's.
    """
    there = [one for one in (path, before(path)) if one.is_file()]
    if not there:
        raise TrainError(f"nothing to resume: {path} does not exist")
    reasons = []
    for one in there:
        try:
            state = _read(one)
        except TrainError as why:
            reasons.append(str(why))
            continue
        if one != path:
            why_not = reasons[0] if reasons else f"{path} does not exist"
            log.warning("%s: going on from the one before it, at step %s", why_not, state.get("step"))
        if state.get("format") != FORMAT:
            raise TrainError(f"{one} is not a checkpoint of this version of bomkern")
        return state
    raise TrainError("; ".join(reasons))


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()  # torch.load compares no checksums
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        return load_plain(path)
    except Exception as why:  # what a damaged file raises depends on where it is damaged
        text = (str(why) or type(why).__name__).splitlines()[0]
        raise TrainError(f"{path} is not a readable checkpoint: {text}") from why
