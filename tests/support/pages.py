"""The code of Markdown pages, and an environment to run it in."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest


def code_of(page: Path) -> str:
    """Return the Python blocks of a page in order, as one program with the page's line numbers."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        kept.append(line if inside else "")
    return "\n".join(kept)


def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables that torchrun sets for the only process of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
