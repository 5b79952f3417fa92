"""Files: read tensors and plain values, never code; write whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def load_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict that ``torch.save`` wrote to a file, on the host. A pickle that names anything else is not run.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds something else than tensors and plain Python values in a dict; in one line.
    """
    try:
        # Said explicitly: only then can the environment (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD) not turn it off.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as why:  # a file made to do harm ends in any of them; torch's own advice is to trust it
        raise ValueError(f"{os.fspath(path)} does not hold tensors and plain values alone: {_reason(why)}") from why
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)} must hold a dict, got {type(found).__name__}")
    return found


def _reason(why: Exception) -> str:
    text = str(why)
    if "Weights only load failed" in text:
        return "it is a pickle with code, or damaged"
    return next(iter(text.splitlines()), "") or type(why).__name__


def write_atomically(path: Path, write: Any, keep: Path | None = None) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to the disk, and rename it into place.

    Args:
        keep: where to move what was at ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
