"""Install bomkern or its extras for the Makefile, into the environment of the Python that runs this.

``python tools/install.py build [PIP ARGUMENT ...]`` builds bomkern and installs it editable, with a line for each
compiled file. pip's output is in build/install.log, and its end is printed if pip fails.
``python tools/install.py extra NAME ...`` installs the packages of pyproject.toml's extras without bomkern itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "install.log"
PIP = [sys.executable, "-m", "pip", "install"]


def requirements(names: list[str]) -> list[str]:
    """Return the requirements of these extras and of the extras inside them, without duplicates."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    unique: dict[str, None] = {}
    for name in names:
        if name not in extras:
            raise SystemExit(f"install: no extra is called {name!r}; there are {', '.join(sorted(extras))}.")
        for wanted in extras[name]:
            inner = re.fullmatch(r"bomkern\[(.+)\]", wanted)
            unique |= dict.fromkeys(requirements(inner[1].split(",")) if inner else [wanted])
    return list(unique)


def build(arguments: list[str]) -> int:
    LOG.parent.mkdir(exist_ok=True)
    command = [*PIP, "--verbose", *arguments, "--editable", str(ROOT)]
    end: deque[str] = deque(maxlen=60)
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            end.append(line)
            if line.lstrip().startswith("bomkern: "):
                print(line.strip(), flush=True)
    if process.returncode:
        print(*end, f"install: pip failed; its whole output is in {LOG.relative_to(ROOT)}", sep="", file=sys.stderr)
    return process.returncode


def main() -> int:
    if sys.argv[1:2] == ["build"]:
        return build(sys.argv[2:])
    if sys.argv[1:2] == ["extra"] and sys.argv[2:]:
        return subprocess.run([*PIP, "--quiet", *requirements(sys.argv[2:])]).returncode
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
