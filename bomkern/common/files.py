"""Read files of tensors and plain values, never of code, and write files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def load_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the dict that ``torch.save`` wrote to a file, on the host. A pickle that names anything else is not run.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file holds anything but a dict of tensors and plain Python values; the message is one line.
    """
    try:
        # Explicit, or TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD in the environment could turn it off.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as why:  # a malicious file raises any of them; torch's own message advises to trust it
        raise ValueError(f"{os.fspath(path)} does not hold tensors and plain values alone: {_reason(why)}") from why
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} must hold a dict, got {type(content).__name__}")
    return content


def _reason(why: Exception) -> str:
    text = str(why)
    if "Weights only load failed" in text:
        return "it is a pickle with code, or damaged"
    return next(iter(text.splitlines()), "") or type(why).__name__


def write_atomically(path: Path, write: Any, keep: Path | None = None) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to the disk, and rename it into place.

    Args:
        keep: where to move the old file at ``path``, if there is one.
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
