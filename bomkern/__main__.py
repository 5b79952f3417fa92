"""`python -m bomkern`, the same as the `bomkern` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
