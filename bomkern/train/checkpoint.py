"""Checkpoints: one file, written whole or not at all, loadable with ``weights_only=True``."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from .config import TrainError

FORMAT = 3


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to the disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors and plain Python values in dicts and lists."""
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as why:  # torch reports a full disk as RuntimeError
        raise TrainError(
            f"cannot write {path}: {str(why).splitlines()[0]}; the checkpoint before it is intact"
        ) from why


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint into host memory."""
    if not path.is_file():
        raise TrainError(f"nothing to resume: {path} does not exist")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as why:
        raise TrainError(f"{path} is not a readable checkpoint: {str(why).splitlines()[0]}") from why
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainError(f"{path} is not a checkpoint of this version of bomkern")
    return state
