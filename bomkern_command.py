"""The `bomkern` command, outside the package: importing that loads torch, and OpenMP reads its settings only then."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# How long a thread that has nothing to do keeps its core busy: rounds of GNU's OpenMP, milliseconds of LLVM's. Their
# own, some 300,000 and 200, leave runs on the same cores waiting for each other.
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def keep_waiting_short(environment: MutableMapping[str, str]) -> None:
    """Set how threads wait, unless the user has said anything of it."""
    if not any(name in environment for name in ("OMP_WAIT_POLICY", *SHORT_SPIN)):
        environment.update(SHORT_SPIN)


def main() -> int:
    keep_waiting_short(os.environ)
    from bomkern.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
