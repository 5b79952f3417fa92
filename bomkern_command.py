"""The `bomkern` command, outside of the package: importing bomkern loads OpenMP, which reads its settings only then."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# How long an idle thread keeps its core busy: rounds for GNU's OpenMP, milliseconds for LLVM's. With the defaults, some
# 300,000 and 200, runs on the same cores wait for each other.
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def keep_waiting_short(environment: MutableMapping[str, str]) -> None:
    """Set how threads wait, unless the user has set any of these variables."""
    if not any(name in environment for name in ("OMP_WAIT_POLICY", *SHORT_SPIN)):
        environment.update(SHORT_SPIN)


def main() -> int:
    keep_waiting_short(os.environ)
    from bomkern.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
